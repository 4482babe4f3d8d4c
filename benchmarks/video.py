"""Decoding against other decoders, on the same clips in one run: python benchmarks/video.py

Every case turns a clip into 8 uniform frames of 448 x 448 RGB (except where it says so), on one
thread. Sets: small clips of three sizes with heavy grain, 720p with light grain, as x264 makes them
by default, and small ones without B-frames. docs/benchmarks.md holds a run and the goals.
"""

import argparse
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from peers import GOALS_HEAD, ROOT, Row, goal, load, machine, measure, ratio, reexecute, table
from PIL import Image

SIZE, COUNT = 448, 8


def make_clips(
    sizes: list[tuple[int, int]], number: int, noise: int, b_frames: int | None = None
) -> list[bytes]:
    """x264 crf 23 medium, 25 fps, 50 to 100 frames: a camera pans over a scene with a moving
    figure, and every frame has its own grain (`noise`, standard deviation in grey levels).

    Medium means three B-frames, one of which the others refer to; `b_frames` sets another number.
    """
    import av

    options = {"crf": "23", "preset": "medium", "threads": "1"}
    if b_frames is not None:
        options["bf"] = str(b_frames)
    clips = []
    for index in range(number):
        draws = np.random.default_rng(index)
        height, width = sizes[index % len(sizes)]
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=25, options=options)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for rgb in pan(draws, height, width, int(draws.integers(50, 101)), noise):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
            container.mux(stream.encode(None))
        clips.append(buffer.getvalue())
    return clips


def pan(
    draws: np.random.Generator, height: int, width: int, num_frames: int, noise: int
) -> Iterator[np.ndarray]:
    """Frames of a scene, uint8 RGB."""
    scene = texture(draws, height + 320, width + 320)
    figure = texture(draws, height, width)
    grain = draws.normal(0, noise, (height + 64, width + 64, 3)).astype(np.float32)
    y, x = np.mgrid[0:height, 0:width]
    speed_y, speed_x = draws.uniform(-1.5, 1.5, 2)  # pixels per frame
    for j in range(num_frames):
        top, left = int(160 + speed_y * j), int(160 + speed_x * j)
        picture = scene[top : top + height, left : left + width].copy()
        across = int(0.15 * width * np.sin(j / 17))
        down = int(0.05 * height * (1 + np.sin(j / 9)))
        inside = ((x - width / 2 - across) / (0.18 * width)) ** 2 + (
            (y - height / 2 - down) / (0.4 * height)
        ) ** 2 < 1
        picture[inside] = np.roll(figure, (down, across), (0, 1))[inside]
        top, left = draws.integers(0, 64, 2)
        picture += grain[top : top + height, left : left + width]
        yield np.clip(picture, 0, 255).astype(np.uint8)


def texture(draws: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A picture with large, middle and small structure, float32 RGB."""
    out = np.full((height, width, 3), 118, np.float32)
    for cell, contrast in ((96, 60), (24, 25), (6, 10)):
        coarse = draws.integers(0, 256, (height // cell + 2, width // cell + 2, 3))
        image = Image.fromarray(coarse.astype(np.uint8))
        smooth = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        out += (smooth - 128) * (contrast / 64)
    return out


def dropped_share(clips: list[bytes]) -> float:
    """Share of packets that nothing refers to: they can be left out."""
    import av

    from data_shards.media.packets import Packets, avc_length_bytes, slice_kinds

    references = []
    for clip in clips:
        with av.open(io.BytesIO(clip), format="mp4") as container:
            packets = Packets.demux(container)
            nal = avc_length_bytes(packets.context)
            references += [slice_kinds(p, nal).is_reference for p in packets.packets]
    return 1 - sum(references) / len(references)


def decoders(problems: dict[str, str]) -> dict[str, Callable[[bytes], object]]:
    """Name -> clip bytes to frames."""
    import av

    from data_shards.media.pixels import jpeg_decode_into, jpeg_encode, resize_frame
    from data_shards.media.video import clip_indices, decode_frames
    from data_shards.shards.checksum import crc32

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

    def ours(clip: bytes, **how: object) -> np.ndarray:
        indices = clip_indices(clip_frames(clip), COUNT)
        return decode_frames(clip, indices, num_frames=clip_frames(clip), **how)  # type: ignore[arg-type]

    def exact(rgb: np.ndarray) -> np.ndarray:
        return resize_frame(rgb, SIZE)

    def extracted(clip: bytes) -> np.ndarray:
        out = np.empty((COUNT, SIZE, SIZE, 3), np.uint8)
        for number, jpeg in enumerate(stored[clip]):
            jpeg_decode_into(jpeg, out[number])
        return out

    def prepare(clip: bytes) -> None:
        clip_frames(clip)
        if clip not in stored:
            stored[clip] = [jpeg_encode(rgb, 90) for rgb in ours(clip, scale=exact)]

    cases: dict[str, Callable[[bytes], object]] = {
        "prepare": prepare,
        "libavcodec, all frames, no resize": lambda clip: linear(clip, None),
        "linear + Pillow": lambda clip: np.stack(linear(clip, exact)),  # type: ignore[arg-type]
        "ours + Pillow (exact)": lambda clip: ours(clip, scale=exact),
        "ours, resize: fast": lambda clip: ours(clip, size=SIZE),
        "extracted frames (simplejpeg)": extracted,
        "checksum (crc32)": crc32,
    }
    if cv2 is not None:
        cubic = lambda rgb: cv2.resize(rgb, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)  # noqa: E731
        cv2.setNumThreads(1)
        cases["linear + cv2"] = lambda clip: np.stack(linear(clip, cubic))
        cases["ours + cv2"] = lambda clip: ours(clip, scale=cubic)
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
    from data_shards.media.video import clip_indices

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
    print(
        f"\n**{name}**: {len(clips)} clips, {kib:.0f} KiB each; pictures that no other refers to: "
    )
    print(f"{dropped_share(clips):.0%}; frames bit-identical to linear decoding: {same} of")
    print(f"{len(clips)}.\n\n{table(rows, 'clip', 'linear + Pillow')}\n")
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
    plain = make_clips([(240, 320), (360, 480), (360, 640)], max(args.clips // 3, 3), 8, b_frames=0)
    run_set("small set without B-frames, in which nothing can be left out", plain, 3, problems)
    for name, reason in problems.items():
        print(f"not measured: {name}: {reason}")


if __name__ == "__main__":
    sys.exit(main())
