"""`emoverse VERB ...`: reads the arguments, calls the part that does the work, prints its result.

In: the command line. Out: an exit code: 0 done, 2 wrong input, 1 a fault, 75 stopped early and
resumable. Every verb imports its implementation only when it runs, so help, `plan` and config
errors answer at once and without torch.
"""

import argparse
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoverse import __version__

DONE, FAULT, WRONG_INPUT, STOPPED = 0, 1, 2, 75

Configure = Callable[[argparse.ArgumentParser], None]
Handle = Callable[[argparse.Namespace], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verb:
    """One verb: its line in the help, its arguments, and what it does."""

    summary: str
    configure: Configure
    handle: Handle


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; the console script `emoverse` ends here."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parse(words)
    try:
        code = VERBS[args.verb].handle(args)
        sys.stdout.flush()  # here, where a reader that has gone is an error we know
        return code
    except (ValueError, FileNotFoundError) as error:
        # What the user can put right needs no traceback, unless it is asked for.
        if args.debug:
            traceback.print_exc()
        print(f"emoverse {args.verb}: {error}", file=sys.stderr)
        return WRONG_INPUT
    except BrokenPipeError:
        # The reader (`| head`) has gone; nothing may be written any more, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAULT
    except KeyboardInterrupt:
        print(f"emoverse {args.verb}: interrupted", file=sys.stderr)
        return FAULT
    except OSError as error:  # a disk or a network fails, which a traceback does not explain
        if args.debug:
            traceback.print_exc()
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        print(f"emoverse {args.verb}: {error}{notes}", file=sys.stderr)
        return FAULT
    except Exception:
        traceback.print_exc()
        return FAULT


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of this command line; argparse ends the process with 2 if they are wrong."""
    parser = build_parser(words)
    args, rest = parser.parse_known_args(words)
    # argparse takes the words of CONFIG only up to the first option: the overrides after it too.
    later = [word for word in rest if not word.startswith("-")]
    if len(later) < len(rest) or (rest and "config" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if later:
        args.config += later
    return args


def build_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for this command line.

    Only the verb that is called gets its arguments, since some of them are declared by parts that
    are slow to import.
    """
    parser = argparse.ArgumentParser(
        prog="emoverse",
        description="Sentiment and emotion tuning of multimodal language models in stages.",
        epilog="`emoverse VERB --help` explains a verb. Exit codes: 0 done, 1 fault, "
        "2 wrong input, 75 stopped early and resumable.",
    )
    parser.add_argument("--version", action="version", version=f"emoverse {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    called = next((word for word in words if not word.startswith("-")), None)
    for name, verb in VERBS.items():
        sub = verbs.add_parser(name, help=verb.summary, description=verb.summary)
        if name == called:
            verb.configure(sub)
    return parser


def _build_arguments(parser: argparse.ArgumentParser) -> None:
    from data_shards.build.source_build import add_build_arguments

    add_build_arguments(parser, _add_json)


def _build(args: argparse.Namespace) -> int:
    from data_shards.build.source_build import run_build

    return _resumable("build", lambda: _print_result(run_build(args), args))


def _resumable(name: str, work: Callable[[], int]) -> int:
    """Ctrl-C loses nothing that is finished, so it ends with the code that says so."""
    try:
        return work()
    except KeyboardInterrupt as stop:
        print(f"emoverse {name}: {stop or 'stopped; the same command goes on'}", file=sys.stderr)
        return STOPPED


def _by_kind(verb: str, summary: str) -> Verb:
    """A verb of several kinds, each a module with `add_arguments(parser)` and `run(args)`."""

    def configure(parser: argparse.ArgumentParser) -> None:
        kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
        for kind, (line, module) in _KINDS[verb].items():
            sub = kinds.add_parser(kind, help=line, description=line)
            importlib.import_module(module).add_arguments(sub)
            _add_json(sub)

    def handle(args: argparse.Namespace) -> int:
        part = importlib.import_module(_KINDS[verb][args.kind][1])

        def work() -> int:
            result = part.run(args)
            _print_result(result, args, getattr(part, "report_text", _lines))
            return DONE if result.get("ok", True) else STOPPED

        return _resumable(f"{verb} {args.kind}", work)

    return Verb(summary=summary, configure=configure, handle=handle)


def _part(summary: str, module: str) -> Verb:
    """A verb whose module declares its own arguments and wording.

    The module has `add_arguments(parser)`, `run(args) -> dict` and `report_text(dict) -> str`; an
    `ok` in the result that is false makes the exit code 1.
    """

    def configure(parser: argparse.ArgumentParser) -> None:
        importlib.import_module(module).add_arguments(parser)
        _add_json(parser)

    def handle(args: argparse.Namespace) -> int:
        part = importlib.import_module(module)
        result = part.run(args)
        _print_result(result, args, part.report_text)
        return DONE if result.get("ok", True) else FAULT

    return Verb(summary=summary, configure=configure, handle=handle)


def _pretrain_arguments(parser: argparse.ArgumentParser) -> None:
    _add_config(parser, example="basics.steps=10")
    _add_json(parser)


def _pretrain(args: argparse.Namespace) -> int:
    from emoverse.nano.pretrain import run

    paths, overrides = _split(args.config)
    return _print_result(run(paths, overrides), args)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--order", type=Path, metavar="FILE", help="also write one JSON line per planned sample"
    )
    _add_json(parser)


def _plan(args: argparse.Namespace) -> int:
    from emoverse.config.schema import load_config
    from launch.verbs.plan import make_plan, plan_text, write_order

    config = load_config(*_split(args.config))
    index, plan, report = make_plan(config)
    if args.order is not None:
        write_order(args.order, index, plan)
    return _print_result(report, args, plan_text)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--stage",
        action="append",
        metavar="NAME",
        help="train only this stage (may be given several times); default: all, in order",
    )
    from launch.worker import FLAGS

    for name, meaning in FLAGS.items():
        parser.add_argument(name, action="store_true", help=meaning)


