"""The verb `build`: a shard folder from a corpus.

In: the source and its options, the folder, how media are stored. Out: the shard folder and a report
of its content. A stop (Ctrl-C, SIGTERM, a kill) only loses the shards in progress: the same command
resumes.
"""

import argparse
import importlib
from pathlib import Path
from typing import Any

from data_shards.build.build import BuildOptions
from data_shards.build.source_build import build_source
from data_shards.sources.registry import SOURCES
from launch.verb_tools import add_json, print_result, resumable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sources, each with its arguments."""
    sources = parser.add_subparsers(dest="source", metavar="SOURCE", required=True)
    for name, module in SOURCES.items():
        summary = str(importlib.import_module(module).__doc__).partition("\n")[0]
        add_source_arguments(sources.add_parser(name, help=summary, description=summary), name)


def add_source_arguments(parser: argparse.ArgumentParser, source: str) -> None:
    """The arguments of building one source."""
    importlib.import_module(SOURCES[source]).add_arguments(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="shard folder to make; must be new or empty")
    add("--workers", type=int, default=1, help="processes (default: %(default)s)")
    add("--frames", choices=("video", "extracted"), default="video", help="mp4, or JPEG frames")
    add("--frames-per-clip", type=int, default=8, help="frames of a clip, if extracted")
    add("--frame-size", type=int, default=448, help="side in pixels, if extracted")
    add("--shard-records", type=int, default=250, help="records per shard (default: %(default)s)")
    add(
        "--curation",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="decisions to keep, drop or correct records (may be given several times)",
    )
    add("--reasons", type=Path, metavar="FILE", help="ERI reasons, from annotate reasons")
    add("--strict", action="store_true", help="stop at a clip that is missing or damaged")
    add("--fresh", action="store_true", help="delete what an unfinished build has left")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Build the folder of SOURCE and print the report."""
    return resumable("build", lambda: print_result(build(args), args))


def build(args: argparse.Namespace) -> dict[str, Any]:
    """Build the folder of `args.source`; returns the report."""
    return build_source(
        importlib.import_module(SOURCES[args.source]).open_source(args),
        args.out,
        options=BuildOptions(
            frames=args.frames, frames_per_clip=args.frames_per_clip, frame_size=args.frame_size
        ),
        curation=args.curation,
        reasons=args.reasons,
        shard_records=args.shard_records,
        workers=args.workers,
        strict=args.strict,
        fresh=args.fresh,
    )
