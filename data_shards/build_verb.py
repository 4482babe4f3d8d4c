"""The verb `emoverse build SOURCE`: a corpus, a place, how media are stored; then the builder.

In: the command line. Out: the shard folder and a report of what is in it. Stopping it (Ctrl-C,
SIGTERM, a kill) loses nothing but the shards in work: the same command goes on.
"""

import argparse
import importlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_shards.build import BuildOptions, build_shards
from data_shards.index import INDEX_FILE, ShardIndex
from data_shards.progress import Progress
from data_shards.sources import SOURCES, Source
from data_shards.tasks import tasks_in
from data_shards.unfinished import work_folder


class StoppedEarly(Exception):
    """The build was stopped; the message says how to go on."""


def add_build_arguments(
    parser: argparse.ArgumentParser, more: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Arguments of `emoverse build`; `more` adds those that all verbs share, to every source."""
    sources = parser.add_subparsers(dest="source", metavar="SOURCE", required=True)
    for name, module in SOURCES.items():
        part = importlib.import_module(module)
        summary = str(part.__doc__).partition("\n")[0]
        sub = sources.add_parser(name, help=summary, description=summary)
        part.add_arguments(sub)
        _add_shared_arguments(sub)
        more(sub)


def _add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, help="shard folder to make; must be new or empty")
    add("--workers", type=int, default=1, help="processes (default: %(default)s)")
    add("--frames", choices=("video", "extracted"), default="video", help="mp4, or JPEG frames")
    add("--frames-per-clip", type=int, default=8, help="frames of a clip, if extracted")
    add("--frame-size", type=int, default=448, help="side in pixels, if extracted")
    add("--shard-records", type=int, default=250, help="records per shard (default: %(default)s)")
    add("--strict", action="store_true", help="stop at a clip that is missing or damaged")
    add("--fresh", action="store_true", help="throw away what an unfinished build has left")


def run_build(args: argparse.Namespace) -> dict[str, Any]:
    """Build the shard folder and report what is in it; a finished one is only reported.

    Raises:
        StoppedEarly: on Ctrl-C or SIGTERM.
    """
    source: Source = importlib.import_module(SOURCES[args.source]).open_source(args)
    options = BuildOptions(
        frames=args.frames, frames_per_clip=args.frames_per_clip, frame_size=args.frame_size
    )
    began = time.monotonic()
    index = _finished(args.out, options, source.provenance)
    already = index is not None
    if index is None:
        try:
            with _terminate_as_interrupt():
                index = build_shards(
                    source.items,
                    args.out,
                    options=options,
                    provenance=source.provenance,
                    max_records_per_shard=args.shard_records,
                    workers=args.workers,
                    strict=args.strict,
                    fresh=args.fresh,
                    progress=Progress(source.total, "clips"),
                )
        except KeyboardInterrupt:
            kept = "finished shards are kept" if work_folder(args.out).exists() else "nothing kept"
            raise StoppedEarly(f"stopped early, {kept}; the same command goes on") from None
    return _report(index, args.out) | {
        "already_built": already,
        "seconds": round(time.monotonic() - began, 1),
    }


def _finished(out: Path, options: BuildOptions, provenance: Mapping[str, Any]) -> ShardIndex | None:
    """The output folder, if it is what this command would build."""
    if not (out / INDEX_FILE).is_file():
        return None
    index = ShardIndex.load(out)
    found = {name: value for name, value in index.provenance.items() if name != "skipped"}
    same = found == json.loads(json.dumps(dict(provenance))) and index.options == asdict(options)
    return index if same else None


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM, which a scheduler sends before it kills, ends the build as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(index: ShardIndex, out: Path) -> dict[str, Any]:
    entries: dict[str, int] = {}
    for mask, count in index.class_counts().items():
        for task in tasks_in(mask):
            entries[task.value] = entries.get(task.value, 0) + count
    return {
        "out": str(out),
        "records": index.num_records,
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "entries": entries,
        "skipped": index.provenance.get("skipped", {}),
        "fingerprint": index.fingerprint,
    }
