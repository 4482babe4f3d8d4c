"""`emoverse VERB ...`: parses the global options, calls the verb, maps errors to exit codes.

In: the command line. Out: an exit code: 0 done, 2 wrong input, 1 a fault, 75 stopped early and
resumable. Only the module of the called verb is imported, so help, `plan` and config errors answer
at once and without torch.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, cast

from emoverse import __version__
from launch.exit_codes import FAULT, WRONG_INPUT
from launch.subcommands import SubcommandError

if TYPE_CHECKING:  # it reads YAML, which the help does not need
    from launch.verb_tools import Verb

# Verb -> its module and its line in the help.
VERBS: Final = {
    "build": ("launch.verbs.data.build", "build a shard folder from a corpus"),
    "annotate": ("launch.verbs.data.annotate", "derive labels that a corpus lacks"),
    "convert": ("launch.verbs.data.convert", "import or export ms-swift training data"),
    "lint": ("launch.verbs.data.lint", "check every record of a shard folder"),
    "preview": ("launch.verbs.data.preview", "show some records of a shard folder"),
    "stats": ("launch.verbs.data.stats", "count what a shard folder holds"),
    "pretrain": ("launch.verbs.pretrain", "train the nano base model from scratch"),
    "plan": ("launch.verbs.plan", "show what a run will train, without a model"),
    "train": (
        "launch.verbs.train",
        "train the stages on this machine; the same command resumes",
    ),
    "launch": ("launch.verbs.launch", "submit both stages and the evaluation to a cluster"),
    "status": ("launch.verbs.status", "show the progress of a run and its jobs, from files"),
    "evaluate": ("launch.verbs.evaluate", "answer and score the held-out records of a run"),
    "ablate": ("launch.verbs.ablate", "run the paper's ablations and compare the tables"),
    "export": ("launch.verbs.export", "write a trained state as a model that others load"),
    "report": ("launch.verbs.report", "write a run's report.html and summary.json"),
    "demo": ("launch.verbs.demo", "run the whole method on synthetic clips"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; the console script `emoverse` calls this."""
    args = parse(list(sys.argv[1:] if argv is None else argv))
    try:
        code = load_verb(args.verb).run(args)
        sys.stdout.flush()  # here, where a closed pipe is still an error that is handled below
        return code
    except BrokenPipeError:
        # The reader (`| head`) has left; nothing may be written any more, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAULT
    except KeyboardInterrupt:
        print(f"emoverse {args.verb}: interrupted", file=sys.stderr)
        return FAULT
    except (ValueError, OSError, SubcommandError) as error:
        # Wrong input, a disk or a network: the message suffices, unless the traceback is asked for.
        if args.debug:
            traceback.print_exc()
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        print(f"emoverse {args.verb}: {error}{notes}", file=sys.stderr)
        return WRONG_INPUT if isinstance(error, (ValueError, FileNotFoundError)) else FAULT
    except Exception:
        traceback.print_exc()
        return FAULT


def load_verb(name: str) -> "Verb":
    """The module of a verb."""
    return cast("Verb", importlib.import_module(VERBS[name][0]))


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line; argparse ends the process with 2 if they are wrong."""
    parser = build_parser(words)
    args, rest = parser.parse_known_args(words)
    # argparse takes the words of CONFIG only up to the first option: append the later overrides.
    later = [word for word in rest if not word.startswith("-")]
    config = getattr(args, "config", None)
    if len(later) < len(rest) or (rest and not isinstance(config, list)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if isinstance(config, list):
        config += later
    return args


def build_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for this command line; only the called verb declares its arguments."""
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
    for name, (_, summary) in VERBS.items():
        verb_parser = verbs.add_parser(name, help=summary, description=summary)
        if name == called:
            load_verb(name).add_arguments(verb_parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
