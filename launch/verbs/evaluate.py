"""The verb `evaluate`: what to evaluate, in how many processes, and the result as text.

In: a run, a checkpoint, a base model or a file of answers. Out: eval/STATE/{predictions.jsonl,
metrics.json} and a table. `python -m launch.verbs.evaluate` is one rank of several, as the rank
variables say. Importing this file does not import torch.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from data_shards.tasks import TASKS, Task
from emoverse.config.yaml_source import split_words
from emoverse.evaluation.parsing import MODES
from emoverse.evaluation.target import Target, name_of, resolve, states_of
from emoverse.training.shutdown import EXIT_STOPPED as STOPPED
from launch.local import run_ranks
from launch.worker import DONE, FAULT, WRONG_INPUT

if TYPE_CHECKING:
    from data_shards.annotate.endpoint import Endpoint

TIMEOUT_S = 1800.0  # of one collective: as long as another rank may need for its batch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument(
        "target",
        type=Path,
        metavar="RUN|CHECKPOINT|BASE|FILE",
        help="run directory, checkpoint folder, InternVL2 folder as downloaded, or answers .jsonl",
    )
    parser.add_argument(
        "config",
        nargs="*",
        metavar="CONFIG|KEY=VALUE",
        help="overrides of the run's config; for a BASE first the config files to answer by",
    )
    parser.add_argument(
        "--which",
        action="append",
        metavar="STATE",
        help="base, or a stage by its name (may be given several times); default: as in the config",
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="local ranks that share the batches"
    )
    parser.add_argument(
        "--parser",
        choices=MODES,
        default=MODES[0],
        help="tolerant reads other forms of an answer and says so, strict only the exact one",
    )
    parser.add_argument(
        "--paper", action="store_true", help="also show what the authors' script would print"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="answer again what has been answered already"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--task", choices=[str(task) for task in TASKS], help="of a FILE's lines that name none"
    )
    parser.add_argument(
        "--give-emotion", action="store_true", help="a FILE's ECPE queries held the gold emotion"
    )
    parser.add_argument(
        "--judge", metavar="URL", help="also let a model behind this endpoint judge ERI answers"
    )
    parser.add_argument("--judge-model", default="", metavar="NAME", help="the judge's name there")
    parser.add_argument(
        "--judge-key-env", default="", metavar="VAR", help="environment variable with its key"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate; {state: metrics}. Raises ValueError and FileNotFoundError for wrong input."""
    if args.processes < 1:
        raise ValueError(f"--processes: must be 1 or more, found {args.processes}")
    target = target_of(args)
    endpoint = None
    if args.judge:
        from data_shards.annotate.endpoint import Endpoint

        # Before anything is answered: wrong settings are told at once.
        # Room for a judge that explains its integer: an answer that is cut is none.
        endpoint = Endpoint(
            base_url=args.judge, model=args.judge_model, key_env=args.judge_key_env, max_tokens=512
        )
    results = _evaluate(args, target)
    if endpoint is not None:
        _judge(results, target, args, endpoint)
    return results


def _evaluate(args: argparse.Namespace, target: Target) -> dict[str, Any]:
    if target.kind == "predictions":
        from emoverse.evaluation.result_files import score_results

        task = Task(args.task) if args.task else None
        scores = score_results(
            target.path,
            task=task,
            mode=args.parser,
            give_emotion=args.give_emotion,
            out=_scores_file(args, target),
        )
        return {target.path.name: scores}
    if args.processes > 1:
        return _run_ranks(args, target)
    # The heavy half: torch, transformers.
    from emoverse.evaluation.evaluate import run_target

    return run_target(target, mode=args.parser, fresh=args.fresh)


def _scores_file(args: argparse.Namespace, target: Target) -> Path:
    """Where the scores of a predictions file go: beside it, or into --out."""
    return target.out / ("metrics.json" if args.out else f"{target.path.stem}.metrics.json")


def _judge(
    results: dict[str, Any], target: Target, args: argparse.Namespace, endpoint: "Endpoint"
) -> None:
    """Adds the judge's scores to every result and its files."""
    from data_shards.files import write_atomically
    from emoverse.evaluation.judge import judge_state
    from emoverse.evaluation.predictions import read_predictions, write_predictions
    from emoverse.evaluation.result_files import read_results

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    for state, metrics in results.items():
        if target.kind == "predictions":
            task = Task(args.task) if args.task else None
            answers = read_results(target.path, task=task, mode=args.parser)
            judge_state(metrics, answers, endpoint, target.out, log=log)
            path = _scores_file(args, target)
        else:
            folder = target.out / "eval" / state
            answers = read_predictions(folder / "predictions.jsonl")
            judged = judge_state(metrics, answers, endpoint, folder, log=log)
            write_predictions(folder / "predictions.jsonl", judged)
            path = folder / "metrics.json"
        write_atomically(path, json.dumps(metrics, indent=1) + "\n")


