"""The verb `annotate`: derives labels that a corpus lacks, by one of its kinds."""

import argparse
from collections.abc import Mapping
from typing import Final

from launch.verb_tools import Verb
from launch.verbs.data import annotate_fer, annotate_reasons

# Kind -> its line in the help and its module, which has the functions of a verb.
KINDS: Final[Mapping[str, tuple[str, Verb]]] = {
    "fer": ("facial expressions from action units", annotate_fer),
    "reasons": ("why people feel as they do, from served models", annotate_reasons),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The kinds with their arguments."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, (summary, module) in KINDS.items():
        module.add_arguments(kinds.add_parser(name, help=summary, description=summary))


def run(args: argparse.Namespace) -> int:
    """Run the kind."""
    return KINDS[args.kind][1].run(args)
