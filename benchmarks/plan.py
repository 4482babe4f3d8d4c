"""What the plan costs at any size, by simulation: python benchmarks/plan.py [--records N]

A corpus known by arithmetic (no files): 1e9 records in 1e6 shards on 1,024 ranks by default.
Prints memory and CPU time to the first step of a rank, to a step anywhere, shard opens per sample,
and how well block sizes shuffle. docs/benchmarks.md holds a run.
"""

import argparse
import json
import platform
import resource
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from fractions import Fraction
from statistics import median

import numpy as np
from numpy.typing import NDArray

from data_shards.plan.plan import StagePlan, StageSpec, plan_stages
from data_shards.plan.sampler import WeightedTaskSampler
from data_shards.tasks import TASKS, mask_of

MSA, ER, FER, ERI, ECPE = TASKS
FACES, CAUSES, REASONS = mask_of([MSA, ER, FER]), mask_of([ECPE]), mask_of([MSA, ER, ERI])


class Arithmetic:
    """Shards of equal size with three classes of records; nothing is stored."""

    fingerprint = "arithmetic"

    def __init__(self, records: int, shards: int) -> None:
        self.num_shards, per_shard = shards, records // shards
        causes, reasons = 3 * per_shard // 10, per_shard // 5
        self._counts = {FACES: per_shard - causes - reasons, CAUSES: causes, REASONS: reasons}
        self._entries = np.zeros(per_shard, dtype=[("text_chars", "<u2")])
        self._entries["text_chars"] = np.arange(per_shard) * 7919 % 400

    def class_counts(self, shard: int | None = None) -> Mapping[int, int]:
        if shard is None:
            return {mask: count * self.num_shards for mask, count in self._counts.items()}
        return self._counts

    def slots(self, shard: int, mask: int) -> NDArray[np.int64]:
        before = 0
        for other, count in self._counts.items():
            if other == mask:
                return np.arange(before, before + count)
            before += count
        raise AssertionError(mask)

    def entries(self, shard: int) -> NDArray[np.void]:
        return self._entries


def spec(name: str = "stage", **changes: object) -> StageSpec:
    rates = ((MSA, Fraction(1, 20)), *((task, Fraction(19, 60)) for task in (ER, ERI, ECPE)))
    settings = {"rates": rates, "epochs": 2, "shortage": "repeat", **changes}
    return StageSpec(name=name, **settings)  # type: ignore[arg-type]


def memory_mib() -> float:
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20


def scale(records: int, shards: int, ranks: int, batch: int) -> dict[str, float]:
    """One rank of many: from nothing to its first share, then to shares anywhere."""
    table, before, began = Arithmetic(records, shards), memory_mib(), time.process_time()
    stage = plan_stages(table, [spec()], seed=1).stages["stage"]
    planned = time.process_time()
    sampler = WeightedTaskSampler(
        stage, table, global_batch_size=batch, rank=ranks // 2, world_size=ranks
    )
    sampler.share(0)
    first = time.process_time()
    draws = np.random.default_rng(0).integers(0, sampler.num_steps, 40).tolist()
    seeks = [timed(sampler.share, step) for step in draws]
    state = json.dumps(sampler.state(draws[0]))
    resumed = [timed(lambda s: sampler.share(sampler.load_state(s)), json.loads(state))]
    at = [timed(stage.at, p) for p in range(stage.num_samples // 2, stage.num_samples // 2 + 2000)]
    return {
        "plan_s": planned - began,
        "first_share_s": first - planned,
        "seek_to_a_step_ms": 1e3 * median(seeks),
        "seek_to_a_step_worst_ms": 1e3 * max(seeks),
        "resume_ms": 1e3 * resumed[0],
        "at_us": 1e6 * median(at),
        "memory_mib": memory_mib() - before,
        "state_bytes": float(len(state)),
    }


def timed(call: object, argument: object) -> float:
    began = time.process_time()
    call(argument)  # type: ignore[operator]
    return time.process_time() - began


def opens(stage: StagePlan, block_shards: int, samples: int) -> tuple[float, float]:
    """Shard opens per shard used (1 is the least) and per sample, through a cache of two blocks.

    Counted from the middle of the epoch, so the blocks at both ends are only partly used.
    """
    cache: OrderedDict[int, None] = OrderedDict()
    used: Counter[int] = Counter()
    start = stage.samples_per_epoch // 2
    for position in range(start, start + samples):
        shard = stage.at(position).shard
        used[shard] += shard not in cache
        cache[shard] = None
        cache.move_to_end(shard)
        if len(cache) > 2 * block_shards:
            cache.popitem(last=False)
    return sum(used.values()) / len(used), sum(used.values()) / samples


def mixing(block_shards: int, *, random_labels: bool) -> float:
    """Deviation of a batch's mean label against independent draws; 1.0 is ideal.

    Worst case: 2,000 shards of 500 records whose label is the same within a shard; batches of 64.
    """
    table = Arithmetic(2_000 * 500, 2_000)
    stage = plan_stages(
        table, [spec(rates=((ER, Fraction(1)),))], seed=3, block_shards=block_shards
    ).stages["stage"]
    labels = np.linspace(0, 1, 2_000)
    if random_labels:
        labels = np.random.default_rng(1).permutation(labels)
    count = 64 * 1_500
    start = stage.samples_per_epoch // 3
    seen = labels[[stage.at(p).shard for p in range(start, start + count)]].reshape(-1, 64)
    return float(seen.mean(axis=1).std() / (labels.std() / 8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=10**9)
    parser.add_argument("--shards", type=int, default=10**6)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2048)
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    print(f"{args.records:,} records, {args.shards:,} shards, {args.ranks:,} ranks")
    for name, value in scale(args.records, args.shards, args.ranks, args.batch).items():
        print(f"| {name} | {value:,.3g} |")
    print("| block_shards | opens per shard | opens per sample | mixing, random | mixing, sorted |")
    print("|---|---|---|---|---|")
    table = Arithmetic(330 * 100, 330)
    for block in (4, 16, 64):
        stage = plan_stages(table, [spec()], seed=1, block_shards=block).stages["stage"]
        per_shard, per_sample = opens(stage, block, 15_000)
        mixed = [mixing(block, random_labels=random) for random in (True, False)]
        print(f"| {block} | {per_shard:.2f} | {per_sample:.4f} | {mixed[0]:.2f} | {mixed[1]:.2f} |")


if __name__ == "__main__":
    main()
