"""Reading, transport and the whole pipeline against other loaders: python benchmarks/stream.py

One dataset of synthetic clips in all formats, on local disk (page cache warm). Peers: webdataset's
own pipeline, Megatron-Energon, mosaicml-streaming. docs/benchmarks.md holds a run and the goals.
"""

import argparse
import io
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from peers import GOALS_HEAD, ROOT, Row, goal, load, machine, measure, ratio, reexecute, table
from video import COUNT, SIZE, make_clips

RATES = (Fraction(2, 5), Fraction(1, 5), Fraction(2, 5))


def build(folder: Path, clips: list[bytes], records: int) -> None:
    """Our shard folder; its tars are what webdataset and Energon read, too."""
    from data_shards.build import build_shards
    from data_shards.record import Record, Video
    from data_shards.tasks import Task
    from data_shards.video import count_frames

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


def readers(
    folder: Path, work: Path, problems: dict[str, str]
) -> tuple[dict[str, Callable[[], int]], dict[str, float]]:
    """Cases that read every record once, and the bytes per record that an index takes."""
    from data_shards.index import ENTRY_DTYPE, ShardIndex
    from data_shards.reader import ShardReader

    index = ShardIndex.load(folder)
    tars = [folder / shard.name for shard in index.shards]
    everything = [index.address(number) for number in range(index.num_records)]
    shuffled = random.Random(0).sample(everything, len(everything))
    spans = [
        (shard, int(index.entries(shard)[slot]["offset"]), int(index.entries(shard)[slot]["size"]))
        for shard, slot in everything
    ]
    reader = ShardReader(folder, index)
    files = [os.open(tar, os.O_RDONLY) for tar in tars]
    buffer = bytearray(2**20)

    def raw() -> int:
        for tar in tars:
            with tar.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        return len(everything)

    def indexed() -> int:
        for shard, slot in everything:
            entry = index.entries(shard)[slot]
            reader.blocks(shard, int(entry["offset"]), int(entry["size"]))
        return len(everything)

    cases: dict[str, Callable[[], int]] = {
        "raw read, 1 MiB at a time": raw,
        "plain pread loop": pread_one_by_one(files, spans),
        "ours, indexed, no checksum": indexed,
        "ours, indexed, verified": lambda: sum(1 for a in everything if reader.members(*a)),
        "ours, verified, shuffled": lambda: sum(1 for a in shuffled if reader.members(*a)),
        "ours, verified, every field checked": lambda: sum(
            1 for a in everything if reader.read(*a)
        ),
    }
    sizes = {"ours (.idx)": float(ENTRY_DTYPE.itemsize)}
    add_peers(cases, sizes, folder, work, tars, problems)
    return cases, sizes


def pread_one_by_one(files: list[int], spans: list[tuple[int, int, int]]) -> Callable[[], int]:
    """The least that reading record by record can cost: no index, no checks."""

    def run() -> int:
        for shard, offset, size in spans:
            os.pread(files[shard], size, offset)
        return len(spans)

    return run


def add_peers(
    cases: dict[str, Callable[[], int]],
    sizes: dict[str, float],
    folder: Path,
    work: Path,
    tars: list[Path],
    problems: dict[str, str],
) -> None:
    """Cases and index sizes of the peers that are here."""
    webdataset = load("webdataset", problems)
    if webdataset is not None:
        names = [str(tar) for tar in tars]
        cases["webdataset"] = lambda: sum(
            1 for _ in webdataset.WebDataset(names, shardshuffle=False, empty_check=False)
        )
    streaming = load("streaming", problems)
    if streaming is not None:
        mds = work / "mds"
        write_mds(streaming, mds, folder)
        dataset = streaming.StreamingDataset(local=str(mds), batch_size=1, shuffle=False)
        cases["mosaicml-streaming"] = lambda: sum(1 for n in range(len(dataset)) if dataset[n])
        sizes["mosaicml-streaming (index.json and shard headers)"] = (
            (mds / "index.json").stat().st_size + 4 * (len(dataset) + 1) * 1.0
        ) / len(dataset)
    energon = load("megatron.energon", problems)
    if energon is not None:
        try:
            cases["Megatron-Energon"] = energon_case(energon, work / "energon", tars, sizes)
        except Exception as error:
            problems["megatron.energon"] = f"{type(error).__name__}: {str(error)[:200]}"


