"""The verb `ablate`: the paper's ablations from one config, here or as a job array, and the tables.

In: a config and the overlays of configs/ablations/, one per variant. Out: HOME/VARIANT/ run
directories, HOME/ablations.json and ablations.html; HOME is the config's run_dir. Every step is an
`emoverse` command that resumes, so the same command resumes after a kill.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_shards.files import write_atomically
from emoverse.config.errors import did_you_mean
from emoverse.config.schema import Config, load_config
from emoverse.paper.ablation_page import render_ablations
from emoverse.paper.ablation_tables import ablation_json, ablation_text
from emoverse.paper.tables import TABLES, states_of, variants
from launch.exit_codes import STOPPED
from launch.subcommands import SubcommandError, run_subcommand
from launch.verb_tools import add_json, config_words, print_result

BASE, STAGES = "base", ("stage1", "stage2")
NUMBERS = tuple(table.number for table in TABLES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One run: its config, and its `train` and `evaluate` commands as words."""

    name: str
    config: Config
    stages: tuple[str, ...]  # to train
    train: tuple[str, ...]
    evaluate: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config, which variants, and where they run."""
    parser.add_argument(
        "config",
        nargs="+",
        metavar="CONFIG|KEY=VALUE",
        help="the main run as for train; the variants are overlays on it",
    )
    parser.add_argument(
        "--table",
        action="append",
        choices=NUMBERS,
        help="only the runs of this table of the paper (may be given several times)",
    )
    parser.add_argument(
        "--variant", action="append", metavar="NAME", help="only this overlay (repeatable)"
    )
    parser.add_argument(
        "--overlays",
        type=Path,
        metavar="DIR",
        help="folder of the overlays (default: ablations/ beside CONFIG)",
    )
    parser.add_argument("--parallel", type=int, default=1, help="variants trained at a time")
    parser.add_argument(
        "--cluster",
        type=Path,
        metavar="FILE",
        help="submit the variants as a job array there instead; collect later with --collect",
    )
    parser.add_argument(
        "--collect", action="store_true", help="only make the tables of what is evaluated"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Train, evaluate and collect; print the tables."""
    return print_result(ablate(args), args, report_text)


def ablate(args: argparse.Namespace) -> dict[str, Any]:
    """Train, evaluate and collect; returns the tables, or the commands with --dry-run.

    Raises ValueError and FileNotFoundError for wrong input, before anything is trained.
    """
    if args.parallel < 1:
        raise ValueError(f"--parallel: must be 1 or more, found {args.parallel}")
    paths, overrides = config_words(args.config)
    tables = tuple(args.table or ())
    home = load_config(paths, overrides).run.run_dir
    chosen = _chosen(tables, args.variant)
    plans = [] if args.collect else plan_variants(args, paths, overrides, home, chosen, tables)
    if args.dry_run:
        commands = [words for plan in plans for words in (plan.train, plan.evaluate)]
        return {"home": str(home), "commands": [list(words) for words in commands], "ok": True}
    if args.cluster is not None and not args.collect:
        overlays = [str(overlay_of(args, paths, name)) for name in chosen]
        words = [word for overlay in overlays for word in ("--variant", overlay)]
        run_subcommand(["launch", str(args.cluster), *args.config, *words], echo_to=sys.stderr)
        return {"home": str(home), "submitted": list(chosen), "ok": True}
    failed = _run_all(plans, args.parallel)
    try:
        result = {**ablation_json(home, tables), "failed": failed}
    except FileNotFoundError:
        if not failed:
            raise
        return {"home": str(home), "failed": failed, "ok": False}
    write_atomically(home / "ablations.json", json.dumps(result, indent=1) + "\n")
    write_atomically(home / "ablations.html", render_ablations(result))
    return {**result, "page": str(home / "ablations.html"), "ok": not failed}


def _chosen(tables: tuple[str, ...], named: Sequence[str] | None) -> tuple[str, ...]:
    known = variants()
    for name in named or ():
        if name not in known:
            raise ValueError(
                f"--variant {name}: no such variant{did_you_mean(name, known)}; the tables have "
                f"{', '.join(known)}"
            )
    return tuple(
        name
        for name in known
        if (not named or name in named) and (not tables or states_of(name, tables))
    )


def overlay_of(args: argparse.Namespace, paths: Sequence[Path], name: str) -> Path:
    """The overlay file of a variant. Raises FileNotFoundError."""
    folder = args.overlays or paths[0].parent / "ablations"
    path: Path = folder / f"{name}.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such overlay; give the folder with the variants' overlays by --overlays "
            "(the repository's is configs/ablations)"
        )
    return path


