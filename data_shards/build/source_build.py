"""The verb `emoverse build SOURCE`: a corpus, a place, how media are stored; then the builder.

In: the command line. Out: the shard folder and a report of what is in it. Stopping it (Ctrl-C,
SIGTERM, a kill) loses nothing but the shards in work: the same command goes on.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

from data_shards.build.build import MAX_SHARD_BYTES, BuildOptions, build_shards
from data_shards.build.clip_record import hash_file
from data_shards.build.curation import Amendments, read_curation
from data_shards.build.journal import work_folder
from data_shards.build.source_item import SKIPPED_FILE
from data_shards.jsonl import read_rows, read_texts
from data_shards.progress import Progress
from data_shards.shards.index import INDEX_FILE, ShardIndex
from data_shards.sources.registry import SOURCES, Source
from data_shards.tasks import tasks_in

_LIBRARIES: Final = ("emoverse", "av", "numpy", "pillow", "simplejpeg")


class StoppedEarly(KeyboardInterrupt):
    """The build was stopped; the message says how to go on."""


def add_build_arguments(
    parser: argparse.ArgumentParser, more: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Arguments of `emoverse build`; `more` adds those that all verbs share, to every source."""
    sources = parser.add_subparsers(dest="source", metavar="SOURCE", required=True)
    for name, module in SOURCES.items():
        summary = str(importlib.import_module(module).__doc__).partition("\n")[0]
        sub = sources.add_parser(name, help=summary, description=summary)
        add_source_arguments(sub, name)
        more(sub)


def add_source_arguments(parser: argparse.ArgumentParser, source: str) -> None:
    """The arguments of building one source."""
    importlib.import_module(SOURCES[source]).add_arguments(parser)
    _add_shared_arguments(parser)


def _add_shared_arguments(parser: argparse.ArgumentParser) -> None:
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
    amendments = Amendments(
        decisions=read_curation(args.curation),
        reasons=read_texts(args.reasons, "reason") if args.reasons else {},
    )
    provenance = {**source.provenance, **_made_with(args)}
    began = time.monotonic()
    index = _finished(args.out, options, provenance, args.shard_records)
    already = index is not None
    if index is None:
        try:
            with _terminate_as_interrupt():
                index = build_shards(
                    source.items,
                    args.out,
                    options=options,
                    provenance=provenance,
                    max_records_per_shard=args.shard_records,
                    workers=args.workers,
                    strict=args.strict,
                    amend=amendments if amendments else None,
                    fresh=args.fresh,
                    progress=Progress(source.total, "clips"),
                    notice=partial(print, "build:", file=sys.stderr, flush=True),
                )
        except KeyboardInterrupt:
            kept = "finished shards are kept" if work_folder(args.out).exists() else "nothing kept"
            raise StoppedEarly(f"stopped early, {kept}; the same command goes on") from None
    report = _report(index, args.out)
    if amendments:
        report["curation"] = amendments.report(_all_keys(index))
    return report | {
        "already_built": already,
        "seconds": round(time.monotonic() - began, 1),
    }


def _finished(
    out: Path, options: BuildOptions, provenance: Mapping[str, Any], max_records: int
) -> ShardIndex | None:
    """The output folder, if it is what this command would build."""
    if not (out / INDEX_FILE).is_file():
        return None
    index = ShardIndex.load(out)
    found = {name: value for name, value in index.provenance.items() if name != "skipped"}
    same = found == json.loads(json.dumps(dict(provenance))) and index.options == asdict(options)
    return index if same and _cut_alike(index, max_records, MAX_SHARD_BYTES) else None


def _cut_alike(index: ShardIndex, max_records: int, max_bytes: int) -> bool:
    """Whether a build with these limits would have ended each shard where it ends."""
    for shard, info in enumerate(index.shards):
        if info.records > max_records:
            return False
        if info.records < max_records and shard + 1 < index.num_shards:
            last, following = index.entries(shard)[-1], index.entries(shard + 1)[0]
            if int(last["offset"]) + int(last["size"]) + int(following["size"]) <= max_bytes:
                return False
    return True


@contextlib.contextmanager
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


def _made_with(args: argparse.Namespace) -> dict[str, Any]:
    """What else decides the bytes: files that change records, and the versions of the libraries."""
    found: dict[str, Any] = {"versions": library_versions()}
    if args.curation:
        found["curation"] = [hash_file(path) for path in args.curation]
    if args.reasons:
        found["reasons"] = hash_file(args.reasons)
    return found


def library_versions() -> dict[str, str]:
    """Versions of this package and of what encodes, resizes and stores; missing ones left out."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _all_keys(index: ShardIndex) -> Iterator[str]:
    """The keys of all clips of the source, stored or left out."""
    for shard in range(index.num_shards):
        yield from index.keys(shard)
    if (index.folder / SKIPPED_FILE).is_file():
        rows = read_rows(index.folder / SKIPPED_FILE, "the list of the build")
        yield from (row.text("key") for row in rows)


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
        # What the source itself says about its choices.
        **{n: v for n, v in index.provenance.items() if n in ("leakage", "left_out", "attached")},
        "fingerprint": index.fingerprint,
    }
