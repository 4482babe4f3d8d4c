"""Decoding against other decoders, on the same clips in one run: python benchmarks/video.py

Every case turns a clip into 8 uniform frames of 448 x 448 RGB (except where it says so), on one
thread. Two sets: small clips of three sizes with heavy noise, and 720p. docs/benchmarks.md holds a
run and the goals.
"""

import argparse
import io
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from peers import GOALS_HEAD, ROOT, Row, goal, load, machine, measure, ratio, reexecute, table

SIZE, COUNT = 448, 8


def make_clips(sizes: list[tuple[int, int]], number: int, noise: int) -> list[bytes]:
    """x264 crf 23 medium, 25 fps, 50 to 100 frames: a drifting picture with noise."""
    import av

    clips = []
    for index in range(number):
        draws = np.random.default_rng(index)
        height, width = sizes[index % len(sizes)]
        num_frames = int(draws.integers(50, 101))
        y, x = np.mgrid[0:height, 0:width]
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as container:
            options = {"crf": "23", "preset": "medium", "threads": "1"}
            stream = container.add_stream("libx264", rate=25, options=options)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for j in range(num_frames):
                waves = [np.sin((x + k * j) / 31 + k) * np.cos((y - j) / 23) for k in range(3)]
                picture = 128 + 80 * np.stack(waves, axis=-1)
                picture += draws.normal(0, noise, picture.shape)
                frame = av.VideoFrame.from_ndarray(
                    np.clip(picture, 0, 255).astype(np.uint8), format="rgb24"
                )
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        clips.append(buffer.getvalue())
    return clips


def decoders(problems: dict[str, str]) -> dict[str, Callable[[bytes], object]]:
    """Name -> clip bytes to frames."""
    import av

    from data_shards.pixels import jpeg_decode_into, jpeg_encode, resize_frame
    from data_shards.video import clip_indices, decode_frames

    cv2, decord = load("cv2", problems), load("decord", problems)
    torchcodec = load("torchcodec.decoders", problems)

    def linear(clip: bytes, resize: Callable[[object], object] | None) -> list[object]:
        found = []
        with av.open(io.BytesIO(clip)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            frames = clip_frames(clip)
            wanted = set(clip_indices(frames, COUNT))
            for number, frame in enumerate(container.decode(stream)):
                if resize is not None and number in wanted:
                    found.append(resize(frame.to_ndarray(format="rgb24")))
        return found

    def clip_frames(clip: bytes) -> int:
        if clip not in counts:
            with av.open(io.BytesIO(clip)) as container:
                counts[clip] = sum(1 for p in container.demux(video=0) if p.size)
        return counts[clip]

    counts: dict[bytes, int] = {}
    stored: dict[bytes, list[bytes]] = {}

    def ours(clip: bytes, size: int | None = None) -> np.ndarray:
        indices = clip_indices(clip_frames(clip), COUNT)
        return decode_frames(clip, indices, num_frames=clip_frames(clip), size=size)

    def extracted(clip: bytes) -> np.ndarray:
        out = np.empty((COUNT, SIZE, SIZE, 3), np.uint8)
        for number, jpeg in enumerate(stored[clip]):
            jpeg_decode_into(jpeg, out[number])
        return out

    def prepare(clip: bytes) -> None:
        clip_frames(clip)
        if clip not in stored:
            stored[clip] = [jpeg_encode(resize_frame(f, SIZE), 90) for f in ours(clip)]

    cases: dict[str, Callable[[bytes], object]] = {
        "prepare": prepare,
        "libavcodec, all frames, no resize": lambda clip: linear(clip, None),
        "linear + Pillow": lambda clip: np.stack(
            linear(clip, lambda rgb: resize_frame(rgb, SIZE))  # type: ignore[arg-type]
        ),
        "ours + Pillow (exact)": lambda clip: np.stack([resize_frame(f, SIZE) for f in ours(clip)]),
        "ours, resize: fast": lambda clip: ours(clip, SIZE),
        "extracted frames (simplejpeg)": extracted,
        "checksum (crc32)": zlib.crc32,
    }
    if cv2 is not None:
        cubic = lambda rgb: cv2.resize(rgb, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)  # noqa: E731
        cv2.setNumThreads(1)
        cases["linear + cv2"] = lambda clip: np.stack(linear(clip, cubic))
        cases["ours + cv2"] = lambda clip: np.stack([cubic(f) for f in ours(clip)])
        cases["OpenCV VideoCapture + cv2"] = lambda clip: opencv(
            cv2, clip, clip_frames(clip), cubic
        )
    if decord is not None:
        cases["decord, its own resize"] = lambda clip: (
            decord.VideoReader(io.BytesIO(clip), width=SIZE, height=SIZE, num_threads=1)
            .get_batch(list(clip_indices(clip_frames(clip), COUNT)))
            .asnumpy()
        )
    if torchcodec is not None and cv2 is not None:
        cases["torchcodec + cv2"] = lambda clip: np.stack(
            [
                cubic(frame.numpy())
                for frame in torchcodec.VideoDecoder(
                    clip, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
                )
                .get_frames_at(list(clip_indices(clip_frames(clip), COUNT)))
                .data
            ]
        )
    return cases


def opencv(cv2: object, clip: bytes, frames: int, resize: Callable[[object], object]) -> object:
    """VideoCapture reads files only; grab() decodes, retrieve() converts."""
    from data_shards.video import clip_indices

    wanted, found = set(clip_indices(frames, COUNT)), []
    with tempfile.NamedTemporaryFile(suffix=".mp4", dir="/dev/shm") as file:
        file.write(clip)
        file.flush()
        capture = cv2.VideoCapture(file.name, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])  # type: ignore[attr-defined]
        for number in range(frames):
            if not capture.grab():
                raise ValueError(f"OpenCV gave {number} of {frames} frames")
            if number in wanted:
                found.append(resize(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB)))  # type: ignore[attr-defined]
        capture.release()
    return np.stack(found)