def plan_variants(
    args: argparse.Namespace,
    paths: Sequence[Path],
    overrides: Sequence[str],
    home: Path,
    chosen: Sequence[str],
    tables: tuple[str, ...],
) -> list[Variant]:
    """The commands of every variant, each config checked.

    Raises ValueError if a config is wrong, or has no stage of a name that the tables use.
    """
    plans = []
    for name in chosen:
        overlay = overlay_of(args, paths, name)
        own = [f"run.run_dir={home / name}"]
        config = load_config([*paths, overlay], [*overrides, *own])
        states = states_of(name, tables)
        missing = [state for state in states if state != BASE and state not in config.stages]
        if missing:
            raise ValueError(
                f"{overlay}: the tables show the state {missing[0]}, the config has the stages "
                f"{', '.join(config.stages)}; name the two stages {' and '.join(STAGES)}"
            )
        words = [*map(str, paths), str(overlay), *overrides, *own]
        words.append(f"run.name={config.run.name}-{name}")
        needed = _stages_needed(config, states)
        ranks = str(config.train.processes)
        if len(needed) < len(config.stages):
            words += [word for stage in needed for word in ("--stage", stage)]
        which = [word for state in states for word in ("--which", state)]
        plans.append(
            Variant(
                name=name,
                config=config,
                stages=tuple(needed),
                train=("train", *words),
                evaluate=("evaluate", str(home / name), *which, "--processes", ranks),
            )
        )
    return plans


def _stages_needed(config: Config, states: Sequence[str]) -> list[str]:
    """The stages behind some states: each one and what it starts from, in the config's order."""
    needed: set[str] = set()
    for state in states:
        while state != BASE:
            needed.add(state)
            state = config.stages[state].start_from
    return [stage for stage in config.stages if stage in needed]


def _run_all(plans: Sequence[Variant], parallel: int) -> dict[str, str]:
    """Run all variants; returns why some failed, by name. A failure does not stop the others.

    Raises SystemExit(75) when one was stopped: the same command resumes.
    """
    with ThreadPoolExecutor(parallel) as pool:
        futures = {plan.name: pool.submit(_run_variant, plan) for plan in plans}
    failed = {}
    for name, future in futures.items():
        error = future.exception()
        if isinstance(error, SubcommandError):
            if error.code == STOPPED:
                raise SystemExit(STOPPED)
            failed[name] = str(error)
        elif error is not None:
            raise error
    return failed


def _run_variant(plan: Variant) -> None:
    folder = plan.config.run.run_dir
    _share(plan, folder.parent)
    for words in (plan.evaluate,) if _is_trained(plan) else (plan.train, plan.evaluate):
        log_file = folder / f"ablate-{words[0]}.log"
        run_subcommand(words, log_file=log_file, echo_to=sys.stderr)


def _is_trained(plan: Variant) -> bool:
    """Whether all its stages are finished, so that no ranks need to start.

    False for stages that were trained with other settings: the training refuses them.
    """
    from emoverse.training.stage_build import is_done

    try:
        return all(is_done(plan.config, stage) for stage in plan.stages)
    except ValueError:
        return False


def _share(plan: Variant, home: Path) -> None:
    """Reuse what variants have in common: frozen features, and stages that are equal.

    A stage is taken from any variant that has finished the same training; t1 and t3 often begin
    with the first stage of m2se. Otherwise the variant trains it itself.
    """
    config, folder = plan.config, plan.config.run.run_dir
    cache = folder / "cache"
    if config.model.cache_features:  # files in it are named by their content
        (home / cache.name).mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        if not (cache.exists() or cache.is_symlink()):
            cache.symlink_to(Path("..", cache.name))
    from emoverse.run_dir.stage_reuse import reuse_stage  # torch, which a dry run does not need

    for stage in plan.stages:
        for donor in (home / name for name in variants() if name != plan.name):
            try:
                reused = reuse_stage(config, stage, donor)
            except ValueError as error:  # a damaged donor only costs time
                print(f"{plan.name}: {stage} is not taken from {donor}: {error}", file=sys.stderr)
                continue
            if reused:
                print(
                    f"{plan.name}: {stage} is that of {donor}, not trained again", file=sys.stderr
                )


def report_text(result: Mapping[str, Any]) -> str:
    """The tables, effects and conditions; or the commands, or what was submitted."""
    if "commands" in result:
        return "\n".join(f"emoverse {' '.join(words)}" for words in result["commands"])
    if "submitted" in result:
        return f"submitted {', '.join(result['submitted'])}; later: the same command --collect"
    lines = [ablation_text(result), result["page"]] if "tables" in result else []
    lines += [f"{name} failed: {reason}" for name, reason in result["failed"].items()]
    return "\n".join(lines)
