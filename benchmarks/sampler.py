"""The order of samples: time to a place in it, rates in windows, how often shards are fetched.

In: a shard folder. Out: figures for `stream.py`. The plan at 1e9 records is in `plan.py`.
"""

import itertools
import os
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from peers import cpu_s, load

RATES = (Fraction(2, 5), Fraction(1, 5), Fraction(2, 5))
SHARES = (0.0, 0.01, 0.99)


def plan_of(folder: Path, batch: int = 64) -> tuple[Any, Any]:
    """(index, sampler of rank 0 of 8) of a stage with the rates above."""
    from data_shards.plan.plan import StageSpec, plan_stages
    from data_shards.plan.sampler import WeightedTaskSampler
    from data_shards.shards.index import ShardIndex
    from data_shards.tasks import Task

    index = ShardIndex.load(folder)
    rates = tuple(zip((Task.MSA, Task.ER, Task.FER), RATES, strict=True))
    spec = StageSpec(name="stage1", rates=rates, epochs=2, rest_of=())
    stage = plan_stages(index, [spec], seed=0).stages["stage1"]
    return index, WeightedTaskSampler(stage, index, global_batch_size=batch, rank=0, world_size=8)


def our_starts(folder: Path, frames: int, size: int) -> dict[str, Callable[[float], object]]:
    """From nothing (index loaded, stage planned, state read) to a place in the stage."""
    from data_shards.shards.reader import ShardReader
    from data_shards.stream import StepStream, ViewOptions

    def share_at(share: float) -> tuple[Any, Any, Any]:
        index, sampler = plan_of(folder)
        step = int(share * (sampler.num_steps - 1))
        return index, sampler, sampler.load_state(sampler.state(step))

    def slots(share: float) -> object:
        _, sampler, step = share_at(share)
        return sampler.share(step)

    def first_bytes(share: float) -> object:
        index, sampler, step = share_at(share)
        placement = sampler.share(step)[0].placement
        return ShardReader(folder, index).members(placement.shard, placement.slot)

    def first_batch(share: float) -> object:
        index, sampler, step = share_at(share)
        view = ViewOptions(num_frames=frames, image_size=size)
        return StepStream(sampler, ShardReader(folder, index), view)[step]

    return {
        "ours, plan to the share of a step": slots,
        "ours, first record, verified": first_bytes,
        "ours, first batch (8 clips decoded)": first_batch,
    }


def forget_pages(*folders: Path) -> None:
    """Drop what the page cache holds of these files, so that the next read goes to the disk."""
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def measure_starts(
    starts: dict[str, Callable[[float], object]], work: Path, rounds: int, problems: dict[str, str]
) -> dict[str, list[tuple[float, float]]]:
    """Per name the (wall, CPU) ms of a cold start at 0 and of warm ones at each of SHARES."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, start in starts.items():
        try:
            found[name] = [
                timed(start, share, rounds, work if cold else None)
                for cold, share in ((True, 0.0), *((False, share) for share in SHARES))
            ]
        except Exception as error:  # a peer that fails is a finding, not an end
            problems[f"start of {name}"] = f"{type(error).__name__}: {str(error)[:150]}"
    return found


def timed(
    start: Callable[[float], object], share: float, rounds: int, cold: Path | None
) -> tuple[float, float]:
    """Medians of wall and CPU ms; `cold` names the folder to forget before each call."""
    walls, cpus = [], []
    for _ in range(rounds):
        if cold is not None:
            forget_pages(cold)
        wall, cpu = time.perf_counter(), cpu_s()
        start(share)
        walls.append(1e3 * (time.perf_counter() - wall))
        cpus.append(1e3 * (cpu_s() - cpu))
    return median(walls), median(cpus)


def starts_table(found: dict[str, list[tuple[float, float]]]) -> str:
    """Markdown, wall and CPU ms in each cell."""
    heads = ["cold", *(f"{share:.0%}" for share in SHARES)]
    lines = [f"| wall / CPU ms | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, cells in found.items():
        lines.append(f"| {name} | {' | '.join(f'{w:.3g} / {c:.3g}' for w, c in cells)} |")
    return "\n".join(lines)


def window_error(tasks: list[int]) -> float:
    """Worst deviation from the rates in any 100 consecutive samples, in samples."""
    worst = 0.0
    for task, rate in enumerate(RATES):
        counts = np.concatenate([[0], np.cumsum(np.array(tasks) == task)])
        worst = max(worst, np.abs(counts[100:] - counts[:-100] - 100 * float(rate)).max())
    return worst


def prefix_error(tasks: list[int]) -> float:
    """Worst deviation from the rates in any prefix, in samples."""
    places = np.arange(1, len(tasks) + 1)
    return max(
        float(np.abs(np.cumsum(np.array(tasks) == task) - places * float(rate)).max())
        for task, rate in enumerate(RATES)
    )


def rate_errors(work: Path, problems: dict[str, str]) -> dict[str, tuple[float, float]]:
    """Samples off in the worst window of 100 and in the worst prefix, over 15,000 samples."""
    from data_shards.plan.rates import TaskOrder
    from data_shards.tasks import Task

    order = TaskOrder(dict(zip((Task.MSA, Task.ER, Task.FER), RATES, strict=True)))
    places = {task: number for number, task in enumerate(order.tasks)}
    drawn = {"ours": [places[order.task_at(k)] for k in range(15_000)]}
    if (webdataset := load("webdataset", problems)) is not None:
        random.seed(0)
        endless = [itertools.repeat(number) for number in range(3)]
        mixed = webdataset.RandomMix(endless, [float(rate) for rate in RATES])
        drawn["webdataset, RandomMix"] = list(itertools.islice(mixed, 15_000))
    if (streaming := load("streaming", problems)) is not None:
        try:
            drawn["mosaicml-streaming, proportions"] = mixed_by_streaming(streaming, work)
        except Exception as error:  # a peer that fails is a finding, not an end
            problems["rates of mosaicml-streaming"] = f"{type(error).__name__}: {str(error)[:150]}"
    return {name: (window_error(tasks), prefix_error(tasks)) for name, tasks in drawn.items()}


def mixed_by_streaming(streaming: Any, work: Path) -> list[int]:
    """Three streams with proportions, shuffled; each sample is the number of its stream."""
    streams = []
    for task, rate in enumerate(RATES):
        folder = work / f"stream{task}"
        with streaming.MDSWriter(out=str(folder), columns={"task": "int"}) as writer:
            for _ in range(int(15_000 * rate)):
                writer.write({"task": task})
        streams.append(streaming.Stream(local=str(folder), proportion=float(rate)))
    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(
        streams=streams, batch_size=64, shuffle=True, shuffle_seed=0, epoch_size=15_000
    )
    return [int(sample["task"]) for sample in dataset]


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
