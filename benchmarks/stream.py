"""Reading, transport and the whole pipeline against other loaders: python benchmarks/stream.py

One dataset of synthetic clips in all formats, on local disk (page cache warm, except where it says
cold). Peers: webdataset's own pipeline, Megatron-Energon, mosaicml-streaming. The cases of reading
are in `reader.py`, resume and rates in `sampler.py`. docs/benchmarks.md holds a run and the goals.
"""

import argparse
import io
import itertools
import math
import multiprocessing
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from peers import GOALS_HEAD, ROOT, Row, goal, load, machine, measure, ratio, reexecute, table
from reader import Peers, our_cases
from sampler import fetches, measure_starts, our_starts, rate_errors, starts_table
from video import COUNT, SIZE, make_clips

STEP = (4 * COUNT, SIZE, SIZE, 3)  # the frames of four clips


def build(folder: Path, clips: list[bytes], records: int) -> None:
    """Our shard folder; its tars are what webdataset and Energon read, too."""
    from data_shards.build.build import build_shards
    from data_shards.media.video import count_frames
    from data_shards.shards.record import Record, Video
    from data_shards.tasks import Task

    lengths = [count_frames(clip) for clip in clips]

    def make() -> Iterator[Record]:
        for number in range(records):
            yield Record(
                key=f"clip_{number:06d}",
                source="benchmark",
                split="train",
                utterance="I did not expect that at all, did you?",
                speaker="Ann",
                sentiment=1.0,
                emotion="joy",
                expressions=("Jaw Drop",),
                tasks=(Task.MSA, Task.ER, Task.FER),
                num_frames=lengths[number % len(clips)],
                peak_frame=3,
                media=Video(mp4=clips[number % len(clips)]),
            )

    build_shards(make(), folder, provenance={}, max_records_per_shard=max(records // 16, 1))


# ------------------------------------------------------------------------------------- transport


LEFT = "decoded in two processes and left there"
SHARED = "ours, decoded in two workers, straight into shared memory"


class Steps(torch.utils.data.Dataset[Any]):
    """Steps of four clips of stored frames, which simplejpeg writes straight to their place."""

    def __init__(self, records: list[Any], steps: int) -> None:
        from data_shards.stream import ViewOptions

        self._records, self._steps = records, steps
        self._view = ViewOptions(num_frames=COUNT, image_size=SIZE)

    def __len__(self) -> int:
        return self._steps

    def into(self, step: int, out: np.ndarray) -> np.ndarray:
        from data_shards.stream import decode_view

        for n in range(4):
            record = self._records[(4 * step + n) % len(self._records)]
            decode_view(record, "clip", self._view, out=out[n * COUNT : (n + 1) * COUNT])
        return out

    def __getitem__(self, step: int) -> torch.Tensor:
        return torch.from_numpy(self.into(step, np.empty(STEP, np.uint8)))


def transports(folder: Path, clips: int) -> dict[str, Callable[[], int]]:
    """The same decoding in two processes: what they differ by is the way to the trainer."""
    from data_shards.build.build import extract_frames
    from data_shards.shards.index import ShardIndex
    from data_shards.shards.reader import ShardReader
    from emoverse.data.workers import PoolOptions, WorkerPool

    index = ShardIndex.load(folder)
    reader = ShardReader(folder, index)
    records = [reader.read(*index.address(n)) for n in range(min(clips, index.num_records))]
    steps = 250
    data = Steps([extract_frames(record, COUNT, SIZE, 90) for record in records], steps)

    def left() -> int:
        def work(first: int) -> None:
            places = [np.empty(STEP, np.uint8) for _ in range(3)]  # as many as the buffer has slots
            for step in range(first, steps, 2):
                data.into(step, places[step % len(places)])

        context = multiprocessing.get_context("fork")
        workers = [context.Process(target=work, args=(first,)) for first in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return 4 * steps

    def shared() -> int:
        def make(step: int, slots: Any) -> np.ndarray:
            return data.into(step, slots.allocate(STEP))

        options = PoolOptions(workers=2, step_bytes=math.prod(STEP))
        return 4 * sum(1 for _ in WorkerPool(make, range(steps), options))

    def loader() -> int:
        batches = torch.utils.data.DataLoader(
            data, batch_size=None, num_workers=2, multiprocessing_context="fork"
        )
        return 4 * sum(1 for _ in batches)

    return {LEFT: left, SHARED: shared, "torch DataLoader, decoded in two workers": loader}


def transport_table(rows: dict[str, Row]) -> str:
    """Each case, and what it takes beyond the decoding that all of them do."""
    lines = ["| | CPU ms per clip | of it transport |", "|---|---|---|"]
    lines += [
        f"| {row.name} | {row.ms:.3g} | {transport_ms(rows, row.name):.2f} |"
        for row in rows.values()
    ]
    return "\n".join(lines)


def transport_ms(rows: dict[str, Row], name: str) -> float:
    """Median over the rounds of what a case takes more than decoding alone."""
    return median(a - b for a, b in zip(rows[name].rounds, rows[LEFT].rounds, strict=True))


# -------------------------------------------------------------------------------- whole pipeline


def pipelines(folder: Path, limit: int, problems: dict[str, str]) -> dict[str, Callable[[], int]]:
    """Clips on disk to frames in the trainer, two workers, four clips per step."""
    from data_shards.shards.index import ShardIndex
    from data_shards.shards.reader import ShardReader
    from data_shards.stream import ViewOptions, decode_view
    from emoverse.data.workers import PoolOptions, WorkerPool

    index = ShardIndex.load(folder)
    reader = ShardReader(folder, index)
    order = random.Random(0).sample(range(index.num_records), min(limit, index.num_records))
    steps = len(order) // 4

    def ours(resize: str) -> Callable[[], int]:
        view = ViewOptions(num_frames=COUNT, image_size=SIZE, resize=resize)  # type: ignore[arg-type]

        def make(step: int, slots: Any) -> np.ndarray:
            pixels = slots.allocate(STEP)
            for place, n in enumerate(order[4 * step : 4 * step + 4]):
                record = reader.read(*index.address(n))
                out = pixels[place * COUNT : (place + 1) * COUNT]
                decode_view(record, "clip", view, out=out)
            return pixels

        def run() -> int:
            options = PoolOptions(workers=2, step_bytes=math.prod(STEP))
            return 4 * sum(1 for _ in WorkerPool(make, range(steps), options))

        return run

    cases = {"ours, exact": ours("exact"), "ours, resize: fast": ours("fast")}
    webdataset, cv2 = load("webdataset", problems), load("cv2", problems)
    if webdataset is not None and cv2 is not None:
        names = [str(folder / shard.name) for shard in index.shards]

        def plain() -> int:
            dataset = (
                webdataset.WebDataset(
                    names, shardshuffle=len(names), seed=0, nodesplitter=None, empty_check=False
                )
                .shuffle(100, rng=random.Random(0))
                .map(lambda sample: pyav_frames(sample["mp4"], cv2))
                .batched(4, partial=False)
            )
            loader = webdataset.WebLoader(
                dataset, batch_size=None, num_workers=2, multiprocessing_context="fork"
            )
            return 4 * sum(1 for _ in itertools.islice(loader, steps))

        cases["webdataset, PyAV linear + cv2, DataLoader"] = plain
    return cases


def pyav_frames(clip: bytes, cv2: Any) -> np.ndarray:
    """The loop that most code has: decode all, keep eight."""
    import av

    from data_shards.media.video import clip_indices

    with av.open(io.BytesIO(clip)) as container:
        container.streams.video[0].thread_type = "NONE"
        frames = list(container.decode(video=0))
    cv2.setNumThreads(1)
    wanted = [frames[j].to_ndarray(format="rgb24") for j in clip_indices(len(frames), COUNT)]
    return np.stack(
        [cv2.resize(rgb, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC) for rgb in wanted]
    )


def run(work: Path, args: argparse.Namespace) -> None:
    from data_shards.shards.index import ENTRY_DTYPE

    problems: dict[str, str] = {}
    clips = make_clips([(240, 320), (360, 480), (360, 640)], args.clips, 8)
    folder = work / "shards"
    build(folder, clips, args.records)
    kib = sum(tar.stat().st_size for tar in folder.glob("*.tar")) / args.records / 1024
    peers = Peers(folder, work, problems)
    read = measure({**our_cases(folder), **peers.cases}, args.rounds)
    print(f"\n**Reading** {args.records} records of {kib:.0f} KiB in 16 shards\n")
    print(table(read, "record", "plain pread loop"))
    transport = measure(transports(folder, args.clips), 2 * args.rounds)
    print("\n**Worker to trainer**, 8 stored frames of 448 x 448 per clip, four clips per step\n")
    print(transport_table(transport))
    whole = measure(pipelines(folder, args.decoded, problems), max(args.rounds // 2, 1))
    print("\n**Whole pipeline**, clips on disk to frames in the trainer, two workers\n")
    print(table(whole, "clip", "ours, exact"))
    sizes = {"ours (.idx)": float(ENTRY_DTYPE.itemsize), **peers.index_bytes}
    print("\n| index | bytes per record |\n|---|---|")
    print("\n".join(f"| {name} | {size:.0f} |" for name, size in sizes.items()))
    starts = {**our_starts(folder, COUNT, SIZE), **peers.starts}
    begun = measure_starts(starts, work, args.rounds, problems)
    print(
        f"\n**Time to the first record or batch**, at places of the epoch\n\n{starts_table(begun)}"
    )
    off = rate_errors(work, problems)
    print("\n| samples off at 2/5, 1/5, 2/5 | any window of 100 | any prefix |\n|---|---|---|")
    print("\n".join(f"| {name} | {w:.1f} | {p:.2f} |" for name, (w, p) in off.items()))
    print(f"\n{goals(read, transport, sizes, begun, off, fetches(folder))}")
    for name, reason in problems.items():
        print(f"not measured: {name}: {reason}")


def goals(
    read: dict[str, Row],
    transport: dict[str, Row],
    sizes: dict[str, float],
    starts: dict[str, list[tuple[float, float]]],
    off: dict[str, tuple[float, float]],
    fetched: float,
) -> str:
    verified, least = "ours, indexed, verified", "plain pread loop"
    window, prefix = off["ours"]
    resumed = max(cpu for _, cpu in starts["ours, plan to the share of a step"])
    lines = [
        GOALS_HEAD,
        goal(
            "indexed, no checksum / pread loop",
            ratio(read, "ours, indexed, no checksum", least),
            1.15,
        ),
        goal("indexed, verified / webdataset", ratio(read, verified, "webdataset"), 0.6),
        goal("worker to trainer, ms per clip", transport_ms(transport, SHARED), 0.5),
        goal("index, bytes per record", sizes["ours (.idx)"], 24),
        goal("shard fetches per shard", fetched, 1.05),
        goal("resume anywhere, CPU ms to the share of a step", resumed, 50),
        goal("rates, samples off in any window of 100", window, 2),
        goal("rates, samples off in any prefix", prefix, 0.75),  # 1 - 1 / (2m - 2), 3 tasks
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", type=Path, default=ROOT / ".bench-venv")
    parser.add_argument("--records", type=int, default=480)
    parser.add_argument("--clips", type=int, default=12, help="different clips among the records")
    parser.add_argument("--decoded", type=int, default=96, help="clips through the whole pipeline")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    reexecute(args.env)
    print(machine())
    work = Path(tempfile.mkdtemp(prefix="stream-"))
    try:
        run(work, args)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
