"""Builds a shard folder from a source, with decisions and reasons from files, and reports it.

In: a source, the folder, how media are stored. Out: the shard folder and a report of its content. A
stop (Ctrl-C, SIGTERM, a kill) only loses the shards in progress: the same call resumes.
"""

import contextlib
import importlib.metadata
import json
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
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
from data_shards.sources.registry import Source
from data_shards.tasks import tasks_in

_NAMED: Final = 20  # names per kind in the report
_REPORTED: Final = ("suspicious", "leakage", "left_out", "attached")  # of the provenance
_LIBRARIES: Final = ("emoverse", "av", "numpy", "pillow", "simplejpeg")


class StoppedEarly(KeyboardInterrupt):
    """The build was stopped; the message says how to resume."""


def build_source(
    source: Source,
    out: Path,
    *,
    options: BuildOptions,
    curation: Sequence[Path] = (),
    reasons: Path | None = None,
    shard_records: int = 250,
    workers: int = 1,
    strict: bool = False,
    fresh: bool = False,
) -> dict[str, Any]:
    """Build the shard folder and report its content; a finished one is only reported.

    Args:
        curation: files of decisions to keep, drop or correct records.
        reasons: file of ERI reasons.
        shard_records: the most records of a shard.
        strict: stop at a clip that is missing or damaged.
        fresh: delete what an unfinished build has left.

    Raises:
        StoppedEarly: on Ctrl-C or SIGTERM.
    """
    amendments = Amendments(
        decisions=read_curation(curation),
        reasons=read_texts(reasons, "reason") if reasons else {},
    )
    provenance = {**source.provenance, **_made_with(curation, reasons)}
    began = time.monotonic()
    index = _finished(out, options, provenance, shard_records)
    already = index is not None
    if index is None:
        try:
            with _terminate_as_interrupt():
                index = build_shards(
                    source.items,
                    out,
                    options=options,
                    provenance=provenance,
                    max_records_per_shard=shard_records,
                    workers=workers,
                    strict=strict,
                    amend=amendments if amendments else None,
                    fresh=fresh,
                    progress=Progress(source.total, "clips"),
                    notice=partial(print, "build:", file=sys.stderr, flush=True),
                )
        except KeyboardInterrupt:
            kept = "finished shards are kept" if work_folder(out).exists() else "nothing kept"
            raise StoppedEarly(f"stopped early, {kept}; the same command resumes") from None
    report = _report(index, out)
    if amendments:
        report["curation"] = amendments.report(_all_keys(index))
    return report | {
        "already_built": already,
        "seconds": round(time.monotonic() - began, 1),
    }


def _finished(
    out: Path, options: BuildOptions, provenance: Mapping[str, Any], max_records: int
) -> ShardIndex | None:
    """The index of the output folder, if it is what this call would build."""
    if not (out / INDEX_FILE).is_file():
        return None
    index = ShardIndex.load(out)
    stored = {n: v for n, v in index.provenance.items() if n not in ("skipped", "suspicious")}
    same = stored == json.loads(json.dumps(dict(provenance))) and index.options == asdict(options)
    return index if same and built_with_limits(index, max_records, MAX_SHARD_BYTES) else None


def built_with_limits(index: ShardIndex, max_records: int, max_bytes: int) -> bool:
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


def _made_with(curation: Sequence[Path], reasons: Path | None) -> dict[str, Any]:
    """What else decides the bytes: files that change records, and the versions of the libraries."""
    made_with: dict[str, Any] = {"versions": library_versions()}
    if curation:
        made_with["curation"] = [hash_file(path) for path in curation]
    if reasons:
        made_with["reasons"] = hash_file(reasons)
    return made_with


def library_versions() -> dict[str, str]:
    """Versions of this package and of what encodes, resizes and stores; missing ones left out."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


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
        # The choices of the source, and what is suspicious.
        **{name: value for name, value in index.provenance.items() if name in _REPORTED},
        **_named(index.provenance.get("unplaced", {})),
        "fingerprint": index.fingerprint,
    }


def _named(unplaced: Mapping[str, list[str]]) -> dict[str, dict[str, list[str]]]:
    """The first names of what a source could not place; index.json has all."""
    shown = {
        why: [*names[:_NAMED], *([f"and {len(names) - _NAMED} more"] if names[_NAMED:] else [])]
        for why, names in unplaced.items()
    }
    return {"unplaced": shown} if shown else {}