def write_mds(streaming: Any, out: Path, folder: Path) -> None:
    from data_shards.reader import iter_plain

    with streaming.MDSWriter(out=str(out), columns={"json": "bytes", "mp4": "bytes"}) as writer:
        for _, members in iter_plain(folder):
            writer.write(members)


def energon_case(
    energon: Any, folder: Path, tars: list[Path], sizes: dict[str, float]
) -> Callable[[], int]:
    """Energon on the same tars: `energon prepare`, then its loader without workers."""
    folder.mkdir()
    for tar in tars:
        os.link(tar, folder / tar.name)
    command = Path(sys.executable).with_name("energon")
    arguments = ["prepare", str(folder), "--split-ratio", "1,0,0", "--non-interactive"]
    crude = ["--sample-type", "CrudeWebdataset"]
    done = subprocess.run(
        [str(command), *arguments, *crude], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"energon prepare: {(done.stderr or done.stdout).strip()[-160:]}")
    count = sum(1 for _ in open_energon(energon, folder))
    meta = sum(path.stat().st_size for path in (folder / ".nv-meta").rglob("*") if path.is_file())
    sizes["Megatron-Energon (.nv-meta)"] = meta / count
    return lambda: sum(1 for _ in itertools.islice(open_energon(energon, folder), count))


def open_energon(energon: Any, folder: Path) -> Any:
    class Raw(energon.DefaultTaskEncoder):
        """Bytes as they are."""

        cookers = (energon.Cooker(energon.stateless(lambda sample: sample)),)
        decoder = None

        def encode_sample(self, sample: Any) -> Any:
            return sample

        def batch(self, samples: Any) -> Any:
            return samples

    return energon.get_savable_loader(
        energon.get_val_dataset(
            folder,
            split_part="train",
            worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
            batch_size=1,
            task_encoder=Raw(),
        )
    )


# ------------------------------------------------------------------------------------- transport


class Frames(torch.utils.data.Dataset[Any]):
    """A step's frames, already decoded: only their way to the trainer is measured."""

    def __init__(self, steps: int, samples: int) -> None:
        self._steps = steps
        self._frames = np.random.default_rng(0).integers(0, 255, (samples, COUNT, SIZE, SIZE, 3))
        self._frames = self._frames.astype(np.uint8)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> torch.Tensor:
        return torch.stack([torch.from_numpy(clip) for clip in self._frames])

    def into(self, step: int, desk: Any) -> np.ndarray:
        shape = self._frames.shape
        flat = self._frames.reshape(-1, *shape[2:])
        out = desk.allocate(flat.shape)
        np.concatenate([clip for clip in self._frames], out=out)
        return out


def transports() -> dict[str, Callable[[], int]]:
    from emoverse.workers import PoolOptions, WorkerPool

    steps, samples = 250, 4
    data = Frames(steps, samples)
    step_bytes = samples * COUNT * SIZE * SIZE * 3

    def ring() -> int:
        for frames in WorkerPool(
            data.into, range(steps), PoolOptions(workers=2, step_bytes=step_bytes)
        ):
            assert frames.shape[-1] == 3
        return steps * samples

    def loader() -> int:
        for frames in torch.utils.data.DataLoader(
            data, batch_size=None, num_workers=2, multiprocessing_context="fork"
        ):
            assert frames.shape[-1] == 3
        return steps * samples

    return {"ours, reused shared ring": ring, "torch DataLoader, stacked": loader}


# -------------------------------------------------------------------------------- whole pipeline


