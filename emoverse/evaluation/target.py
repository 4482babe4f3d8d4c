"""What `emoverse evaluate TARGET` shall answer or score: a run, a checkpoint, a base, or a file.

A path, config files and overrides go in; a `Target` comes out, or an error that says what the path
lacks. Torch-free, so that a wrong path is reported at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_shards.files import write_atomically
from emoverse.config.schema import Config, load_config, to_yaml
from emoverse.training.stages import BASE

Kind = Literal["run", "checkpoint", "base", "predictions"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One thing to evaluate; `config` is None for a predictions file.

    states: names given by the user, () for the config's own list. checkpoint: this folder instead
    of the newest of its stage. out: the run directory that is written to.
    """

    kind: Kind
    path: Path
    config: Config | None
    states: tuple[str, ...]
    checkpoint: Path | None
    out: Path


def resolve(
    path: Path,
    *,
    configs: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    states: Sequence[str] = (),
    out: Path | None = None,
    config: Config | None = None,
) -> Target:
    """What `path` is, with its config.

    config: the one that an earlier call for the same path has returned, instead of reading it.

    Raises FileNotFoundError or ValueError (also ConfigError) with what to give instead.
    """
    if path.is_file() and path.suffix == ".jsonl":
        return Target(
            kind="predictions",
            path=path,
            config=None,
            states=(),
            checkpoint=None,
            out=out or path.parent,
        )
    if (path / "config.yaml").is_file():
        if configs:
            raise ValueError(
                f"{path} is a run directory with its own config.yaml; give overrides such as "
                f"evaluation.batch_size=8, but no config file ({configs[0]})"
            )
        return _run(path, "run", path, overrides, tuple(states), None, out, config)
    if (path / "trained.safetensors").is_file():
        return _checkpoint(path, configs, overrides, states, out, config)
    if _is_base(path):
        return _base(path, configs, overrides, states, out, config)
    raise FileNotFoundError(
        f"{path}: nothing to evaluate; give a run directory (holds config.yaml), a checkpoint "
        "folder (RUN/stage1/checkpoints/step_...), a folder in InternVL2's released layout (with a "
        "config file behind it), or a predictions .jsonl"
    )


def _run(
    path: Path,
    kind: Kind,
    run_dir: Path,
    overrides: Sequence[str],
    states: tuple[str, ...],
    checkpoint: Path | None,
    out: Path | None,
    config: Config | None,
) -> Target:
    return Target(
        kind=kind,
        path=path,
        config=config or load_config([run_dir / "config.yaml"], overrides),
        states=states,
        checkpoint=checkpoint,
        out=out or run_dir,
    )


def _checkpoint(
    path: Path,
    configs: Sequence[Path],
    overrides: Sequence[str],
    states: Sequence[str],
    out: Path | None,
    config: Config | None,
) -> Target:
    """RUN/STAGE/checkpoints/step_N; its answers go to RUN/eval/STAGE@step_N."""
    folder = path.resolve()
    run_dir, stage = folder.parents[2], folder.parents[1].name
    if states or configs:
        raise ValueError(f"{path} is one checkpoint; give neither --which nor config files with it")
    if not (run_dir / "config.yaml").is_file():
        raise FileNotFoundError(
            f"{run_dir / 'config.yaml'}: not found; a checkpoint is evaluated inside its run "
            "directory (RUN/stage1/checkpoints/step_...), which says what it was trained on"
        )
    return _run(path, "checkpoint", run_dir, overrides, (stage,), folder, out, config)


def _is_base(path: Path) -> bool:
    """A folder with InternVL2's config.json: a vision and a language model side by side."""
    file = path / "config.json"
    if not file.is_file():
        return False
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); download the folder again") from error
    return isinstance(content, dict) and {"vision_config", "llm_config"} <= content.keys()


def _base(
    path: Path,
    configs: Sequence[Path],
    overrides: Sequence[str],
    states: Sequence[str],
    out: Path | None,
    config: Config | None,
) -> Target:
    """A model as it was downloaded: the state `base` of a run that never trains."""
    if not configs and config is None:
        raise ValueError(
            f"{path} is a base model; name its config after it, such as "
            f"`emoverse evaluate {path} configs/emoverse_4b.yaml evaluation.shards=DIR`"
        )
    if set(states) - {BASE}:
        raise ValueError(f"--which {', '.join(states)}: a base model has no state but {BASE}")
    run_dir = out or Path("runs") / f"zero-shot-{path.resolve().name}"
    own = [f"model.base={path}", f"run.run_dir={run_dir}"]
    config = config or load_config(configs, [*overrides, *own])
    return Target(
        kind="base", path=path, config=config, states=(BASE,), checkpoint=None, out=run_dir
    )


def states_of(target: Target, log: Callable[[str], None]) -> list[str]:
    """States to evaluate: those given by name, else those of `evaluation.when` that are trained."""
    assert target.config is not None
    if target.states:
        return list(target.states)
    states = []
    for state in target.config.evaluation.when:
        if state == BASE or (target.path / state / "checkpoints").is_dir():
            states.append(state)
        else:
            log(f"{state}: not trained yet, left out")
    return states


def name_of(target: Target, state: str) -> str:
    """The folder of a state's answers below eval/."""
    return state if target.checkpoint is None else f"{state}@{target.checkpoint.name}"


def write_config(target: Target) -> None:
    """Write config.yaml beside a base's answers, so that `report` can read the folder as a run."""
    assert target.config is not None
    write_atomically(target.out / "config.yaml", to_yaml(target.config))
