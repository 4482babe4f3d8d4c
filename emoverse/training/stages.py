"""What a stage is to the plan, and how one stage hands over to the next.

In: the config, the shard index. Out: the plan of the whole run, the stages to train in order, and
what each of them starts from. Where: between the config and the training loop; no torch.

The hand-over: a stage passes on what was trained, adapters and projector. The next one trains the
adapters further (`adapter: continue`) or merges them into the base and begins new ones (`merge`).
Optimiser moments start anew unless `optimizer: continue` asks for them; the learning-rate schedule
and the position always do, since the tasks, their rates and the records have changed.
"""

from collections.abc import Sequence
from pathlib import Path

from data_shards.plan.plan import Plan, StageSpec, plan_stages
from data_shards.shards.index import ShardIndex
from emoverse.config.errors import did_you_mean
from emoverse.config.schema import Config

BASE = "base"
DONE = "DONE"


def stage_specs(config: Config) -> tuple[StageSpec, ...]:
    """The stages as the plan wants them, in the order of training."""
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
        for name, stage in config.stages.items()
    )


def run_plan(config: Config, index: ShardIndex) -> Plan:
    """The plan of all stages together.

    It does not depend on which stages are trained now, so a stage trained alone sees the same
    samples as in a run of all.
    """
    return plan_stages(
        index,
        stage_specs(config),
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


def merged_into(config: Config, stage: str) -> tuple[str, ...]:
    """The earlier stages whose adapters are merged into the base of `stage`, in turn."""
    section = config.stages[stage]
    if section.start_from == BASE:
        return ()
    before = merged_into(config, section.start_from)
    return (*before, section.start_from) if section.adapter == "merge" else before
