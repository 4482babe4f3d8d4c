"""The verb `emoverse convert import FILE`: ms-swift training data to a shard folder.

The same as `emoverse build swift FILE`: checked, curated, in parallel, resumable. The other way is
`emoverse convert export DIR` (`data_shards.sources.swift_export`).
"""

import argparse
from typing import Any

from data_shards.build.source_build import add_source_arguments, run_build

_SOURCE = "swift"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `emoverse convert import`."""
    add_source_arguments(parser, _SOURCE)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Build the folder and report what is in it."""
    args.source = _SOURCE
    return run_build(args)