def pipelines(folder: Path, limit: int, problems: dict[str, str]) -> dict[str, Callable[[], int]]:
    """Clips on disk to frames in the trainer, two workers, four clips per step."""
    from data_shards.index import ShardIndex
    from data_shards.reader import ShardReader
    from data_shards.stream import ViewOptions, decode_view
    from emoverse.workers import PoolOptions, WorkerPool

    index = ShardIndex.load(folder)
    reader = ShardReader(folder, index)
    order = random.Random(0).sample(range(index.num_records), min(limit, index.num_records))
    steps = len(order) // 4

    def ours(resize: str) -> Callable[[], int]:
        view = ViewOptions(num_frames=COUNT, image_size=SIZE, resize=resize)  # type: ignore[arg-type]

        def make(step: int, desk: Any) -> np.ndarray:
            records = [reader.read(*index.address(n)) for n in order[4 * step : 4 * step + 4]]
            clips = [decode_view(record, "clip", view) for record in records]
            return np.concatenate(clips, out=desk.allocate((4 * COUNT, SIZE, SIZE, 3)))

        def run() -> int:
            options = PoolOptions(workers=2, step_bytes=4 * COUNT * SIZE * SIZE * 3)
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

    from data_shards.video import clip_indices

    with av.open(io.BytesIO(clip)) as container:
        container.streams.video[0].thread_type = "NONE"
        frames = list(container.decode(video=0))
    cv2.setNumThreads(1)
    wanted = [frames[j].to_ndarray(format="rgb24") for j in clip_indices(len(frames), COUNT)]
    return np.stack(
        [cv2.resize(rgb, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC) for rgb in wanted]
    )


# ------------------------------------------------------------------- resume, rates, shard fetches


def plan_of(folder: Path, batch: int = 64) -> tuple[Any, Any]:
    from data_shards.index import ShardIndex
    from data_shards.plan import StageSpec, plan_stages
    from data_shards.sampler import WeightedTaskSampler
    from data_shards.tasks import Task

    index = ShardIndex.load(folder)
    rates = tuple(zip((Task.MSA, Task.ER, Task.FER), RATES, strict=True))
    spec = StageSpec(name="stage1", rates=rates, epochs=2, rest_of=())
    stage = plan_stages(index, [spec], seed=0).stages["stage1"]
    return index, WeightedTaskSampler(stage, index, global_batch_size=batch, rank=0, world_size=8)


def resume_ms(folder: Path, share: float) -> tuple[float, float]:
    """ms from nothing to this rank's share of a step, and to its first decoded sample."""
    from data_shards.reader import ShardReader
    from data_shards.stream import StepStream, ViewOptions

    plans, samples = [], []
    for _ in range(5):
        begun = time.perf_counter()
        index, sampler = plan_of(folder)
        step = int(share * (sampler.num_steps - 1))
        slots = sampler.share(sampler.load_state(sampler.state(step)))
        plans.append(1e3 * (time.perf_counter() - begun))
        view = ViewOptions(num_frames=COUNT, image_size=SIZE)
        stream = StepStream(sampler, ShardReader(folder, index), view)
        stream._sample(slots[0])
        samples.append(1e3 * (time.perf_counter() - begun))
    return median(plans), median(samples)


def window_error(tasks: list[int]) -> float:
    """Worst deviation from the rates in any 100 consecutive samples, in samples."""
    worst = 0.0
    for task, rate in enumerate(RATES):
        counts = np.concatenate([[0], np.cumsum(np.array(tasks) == task)])
        worst = max(worst, np.abs(counts[100:] - counts[:-100] - 100 * float(rate)).max())
    return worst