def run_set(name: str, clips: list[bytes], rounds: int, problems: dict[str, str]) -> dict[str, Row]:
    cases = decoders(problems)
    for clip in clips:
        cases["prepare"](clip)
    del cases["prepare"]
    same = sum(
        np.array_equal(cases["linear + Pillow"](c), cases["ours + Pillow (exact)"](c))
        for c in clips
    )

    def over_all(case: Callable[[bytes], object]) -> Callable[[], int]:
        return lambda: len([case(clip) for clip in clips])

    rows = measure({key: over_all(case) for key, case in cases.items()}, rounds)
    kib = np.mean([len(clip) for clip in clips]) / 1024
    print(f"\n**{name}**: {len(clips)} clips, {kib:.0f} KiB each; frames bit-identical to linear ")
    print(f"decoding: {same} of {len(clips)}.\n\n{table(rows, 'clip', 'linear + Pillow')}\n")
    return rows


def goals(rows: dict[str, Row]) -> str:
    best = [
        rows[name].ms / rows["ours + cv2"].ms
        for name in ("OpenCV VideoCapture + cv2", "decord, its own resize", "torchcodec + cv2")
        if name in rows and "ours + cv2" in rows
    ]
    everything = "libavcodec, all frames, no resize"
    lines = [
        GOALS_HEAD,
        goal(
            "exact decode / linear + Pillow",
            ratio(rows, "ours + Pillow (exact)", "linear + Pillow"),
            0.87,
        ),
        goal(
            "decode with cv2 / libavcodec decoding all", ratio(rows, "ours + cv2", everything), 0.95
        ),
        goal(
            "1 / speed-up over the fastest other decoder", 1 / min(best) if best else None, 1 / 1.3
        ),
        goal("extracted frames, ms per clip", rows["extracted frames (simplejpeg)"].ms, 6.5),
        goal("checksum / decode", ratio(rows, "checksum (crc32)", "ours + Pillow (exact)"), 0.002),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", type=Path, default=ROOT / ".bench-venv")
    parser.add_argument("--clips", type=int, default=24, help="small clips; a third of it in 720p")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    reexecute(args.env)
    problems: dict[str, str] = {}
    print(machine())
    small = make_clips([(240, 320), (360, 480), (360, 640)], args.clips, 8)
    print(f"\n{goals(run_set('small set', small, args.rounds, problems))}")
    large = make_clips([(720, 1280)], max(args.clips // 3, 2), 2)
    print(f"\n{goals(run_set('720p set', large, args.rounds, problems))}")
    for name, reason in problems.items():
        print(f"not measured: {name}: {reason}")


if __name__ == "__main__":
    sys.exit(main())
