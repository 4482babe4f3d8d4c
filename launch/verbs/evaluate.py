"""The verb `evaluate`: answers and scores a run, a checkpoint, a base model or a file of answers.

Out: eval/STATE/{predictions.jsonl, metrics.json} and a table. With --processes the ranks are
`launch.worker`. Importing this file does not import torch.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.tasks import TASKS, Task
from emoverse.config.schema import freeze_config
from emoverse.config.yaml_source import split_words
from emoverse.evaluation.parsing import MODES
from emoverse.evaluation.target import Target, name_of, resolve, states_of
from launch.exit_codes import DONE, STOPPED, WRONG_INPUT
from launch.local import run_ranks
from launch.verb_tools import add_json, print_result

if TYPE_CHECKING:
    from data_shards.annotate.endpoint import Endpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The target, which states of it, and how answers are read."""
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
        help="tolerant reads other forms of an answer and counts them, strict only the exact one, "
        "mmsa also reads a neutral sentiment as 0",
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
        "--expect",
        metavar="SHARDS|FILE",
        help="shards or labels .jsonl of all clips that a FILE answers; missing ones are wrong",
    )
    parser.add_argument(
        "--judge", metavar="URL", help="also let a model behind this endpoint judge ERI answers"
    )
    parser.add_argument("--judge-model", default="", metavar="NAME", help="the judge's name there")
    parser.add_argument(
        "--judge-key-env", default="", metavar="VAR", help="environment variable with its key"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the scores."""
    return print_result(evaluate(args), args, paper_and_report_text if args.paper else report_text)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate; {state: metrics}. Raises ValueError and FileNotFoundError for wrong input."""
    if args.processes < 1:
        raise ValueError(f"--processes: must be 1 or more, found {args.processes}")
    target = target_of(args)
    if args.expect and target.kind != "predictions":
        raise ValueError(f"--expect: only for a FILE of answers, found {target.path}")
    endpoint = None
    if args.judge:
        from data_shards.annotate.endpoint import Endpoint

        # Before anything is answered, so that wrong settings are reported at once.
        # Room for a judge that explains its integer: a truncated answer is invalid.
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
            expect=args.expect,
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
    assert target.config is not None
    logs = target.out / "eval" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    frozen = freeze_config(target.config, logs.absolute())
    command = [sys.executable, "-m", "launch.worker", str(frozen), "--end-with-input"]
    command += [f"--evaluate-target={args.target}", f"--parser={args.parser}"]
    command += [f"--which={state}" for state in args.which or ()]
    command += ["--answer-again"] if args.fresh else []
    command += [f"--out={args.out}"] if args.out else []
    with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the result
        code = run_ranks(command, num_ranks=args.processes, logs=logs)
    if code == STOPPED:
        raise SystemExit(STOPPED)
    if code != DONE:
        error = ValueError if code == WRONG_INPUT else RuntimeError
        raise error(f"the ranks failed; logs of all ranks: {logs}/rank_*.log")
    states = [name_of(target, state) for state in states_of(target, lambda text: None)]
    files = {state: target.out / "eval" / state / "metrics.json" for state in states}
    return {state: json.loads(path.read_text(encoding="utf-8")) for state, path in files.items()}


# The result as text ----------------------------------------------------------------------------


def report_text(states: Mapping[str, Any]) -> str:
    """One line per state and task: its primary metric with interval, and that of the baselines."""
    lines = [
        f"{'state':<10}{'task':<6}{'metric':<20}{'score':>7}  {'95 %':<14}{'clips':>6}"
        f"{'unread':>8}  rules"
    ]
    for state, metrics in states.items():
        for task, row in metrics["tasks"].items():
            name = row["primary"]
            score = row["metrics"][name]
            rules = ", ".join(
                f"{rule} {_number(scores[name]['value'])}"
                for rule, scores in row["baselines"].items()
            )
            interval = f"{_number(score['low'])}..{_number(score['high'])}"
            lines.append(
                f"{state:<10}{task:<6}{name:<20}{_number(score['value']):>7}  {interval:<14}"
                f"{row['n']:>6}{row['unparseable']:>8}  {rules}"
            )
    return "\n".join(lines)


def paper_and_report_text(states: Mapping[str, Any]) -> str:
    """The table, then what the authors' script would print."""
    return f"{report_text(states)}\n{paper_text(states)}"


def paper_text(states: Mapping[str, Any]) -> str:
    """What the authors' script would print for the same answers, and where it differs."""
    lines = []
    differences: dict[str, Sequence[str]] = {}
    for state, metrics in states.items():
        for task, row in metrics["tasks"].items():
            if row["paper"] is None:
                continue
            differences[task] = row["paper"]["differences"]
            for result in row["paper"]["script"]:
                values = ", ".join(f"{k} {_number(v)}" for k, v in result["values"].items())
                text = values or f"undefined: {result['undefined']}"
                lines.append(f"{state:<10}{task:<6}{result['function']:<20} {text}")
            lines.append(
                f"{'':<16}{row['paper']['counted_otherwise']} of {row['n']} answers are right in "
                "one way of counting only"
            )
    for task, texts in differences.items():
        lines += [f"{task}: the script {text}" for text in texts]
    return "\n".join(["the authors' script on the same answers:", *lines])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
