"""What the verbs share: the words of CONFIG, `--json`, printing a result, commands that resume.

A verb is a module of `launch/verbs` with `add_arguments(parser)` and `run(args)`, which returns the
exit code. Wrong input is a ValueError or FileNotFoundError; `launch.cli` maps errors to exit codes.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from emoverse.config.yaml_source import split_words
from launch.exit_codes import DONE, FAULT, STOPPED


class Verb(Protocol):
    """The functions of a verb's module."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments; called only if this verb is called."""

    def run(self, args: argparse.Namespace) -> int:
        """Do the work, print the result and return the exit code."""


def add_config(parser: argparse.ArgumentParser, example: str = "stages.stage1.epochs=1") -> None:
    """Config files and overrides as one list; `config_words` takes it apart."""
    parser.add_argument(
        "config",
        nargs="+",
        metavar="CONFIG|KEY=VALUE",
        help=f"YAML files and overrides such as {example}, merged from left to right",
    )


def config_words(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Config files and overrides. Raises ValueError if there is no file."""
    paths, overrides = split_words(words)
    if not paths:
        raise ValueError(f"a config file is needed before the overrides {' '.join(words)}")
    return paths, overrides


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`, which `print_result` reads."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def result_lines(result: Mapping[str, Any]) -> str:
    """The values of a result, one per line."""
    return "\n".join(f"{name}: {value}" for name, value in result.items())


def print_result(
    result: Mapping[str, Any],
    args: argparse.Namespace,
    text: Callable[[Mapping[str, Any]], str] = result_lines,
    *,
    not_ok: int = FAULT,
) -> int:
    """Print a result as text, or as JSON with --json.

    Returns 0, or `not_ok` if the result has a field `ok` that is false.
    """
    print(json.dumps(result, indent=2) if args.json else text(result))
    return DONE if result.get("ok", True) else not_ok


def resumable(command: str, work: Callable[[], int]) -> int:
    """Run work that loses nothing finished on Ctrl-C: a KeyboardInterrupt ends with 75."""
    try:
        return work()
    except KeyboardInterrupt as stop:
        message = str(stop) or "stopped; the same command resumes"
        print(f"emoverse {command}: {message}", file=sys.stderr)
        return STOPPED
