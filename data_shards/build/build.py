"""Records to a shard folder: tars that any WebDataset reader can iterate, plus the index.

In: an iterator, read once, of source items (records, or functions that make one and are called in
worker processes). Out: a finished folder, published by one rename. Equal items and options give
equal bytes for any number of workers. A killed build resumes after its last finished shard.
Memory: a few records per worker, the index entries of one shard, all keys.
Flow: sources, annotate -> here -> shards.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from data_shards.build.journal import BuildJournal
from data_shards.build.source_item import (
    BY_CURATION,
    SKIPPED_FILE,
    SUSPICIOUS_FILE,
    FileStamp,
    Remark,
    Skipped,
    SourceItem,
    Suspicious,
    count_remarks,
    file_stamp,
    remark_lines,
)
from data_shards.build.worker_pool import ordered_map
from data_shards.media.pixels import jpeg_encode, resize_frame
from data_shards.media.video import clip_indices, count_frames, decode_frames
from data_shards.shards.index import ShardIndex, ShardInfo, write_index
from data_shards.shards.record import SCHEMA_VERSION, Frames, Record, Video
from data_shards.shards.writer import Packed, ShardWriter, pack_record
from data_shards.text_checks import text_findings

Amend = Callable[[Record], Record | Skipped]

MAX_SHARD_BYTES: Final = 2**28
_SHOWN_SUSPICIOUS: Final = 10  # notices per build; suspicious.jsonl has all


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """How media are stored; index.json records it."""

    frames: Literal["video", "extracted"] = "video"  # mp4, or the sampled frames as JPEG
    frames_per_clip: int = 8  # number of frames, if extracted
    frame_size: int = 448  # height and width in pixels, if extracted
    jpeg_quality: int = 90  # 1 to 100, if extracted

    def __post_init__(self) -> None:
        if self.frames not in ("video", "extracted"):
            raise ValueError(f"frames: must be 'video' or 'extracted', found {self.frames!r}")
        if self.frames_per_clip < 1 or self.frame_size < 1 or not 1 <= self.jpeg_quality <= 100:
            raise ValueError(
                "frames_per_clip and frame_size must be at least 1 and jpeg_quality 1 to 100, "
                f"found {self.frames_per_clip}, {self.frame_size} and {self.jpeg_quality}"
            )


def build_shards(
    items: Iterable[SourceItem],
    out_dir: Path | str,
    *,
    options: BuildOptions | None = None,
    provenance: Mapping[str, Any],
    max_records_per_shard: int = 1000,
    max_bytes: int = MAX_SHARD_BYTES,
    workers: int = 1,
    strict: bool = True,
    amend: Amend | None = None,
    fresh: bool = False,
    progress: Callable[[int], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> ShardIndex:
    """Write a shard folder and load its index.

    Args:
        items: the same items in the same order at every start; a record factory must be picklable
            if there is more than one worker.
        provenance: where the records come from; JSON values, stored in index.json unchanged, with
            `skipped` and `suspicious` (source -> reason -> count) added where there are any. A
            killed build resumes only with the same provenance and options.
        max_bytes: largest size of a tar, unless a single record is larger.
        workers: processes that make and pack records; 1 = this process.
        strict: stop at a clip that cannot become a record; otherwise list it in skipped.jsonl.
        amend: applied to every record before it is stored (curation, annotations).
        fresh: discard what a killed build has left.
        progress: called with the number of items done so far, once per item; the first call
            includes the items that an earlier start has finished.
        notice: called with a sentence about a suspicious record, and when finished shards of an
            earlier start are built again because a media file has changed.

    Raises:
        ValueError: the folder is not empty, there is no record, a record is too large, a key is not
            unique, or (strict) a clip does not decode to the record's `num_frames` or was skipped.
    """
    out_dir = Path(out_dir).resolve()  # a link stays, the folder behind it is replaced
    options = options or BuildOptions()
    if max_records_per_shard < 1 or max_bytes < 1:
        raise ValueError(
            "max_records_per_shard and max_bytes must be at least 1, found "
            f"{max_records_per_shard} and {max_bytes}"
        )
    if workers < 1:
        raise ValueError(f"build: workers must be at least 1, found {workers}")
    _require_empty(out_dir)
    limits = {"max_records_per_shard": max_records_per_shard, "max_bytes": max_bytes}
    identity = {
        "schema_version": SCHEMA_VERSION,
        "options": asdict(options),
        "provenance": dict(provenance),
        "limits": limits,
    }
    journal = BuildJournal.open(out_dir, identity, fresh=fresh)
    try:
        source = iter(items)
        outdated = journal.drop_outdated(source, notice)
        output = _ShardSequence(journal, max_records_per_shard, max_bytes, strict, progress, notice)
        prepare = partial(_prepare, options, amend, strict)
        with closing(ordered_map(prepare, chain(outdated, source), workers=workers)) as results:
            shards = output.write(results)
        remarks: dict[str, list[Remark]] = {
            SKIPPED_FILE: [*output.skipped],
            SUSPICIOUS_FILE: [*output.suspicious],
        }
        for name, rows in remarks.items():
            if rows:
                (journal.shards / name).write_text(remark_lines(rows), encoding="ascii")
                provenance = {**provenance, Path(name).stem: count_remarks(rows)}
        write_index(journal.shards, shards, options=asdict(options), provenance=provenance)
        ShardIndex.load(journal.shards)
        journal.publish(out_dir)
    except BaseException:
        if journal.has_finished():
            journal.close()
        else:
            journal.remove()
        raise
    return ShardIndex.load(out_dir)


def _require_empty(out_dir: Path) -> None:
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(
            f"build: the output folder must be new or empty, found {out_dir}; remove it or name "
            "another one"
        )
    if out_dir == Path.cwd() or out_dir.is_mount():
        what = "a mount point" if out_dir.is_mount() else "the working directory"
        raise ValueError(
            f"build: {out_dir} is {what}, which the finished folder cannot replace; name a folder "
            "in it"
        )


def extract_frames(record: Record, count: int, size: int, quality: int) -> Record:
    """The record with its video replaced by JPEGs: `count` clip frames and the peak frame.

    Raises:
        ValueError: no video to extract from, or it is damaged; names the key.
    """
    if not isinstance(record.media, Video):
        raise ValueError(f"record {record.key}: frames can be extracted from a video only")
    wanted = list(clip_indices(record.num_frames, count))
    if record.peak_frame is not None:
        wanted.append(record.peak_frame)
    try:
        frames = decode_frames(record.media.mp4, wanted)
    except ValueError as error:
        raise ValueError(f"record {record.key}: {error}") from error
    jpegs = [jpeg_encode(resize_frame(frame, size), quality) for frame in frames]
    peak = jpegs[count] if record.peak_frame is not None else None
    return replace(record, media=Frames(jpegs=tuple(jpegs[:count]), peak_jpeg=peak))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    """A record as it goes into a shard."""

    packed: Packed
    suspicious: tuple[Suspicious, ...]


_Result: TypeAlias = _Stored | Skipped


def _suspicious(record: Record) -> Iterator[Suspicious]:
    for detail in text_findings(record):
        yield Suspicious(
            key=record.key, source=record.source, split=record.split, reason="text", detail=detail
        )


def _prepare(
    options: BuildOptions,
    amend: Amend | None,
    strict: bool,
    item: SourceItem,
) -> tuple[_Result, FileStamp | None]:
    """Everything that costs time, for one item; runs in the workers.

    The stamp is taken first: a file that changes while it is read counts as changed.
    """
    stamp = file_stamp(item)
    return _pack(options, amend, strict, item), stamp


def _pack(options: BuildOptions, amend: Amend | None, strict: bool, item: SourceItem) -> _Result:
    record = item if isinstance(item, (Record, Skipped)) else item()
    if amend is not None and isinstance(record, Record):
        record = amend(record)
    if isinstance(record, Skipped):
        return record
    try:
        packed = pack_record(_stored_form(record, options))
        return _Stored(packed=packed, suspicious=tuple(_suspicious(record)))
    except ValueError as error:
        if strict:
            raise
        return Skipped(
            key=record.key,
            source=record.source,
            split=record.split,
            reason="media-damaged",
            detail=str(error).removeprefix(f"record {record.key}: "),
        )


def _stored_form(record: Record, options: BuildOptions) -> Record:
    if isinstance(record.media, Video):
        try:
            num_frames = count_frames(record.media.mp4)
        except ValueError as error:
            raise ValueError(
                f"record {record.key}: {error}; remove the clip or make it again"
            ) from error
        if num_frames != record.num_frames:
            raise ValueError(
                f"record {record.key}: num_frames must be what the video has, found "
                f"{record.num_frames}, the video has {num_frames}"
            )
    if options.frames == "video":
        return record
    return extract_frames(record, options.frames_per_clip, options.frame_size, options.jpeg_quality)


class _ShardSequence:
    """Writes the shards that are not finished yet, and records each in the journal when it is.

    A shard holds consecutive records. Only the limits decide how many, so a resumed build cuts its
    shards where an undisturbed one does.
    """

    def __init__(
        self,
        journal: BuildJournal,
        max_records: int,
        max_bytes: int,
        strict: bool,
        progress: Callable[[int], None] | None,
        notice: Callable[[str], None] | None,
    ) -> None:
        self._journal = journal
        self._limits = max_records, max_bytes
        self._strict = strict
        self._progress = progress
        self._notice = notice
        self._shards: list[ShardInfo] = [shard.info for shard in journal.finished]
        self._keys = {key for shard in journal.finished for key in shard.keys}
        self._items = journal.finished[-1].items if journal.finished else 0
        # Since the last finished shard: what was remarked, and the stamp of each item's file.
        self._skipped_since: list[Skipped] = []
        self._suspicious_since: list[Suspicious] = []
        self._stamps_since: list[FileStamp | None] = []
        self.skipped = [row for shard in journal.finished for row in shard.skipped]
        self.suspicious = [row for shard in journal.finished for row in shard.suspicious]

    def write(self, results: Iterable[tuple[_Result, FileStamp | None]]) -> tuple[ShardInfo, ...]:
        """Write the results of all items after the last finished shard; returns all shards."""
        if self._items and self._progress is not None:
            self._progress(self._items)
        writer: ShardWriter | None = None
        try:
            for result, stamp in results:
                if isinstance(result, Skipped):
                    self._skip(result)
                else:
                    packed = result.packed
                    self._require_new(packed.key)
                    if writer is not None and writer.is_full(len(packed.blocks), *self._limits):
                        self._finish(writer)
                        writer = None
                    if writer is None:
                        name = f"shard-{len(self._shards):06d}.tar"
                        writer = ShardWriter(self._journal.shards / name)
                    writer.add(packed)
                    self._keys.add(packed.key)
                    self._remark(result.suspicious)
                self._items += 1
                self._stamps_since.append(stamp)
                if self._progress is not None:
                    self._progress(self._items)
            if writer is not None:
                self._finish(writer)
                writer = None
        finally:
            if writer is not None:
                writer.close()
        if not self._shards:
            raise ValueError(
                "build: the source gave no record; check its path, split and limits"
                f"{self._skipped_summary()}"
            )
        return tuple(self._shards)

    def _skipped_summary(self) -> str:
        """How many clips were skipped and why: a failed build leaves no skipped.jsonl."""
        if not self.skipped:
            return ""
        counts = Counter(row.reason for row in self.skipped)
        listed = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        return f"; left out were {listed}; the first: {self.skipped[0]}"

    def _require_new(self, key: str) -> None:
        if key in self._keys:
            raise ValueError(
                f"record {key}: a key must be unique in the dataset, found it twice; rename one "
                "of the records in its source"
            )

    def _skip(self, row: Skipped) -> None:
        if self._strict and row.reason != BY_CURATION:
            raise ValueError(
                f"record {row.key}: {row.reason}: {row.detail}; without strict the clip would be "
                "left out and listed"
            )
        self._skipped_since.append(row)
        self.skipped.append(row)

    def _remark(self, rows: tuple[Suspicious, ...]) -> None:
        for row in rows:
            self._suspicious_since.append(row)
            self.suspicious.append(row)
            if self._notice is not None and len(self.suspicious) <= _SHOWN_SUSPICIOUS:
                self._notice(f"suspicious: record {row.key}: {row.detail}")
            elif self._notice is not None and len(self.suspicious) == _SHOWN_SUSPICIOUS + 1:
                self._notice(f"suspicious: there are more; {SUSPICIOUS_FILE} lists all")

    def _finish(self, writer: ShardWriter) -> None:
        info = writer.finish()
        self._journal.mark_finished(
            len(self._shards),
            info=info,
            items=self._items,
            skipped=self._skipped_since,
            suspicious=self._suspicious_since,
            media=self._stamps_since,
        )
        self._shards.append(info)
        self._skipped_since, self._suspicious_since, self._stamps_since = [], [], []
