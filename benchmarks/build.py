"""How fast records become shards, beside plain tools doing the same to the same clips.

    python benchmarks/build.py [--clips 48] [--rounds 3] [--json FILE]

Every row runs in a process of its own on the same files, one worker, rounds interleaved; the figure
is the median of clips per CPU second (user and system, with all child processes), so that other
load on the machine matters little. `ours / peer` above 1 means the build is the faster one. Then
the growth: the same build of one, two and four times as many clips. Last the wall time of one build
by one, two and four workers; `cores` is how many cores it got, CPU time over wall time, which other
load makes fewer than there are.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from data_shards.build.build import BuildOptions, build_shards
from data_shards.build.clip_record import Clip, MediaOptions, PendingRecord, make_record
from data_shards.build.source_item import RecordFactory
from data_shards.media.video import clip_indices, encode_mp4
from data_shards.tasks import Task

FPS, FRAMES, SIZE = 25, 75, (240, 320)  # 3 s, about the median of an utterance
CUT_S = (0.6, 2.6)  # the span that is cut out of each clip
GROWTH = (1, 2, 4)
WORKERS = (1, 2, 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One thing to do to all clips, by the build and by a plain tool."""

    name: str
    peer: str  # the command in words
    ours: Callable[[Sequence[Path], Path], None]
    theirs: Callable[[Sequence[Path], Path], None]


def main() -> None:
    """Measure, print, and write the JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=48, help="clips per round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the median counts")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    if shutil.which("ffmpeg") is None:
        sys.exit("benchmarks/build.py: the command ffmpeg is needed as the peer; install it")
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        files = make_clips(Path(folder) / "clips", args.clips * GROWTH[-1])
        mean_kb = sum(path.stat().st_size for path in files) / len(files) / 1000
        print(f"clips: {SIZE[1]}x{SIZE[0]}, {FRAMES} frames at {FPS} a second, {mean_kb:.0f} kB")
        rows = compare(files[: args.clips], args.rounds)
        growth = grow(files, args.clips, args.rounds)
        spread = spread_out(files, args.rounds)
    report: dict[str, object] = {"machine": machine(), "clips": args.clips}
    report |= {"rows": rows, "growth": growth, "workers": spread}
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def machine() -> str:
    """Processor, cores, versions, load."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    banner = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True)
    return (
        f"machine: {model}, {os.cpu_count()} cores, Python {platform.python_version()}, PyAV "
        f"{av.__version__}, ffmpeg {banner.stdout.split()[2]}, load {os.getloadavg()[0]:.1f}"
    )


def make_clips(folder: Path, count: int) -> list[Path]:
    """`count` different mp4 files: a drifting pattern under noise, so that it costs to code."""
    folder.mkdir()
    films = [encode_mp4(pattern(number), FPS, 23) for number in range(min(12, count))]
    paths = []
    for number in range(count):
        path = folder / f"clip-{number:05d}.mp4"
        path.write_bytes(films[number % len(films)])
        paths.append(path)
    return paths