def _train(args: argparse.Namespace) -> int:
    from emoverse.config.schema import load_config
    from emoverse.training.stages import stages_to_train

    # Before torch is imported: a wrong config is told at once.
    config = load_config(*_split(args.config))
    stages = stages_to_train(config, args.stage)
    from launch.local import run_local
    from launch.worker import FLAGS

    given = vars(args)
    flags = [name for name in FLAGS if given[name[2:].replace("-", "_")]]
    return run_local(config, stages=stages, flags=flags)


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    from launch.verbs.evaluate import add_arguments

    add_arguments(parser)
    _add_json(parser)


def _evaluate(args: argparse.Namespace) -> int:
    from launch.verbs.evaluate import paper_text, report_text, run

    def text(states: Mapping[str, Any]) -> str:
        return "\n".join([report_text(states), *([paper_text(states)] if args.paper else [])])

    return _print_result(run(args), args, text)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--text-only", type=Path, metavar="RUN2", help="run directory of the text-only baseline"
    )
    parser.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="answers of another system (.jsonl) to show beside ours (repeatable)",
    )
    _add_json(parser)


def _report(args: argparse.Namespace) -> int:
    from emoverse.report.report import write_report
    from emoverse.report.summary import summary_text

    systems = {}
    for word in args.system:
        name, sign, path = word.partition("=")
        if not sign or not name or not path:
            raise ValueError(f"--system: give NAME=FILE.jsonl, found {word!r}")
        systems[name] = Path(path)
    page = write_report(args.run, text_only_run=args.text_only, systems=systems)
    summary = json.loads((args.run / "summary.json").read_text(encoding="utf-8"))
    text = f"{summary_text(summary)}\n{page}"
    return _print_result({"report": str(page), **summary}, args, lambda _: text)


# Verb -> kind -> its line in the help and its module; `ok` false in a result: run it again.
_KINDS = {
    "annotate": {
        "fer": ("facial expressions from action units", "data_shards.annotate.fer"),
        "reasons": ("why people feel so, from served models", "launch.verbs.data.annotate_reasons"),
    },
    "convert": {
        "export": ("a shard folder as ms-swift data", "data_shards.sources.swift_export"),
        "import": ("ms-swift data as a shard folder", "launch.verbs.data.convert"),
    },
}

VERBS = {
    "build": Verb(
        summary="build a shard folder from a corpus",
        configure=_build_arguments,
        handle=_build,
    ),
    "annotate": _by_kind("annotate", "derive labels that a corpus lacks"),
    "convert": _by_kind("convert", "ms-swift training data, both ways"),
    "lint": _part("check every record of a shard folder", "data_shards.inspection.lint"),
    "preview": _part("show some records of a shard folder", "data_shards.inspection.preview"),
    "stats": _part("count what a shard folder holds", "data_shards.inspection.stats"),
    "pretrain": Verb(
        summary="train the nano base model from nothing",
        configure=_pretrain_arguments,
        handle=_pretrain,
    ),
    "plan": Verb(
        summary="say what a run will train, without a model",
        configure=_plan_arguments,
        handle=_plan,
    ),
    "train": Verb(
        summary="train the stages on this machine; the same command resumes",
        configure=_train_arguments,
        handle=_train,
    ),
    "launch": _part("submit both stages and the evaluation to a cluster", "launch.verbs.launch"),
    "status": _part("say where a run and its jobs stand, from files", "launch.verbs.status"),
    "evaluate": Verb(
        summary="answer and score the held-out records of a run",
        configure=_evaluate_arguments,
        handle=_evaluate,
    ),
    "ablate": _part(
        "run the paper's ablations and lay the tables beside it", "launch.verbs.ablate"
    ),
    "export": _part("write a trained state as a model that others load", "emoverse.export.export"),
    "report": Verb(
        summary="write a run's report.html and summary.json",
        configure=_report_arguments,
        handle=_report,
    ),
}


def _add_config(parser: argparse.ArgumentParser, example: str = "stages.stage1.epochs=1") -> None:
    parser.add_argument(
        "config",
        nargs="+",
        metavar="CONFIG|KEY=VALUE",
        help=f"YAML files and overrides such as {example}, merged from left to right",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _split(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Config files and overrides; at least one file."""
    from emoverse.config.yaml_source import split_words

    paths, overrides = split_words(words)
    if not paths:
        raise ValueError(f"a config file is needed before the overrides {' '.join(words)}")
    return paths, overrides


def _lines(result: Mapping[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in result.items())


def _print_result(
    result: Mapping[str, Any],
    args: argparse.Namespace,
    text: Callable[[Mapping[str, Any]], str] = _lines,
) -> int:
    print(json.dumps(result, indent=2) if args.json else text(result))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
