"""What a stage is: its samples in the plan, its folder, and the stage whose weights it starts from.

In: the config, the shard index. Out: the plan of the whole run, the stages to train in order, and
the folder of the stage that each of them starts from. No torch.

A stage hands over what it trained: adapters and projector. The next stage trains the same adapters
further (`adapter: continue`) or merges them into the base and adds new ones (`adapter: merge`).
Optimiser moments are reset unless `optimizer: continue`. The learning-rate schedule and the
position in the data always restart, since tasks, rates and records differ between stages.
`run_dir/lineage.py` reads and checks these weights.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from data_shards.plan.plan import Plan, StageSpec, plan_stages
from data_shards.shards.index import ShardIndex
from emoverse.config.errors import did_you_mean
from emoverse.config.schema import Config, StageSection

BASE = "base"
DONE = "DONE"


def stage_specs(stages: Mapping[str, StageSection]) -> tuple[StageSpec, ...]:
    """The stages as input of the plan, in the order of training."""
    return tuple(
        StageSpec(
            name=name,
            rates=tuple(stage.rates.items()),
            take=stage.pool.take,
            rest_of=stage.pool.rest_of or (),
            epochs=stage.epochs,
            shortage=stage.shortage,
            epoch_tasks=stage.epoch_tasks,
        )
        for name, stage in stages.items()
    )


def run_plan(config: Config, index: ShardIndex) -> Plan:
    """The plan of all stages.

    It does not depend on which stages are trained now, so a stage trained alone sees the same
    samples as in a run of all stages.
    """
    return plan_stages(
        index,
        stage_specs(config.stages),
        seed=config.run.seed,
        block_shards=config.data.block_shards,
    )


def stages_to_train(config: Config, only: Sequence[str] | None) -> tuple[str, ...]:
    """The chosen stages, or all of them, in the order of the config.

    Raises ValueError if a chosen stage is not in the config.
    """
    names = tuple(config.stages)
    for name in only or ():
        if name not in names:
            raise ValueError(
                f"--stage {name}: the config has no such stage{did_you_mean(name, names)}; "
                f"it has {', '.join(names)}"
            )
    return tuple(name for name in names if not only or name in only)


def stage_dir(config: Config, stage: str) -> Path:
    """The folder of a stage in the run directory."""
    return config.run.run_dir / stage


def starting_stage(config: Config, stage: str) -> Path | None:
    """The folder of the finished stage whose weights `stage` starts with, None for the base.

    Raises FileNotFoundError if that stage is not finished.
    """
    start = config.stages[stage].start_from
    if start == BASE:
        return None
    folder = stage_dir(config, start)
    if not (folder / DONE).is_file():
        raise FileNotFoundError(
            f"stages.{stage}.start_from: {start} is not finished, {folder / DONE} does not exist; "
            f"train it first (--stage {start}) or check run.run_dir = {config.run.run_dir}"
        )
    return folder


def merged_into(stages: Mapping[str, StageSection], stage: str) -> tuple[str, ...]:
    """The earlier stages whose adapters are merged into the base of `stage`, in order."""
    section = stages[stage]
    if section.start_from == BASE:
        return ()
    before = merged_into(stages, section.start_from)
    return (*before, section.start_from) if section.adapter == "merge" else before