def pattern(number: int) -> Iterator[NDArray[np.uint8]]:
    """Frames of one clip, uint8 [H, W, 3]."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    a, b, c = rng.uniform(0.01, 0.08, 3)
    noise = rng.normal(0, 6, (*SIZE, 3))
    for t in range(FRAMES):
        waves = [np.sin(a * (x + 3 * t)), np.cos(b * (y - t)), np.sin(c * x * y / 99)]
        picture = 128 + 90 * np.stack(waves, axis=2) + np.roll(noise, t, axis=0)
        yield picture.clip(0, 255).astype(np.uint8)


def source_items(
    files: Sequence[Path], media: MediaOptions, *, cut: bool
) -> Iterator[RecordFactory]:
    """What a corpus adapter gives the build for these files."""
    start_s, end_s = CUT_S if cut else (None, None)
    for path in files:
        pending = PendingRecord(
            key=path.stem,
            source="benchmark",
            split="train",
            utterance="Hello there.",
            speaker="Ann",
            emotion="joy",
            tasks=(Task.ER,),
            clip=Clip(path=path, start_s=start_s, end_s=end_s),
        )
        yield partial(make_record, pending, media)


def ours(
    files: Sequence[Path],
    out: Path,
    *,
    media: MediaOptions,
    options: BuildOptions,
    cut: bool,
    workers: int = 1,
) -> None:
    """The build itself."""
    items = source_items(files, media, cut=cut)
    index = build_shards(items, out / "shards", options=options, provenance={}, workers=workers)
    assert index.num_records == len(files)


def ffmpeg(files: Sequence[Path], out: Path, *, words: Sequence[str], suffix: str) -> None:
    """One ffmpeg per clip, one thread."""
    for path in files:
        quiet = ["ffmpeg", "-v", "error", "-threads", "1", "-i", str(path)]
        subprocess.run([*quiet, *words, "-threads", "1", f"{out}/{path.stem}{suffix}"], check=True)


def copy(files: Sequence[Path], out: Path) -> None:
    """One cp for all clips, then one tar: what the build does, without a look at them."""
    (out / "files").mkdir()
    subprocess.run(["cp", *map(str, files), str(out / "files")], check=True)
    subprocess.run(["tar", "cf", str(out / "all.tar"), "-C", str(out), "files"], check=True)


def cases() -> Iterator[Case]:
    """What is compared."""
    as_is, jpegs = BuildOptions(), BuildOptions(frames="extracted")
    packets, decoded = MediaOptions(check="packets"), MediaOptions(check="frames")
    wanted = "+".join(f"eq(n,{number})" for number in sorted(set(clip_indices(FRAMES, 8))))
    yield Case(
        name="store as it is, packets checked",
        peer="cp and tar",
        ours=partial(ours, media=packets, options=as_is, cut=False),
        theirs=copy,
    )
    yield Case(
        name="store as it is, 8 frames decoded as a check",
        peer="ffmpeg decodes all",
        ours=partial(ours, media=decoded, options=as_is, cut=False),
        theirs=partial(ffmpeg, words=["-f", "null"], suffix=".none"),
    )
    span = ["-ss", str(CUT_S[0]), "-to", str(CUT_S[1]), "-an"]
    x264 = ["-c:v", "libx264", "-preset", "veryfast", "-crf", "18", "-g", "24", "-bf", "2"]
    yield Case(
        name="cut 2 s out and encode",
        peer="ffmpeg, the same cut and x264 settings",
        ours=partial(ours, media=packets, options=as_is, cut=True),
        theirs=partial(ffmpeg, words=[*span, *x264], suffix=".mp4"),
    )
    still = ["-vf", f"select='{wanted}',scale=448:448:flags=bicubic", "-vsync", "0", "-q:v", "2"]
    yield Case(
        name="8 frames at 448 px as JPEG",
        peer="ffmpeg select, scale, mjpeg",
        ours=partial(ours, media=packets, options=jpegs, cut=False),
        theirs=partial(ffmpeg, words=still, suffix="-%d.jpg"),
    )


def cpu_seconds(work: Callable[[Sequence[Path], Path], None], files: Sequence[Path]) -> float:
    """User and system time of the work, with its children."""
    return seconds(work, files)[0]


def seconds(
    work: Callable[[Sequence[Path], Path], None], files: Sequence[Path]
) -> tuple[float, float]:
    """CPU time (with its children) and wall time of the work in a process of its own."""
    out = Path(tempfile.mkdtemp(dir=files[0].parent.parent))
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work(files, out)
            code = 0
        finally:
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    wall = time.monotonic() - began
    shutil.rmtree(out)
    if status != 0:
        sys.exit("benchmarks/build.py: a measured process failed; its message stands above")
    return usage.ru_utime + usage.ru_stime, wall


def compare(files: Sequence[Path], rounds: int) -> list[dict[str, object]]:
    """All cases, ours and the peer's in turn."""
    print(f"\n| {len(files)} clips, clips per second and core | build | peer | ours / peer |")
    print("|---|---|---|---|")
    rows: list[dict[str, object]] = []
    for case in cases():
        times: dict[str, list[float]] = {"ours": [], "peer": []}
        for _ in range(rounds):
            times["ours"].append(cpu_seconds(case.ours, files))
            times["peer"].append(cpu_seconds(case.theirs, files))
        rate = {name: len(files) / statistics.median(found) for name, found in times.items()}
        ratio = rate["ours"] / rate["peer"]
        peer = f"{rate['peer']:.1f} ({case.peer})"
        print(f"| {case.name} | {rate['ours']:.1f} | {peer} | {ratio:.2f} |", flush=True)
        rows.append({"case": case.name, "peer": case.peer, **rate, "ratio": ratio})
    return rows


def grow(files: Sequence[Path], clips: int, rounds: int) -> list[dict[str, float | int]]:
    """CPU milliseconds per clip of a build of more and more clips, check of 8 frames."""
    work = partial(ours, media=MediaOptions(check="frames"), options=BuildOptions(), cut=False)
    print("\n| clips | CPU ms per clip | against the first |\n|---|---|---|")
    rows: list[dict[str, float | int]] = []
    for factor in GROWTH:
        part = files[: clips * factor]
        spent = statistics.median(cpu_seconds(work, part) for _ in range(rounds))
        rows.append({"clips": len(part), "ms_per_clip": 1000 * spent / len(part)})
        ratio = rows[-1]["ms_per_clip"] / rows[0]["ms_per_clip"]
        print(f"| {len(part)} | {rows[-1]['ms_per_clip']:.1f} | {ratio:.2f} |", flush=True)
    return rows


def spread_out(files: Sequence[Path], rounds: int) -> list[dict[str, float | int]]:
    """Wall and CPU milliseconds per clip by more and more workers, check of 8 frames."""
    print("\n| workers | wall ms per clip | CPU ms per clip | cores | wall, against one worker |")
    print("|---|---|---|---|---|")
    found: dict[int, list[tuple[float, float]]] = {number: [] for number in WORKERS}
    for _ in range(rounds):
        for number in WORKERS:
            media = MediaOptions(check="frames")
            work = partial(ours, media=media, options=BuildOptions(), cut=False, workers=number)
            found[number].append(seconds(work, files))
    rows: list[dict[str, float | int]] = []
    for number, spent in found.items():
        cpu, wall = (1000 * statistics.median(one) / len(files) for one in zip(*spent, strict=True))
        cores = statistics.median(one / other for one, other in spent)
        rows.append({"workers": number, "wall_ms": wall, "cpu_ms": cpu, "cores": cores})
        ratio = wall / rows[0]["wall_ms"]
        print(f"| {number} | {wall:.1f} | {cpu:.1f} | {cores:.2f} | {ratio:.2f} |", flush=True)
    return rows


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"\n{time.monotonic() - began:.0f} s")
