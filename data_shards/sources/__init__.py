"""Raw corpora: each module here turns one corpus into an iterator of Records.

This file is the verb `emoverse build`: its arguments, its progress line, and the hand-over of the
records to the shard writer.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_shards.build import BuildOptions, build_shards
from data_shards.sources.synthetic import SPLITS, SyntheticOptions, synthetic_records
from data_shards.tasks import tasks_in

_PROGRESS_EVERY_S = 2.0


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `emoverse build`."""
    parser.add_argument("source", choices=("synthetic",), help="the corpus to build from")
    parser.add_argument(
        "--out", type=Path, required=True, help="shard folder to make; must be new or empty"
    )
    parser.add_argument(
        "--clips", type=int, default=1000, help="number of clips (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the corpus (default: %(default)s)"
    )
    parser.add_argument(
        "--split", choices=SPLITS, default="train", help="people differ between splits"
    )
    parser.add_argument(
        "--identities", type=int, default=400, help="number of people (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that make clips (default: %(default)s)"
    )
    parser.add_argument(
        "--frames", choices=("video", "extracted"), default="video", help="store mp4 or JPEG frames"
    )
    parser.add_argument(
        "--frames-per-clip", type=int, default=8, help="frames of a clip, if extracted"
    )
    parser.add_argument("--frame-size", type=int, default=448, help="side in pixels, if extracted")
    parser.add_argument(
        "--shard-records", type=int, default=250, help="records per shard (default: %(default)s)"
    )


def run_build(args: argparse.Namespace) -> dict[str, Any]:
    """Build the shard folder and report what is in it."""
    options = SyntheticOptions(
        clips=args.clips, seed=args.seed, split=args.split, identities=args.identities
    )
    began = time.monotonic()
    index = build_shards(
        synthetic_records(options, workers=args.workers),
        args.out,
        options=BuildOptions(
            frames=args.frames, frames_per_clip=args.frames_per_clip, frame_size=args.frame_size
        ),
        provenance={
            "source": "synthetic",
            "clips": options.clips,
            "seed": options.seed,
            "split": options.split,
            "identities": options.identities,
        },
        max_records_per_shard=args.shard_records,
        progress=_progress_line(options.clips),
    )
    entries: dict[str, int] = {}
    for mask, count in index.class_counts().items():
        for task in tasks_in(mask):
            entries[task.value] = entries.get(task.value, 0) + count
    return {
        "out": str(args.out),
        "records": index.num_records,
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "entries": entries,
        "fingerprint": index.fingerprint,
        "seconds": round(time.monotonic() - began, 1),
    }


def _progress_line(total: int) -> Callable[[int], None]:
    """Progress on stderr: a bar that is redrawn on a terminal, else a line every few seconds."""
    began = last = time.monotonic()

    def show(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < (0.1 if sys.stderr.isatty() else _PROGRESS_EVERY_S):
            return
        last = now
        rate = done / max(now - began, 1e-9)
        bar = "#" * (30 * done // total)
        text = f"[{bar:<30}] {done}/{total} clips, {rate:.0f}/s, {(total - done) / rate:.0f} s left"
        if sys.stderr.isatty():
            print(f"\r{text}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    return show