def target_of(args: argparse.Namespace) -> Target:
    """The target of the command line, with its config."""
    configs, overrides = split_words(args.config)
    return resolve(
        args.target,
        configs=configs,
        overrides=overrides,
        states=args.which or (),
        out=args.out,
    )


def _run_ranks(args: argparse.Namespace, target: Target) -> dict[str, Any]:
    """Several local ranks; their results are read from the files that rank 0 writes."""
    command = [sys.executable, "-m", "launch.verbs.evaluate", str(args.target), *args.config]
    command += ["--parser", args.parser]
    command += [word for state in args.which or () for word in ("--which", state)]
    command += ["--fresh"] if args.fresh else []
    command += ["--out", str(args.out)] if args.out else []
    logs = target.out / "eval" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the result
        code = run_ranks(command, num_ranks=args.processes, logs=logs)
    if code == STOPPED:
        raise SystemExit(STOPPED)
    if code != DONE:
        error = ValueError if code == WRONG_INPUT else RuntimeError
        raise error(f"the ranks failed; what every rank said: {logs}/rank_*.log")
    states = [name_of(target, state) for state in states_of(target, lambda text: None)]
    files = {state: target.out / "eval" / state / "metrics.json" for state in states}
    return {state: json.loads(path.read_text(encoding="utf-8")) for state, path in files.items()}


# The result as text ----------------------------------------------------------------------------


def report_text(states: Mapping[str, Any]) -> str:
    """One line per state and task: the task's first metric with its interval, and the rules'."""
    lines = [
        f"{'state':<10}{'task':<6}{'metric':<20}{'score':>7}  {'95 %':<14}{'clips':>6}"
        f"{'unread':>8}  rules"
    ]
    for state, metrics in states.items():
        for task, row in metrics["tasks"].items():
            name = row["primary"]
            found = row["metrics"][name]
            rules = ", ".join(
                f"{rule} {_number(scores[name]['value'])}"
                for rule, scores in row["baselines"].items()
            )
            interval = f"{_number(found['low'])}..{_number(found['high'])}"
            lines.append(
                f"{state:<10}{task:<6}{name:<20}{_number(found['value']):>7}  {interval:<14}"
                f"{row['n']:>6}{row['unparseable']:>8}  {rules}"
            )
    return "\n".join(lines)


def paper_text(states: Mapping[str, Any]) -> str:
    """What the authors' script would print for the same answers, and where it differs."""
    lines = []
    differences: dict[str, Sequence[str]] = {}
    for state, metrics in states.items():
        for task, row in metrics["tasks"].items():
            if row["paper"] is None:
                continue
            differences[task] = row["paper"]["differences"]
            for one in row["paper"]["script"]:
                values = ", ".join(f"{k} {_number(v)}" for k, v in one["values"].items())
                text = values or f"undefined: {one['undefined']}"
                lines.append(f"{state:<10}{task:<6}{one['function']:<20} {text}")
            lines.append(
                f"{'':<16}{row['paper']['counted_otherwise']} of {row['n']} answers are right in "
                "one way of counting only"
            )
    for task, found in differences.items():
        lines += [f"{task}: the script {text}" for text in found]
    return "\n".join(["the authors' script on the same answers:", *lines])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# One rank --------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates as the rank that the environment says. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.verbs.evaluate", description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    # Every answered batch is on disk: there is nothing to save, the same command goes on.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, _stop_at_once)
    from emoverse.engine import distributed
    from emoverse.engine.deepspeed_engine import start_process_group
    from emoverse.evaluation.evaluate import run_target

    try:
        world = distributed.read_world()
        start_process_group(world, timeout_s=TIMEOUT_S)
        run_target(target_of(args), world=world, mode=args.parser, fresh=args.fresh)
        distributed.shutdown()
        return DONE
    except Exception as error:
        wrong_input = isinstance(error, distributed.WRONG_INPUT)
        code = int(getattr(error, "exit_code", WRONG_INPUT if wrong_input else FAULT))
        if code == FAULT:
            traceback.print_exc()
        print(f"emoverse evaluate: {error}", file=sys.stderr)
        return code


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(STOPPED)


if __name__ == "__main__":
    sys.exit(main())