def rates(problems: dict[str, str]) -> dict[str, float]:
    """Samples off in the worst window of 100, over 15,000 samples."""
    from data_shards.rates import TaskOrder
    from data_shards.tasks import Task

    order = TaskOrder(dict(zip((Task.MSA, Task.ER, Task.FER), RATES, strict=True)))
    places = {task: number for number, task in enumerate(order.tasks)}
    found = {"ours": window_error([places[order.task_at(k)] for k in range(15_000)])}
    if (webdataset := load("webdataset", problems)) is not None:
        random.seed(0)
        endless = [itertools.repeat(number) for number in range(3)]
        mixed = webdataset.RandomMix(endless, [float(rate) for rate in RATES])
        found["webdataset, RandomMix"] = window_error(list(itertools.islice(mixed, 15_000)))
    return found


def fetches(folder: Path) -> float:
    """Shard fetches per shard in one epoch, through a cache of two blocks."""
    _, sampler = plan_of(folder)
    stage = sampler.stage_plan
    cache: OrderedDict[int, None] = OrderedDict()
    fetched, used = 0, set()
    for position in range(stage.samples_per_epoch):
        shard = stage.at(position).shard
        used.add(shard)
        fetched += shard not in cache
        cache[shard] = None
        cache.move_to_end(shard)
        if len(cache) > 32:
            cache.popitem(last=False)
    return fetched / len(used)


def run(work: Path, args: argparse.Namespace) -> None:
    problems: dict[str, str] = {}
    clips = make_clips([(240, 320), (360, 480), (360, 640)], args.clips, 8)
    folder = work / "shards"
    build(folder, clips, args.records)
    kib = sum(tar.stat().st_size for tar in folder.glob("*.tar")) / args.records / 1024
    cases, sizes = readers(folder, work, problems)
    read = measure(cases, args.rounds)
    print(f"\n**Reading** {args.records} records of {kib:.0f} KiB in 16 shards\n")
    print(table(read, "record", "plain pread loop"))
    transport = measure(transports(), args.rounds)
    print("\n**Worker to trainer**, 8 frames of 448 x 448, two workers, four clips per step\n")
    print(table(transport, "clip"))
    whole = measure(pipelines(folder, args.decoded, problems), max(args.rounds // 2, 1))
    print("\n**Whole pipeline**, clips on disk to frames in the trainer, two workers\n")
    print(table(whole, "clip", "ours, exact"))
    print("\n| index | bytes per record |\n|---|---|")
    print("\n".join(f"| {name} | {size:.0f} |" for name, size in sizes.items()))
    print("\n| start at | share of the step, ms | first decoded sample, ms |\n|---|---|---|")
    starts = {share: resume_ms(folder, share) for share in (0.0, 0.01, 0.99)}
    for share, (planned, sample) in starts.items():
        print(f"| {share:.0%} | {planned:.1f} | {sample:.1f} |")
    off = rates(problems)
    print("\n| worst window of 100 samples at 2/5, 1/5, 2/5 | samples off |\n|---|---|")
    print("\n".join(f"| {name} | {value:.1f} |" for name, value in off.items()))
    print(f"\n{goals(read, transport, sizes, starts, off, fetches(folder))}")
    for name, reason in problems.items():
        print(f"not measured: {name}: {reason}")


def goals(
    read: dict[str, Row],
    transport: dict[str, Row],
    sizes: dict[str, float],
    starts: dict[float, tuple[float, float]],
    off: dict[str, float],
    fetched: float,
) -> str:
    verified, least = "ours, indexed, verified", "plain pread loop"
    lines = [
        GOALS_HEAD,
        goal(
            "indexed, no checksum / pread loop",
            ratio(read, "ours, indexed, no checksum", least),
            1.15,
        ),
        goal("indexed, verified / webdataset", ratio(read, verified, "webdataset"), 0.6),
        goal("worker to trainer, ms per clip", transport["ours, reused shared ring"].ms, 0.5),
        goal("index, bytes per record", sizes["ours (.idx)"], 24),
        goal("shard fetches per shard", fetched, 1.05),
        goal(
            "resume, ms (to the share of a step)",
            max(planned for planned, _ in starts.values()),
            50,
        ),
        goal("rates, samples off in any window of 100", off["ours"], 2),
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
