"""CMU-MOSEI: labels, words and clips of its editions, joined, as pending records (tasks MSA, ER).

In: a folder with MMSA's label.csv and Raw/, or with the SDK's csd (or the per-segment table), the
raw transcripts, the folds and whole videos. With label.csv and the csd, MMSA's clips get the
emotions of the csd. Out: segments, counts of what could not be joined, pending records.
Flow: mosei_files -> here -> build.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from data_shards.build.clip_record import Clip, PendingRecord
from data_shards.sources.mosei_files import (
    CSD_EMOTIONS,
    Interval,
    LabelRow,
    Line,
    read_csd,
    read_folds,
    read_label_csv,
    read_table,
    read_transcript,
)
from data_shards.sources.raw_files import find_files, find_one
from data_shards.tasks import Task

EmotionRule = Literal["strongest", "single"]
Ties = Literal["first", "skip"]
_SAME_TIME_S: Final = 0.5  # transcripts and csd round differently; all segments are longer
_SAME_SENTIMENT: Final = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One labelled segment of a video."""

    video: str
    clip: str  # number of the clip file, or 'i' and the index of the label
    text: str
    sentiment: float
    split: str
    start_s: float | None = None  # in the whole video
    end_s: float | None = None
    intensities: tuple[float, ...] | None = None  # per CSD_EMOTIONS

    @property
    def key(self) -> str:
        """Unique, because a clip has no '_': the last one always ends the video's id."""
        return f"mosei_{self.video}_{self.clip}"


@dataclass(frozen=True, kw_only=True, slots=True)
class MoseiCorpus:
    """The segments of a folder. `joined` counts segments, and videos that could not be joined.

    `unplaced`: names of videos by why they give no segment, for example 'videos-in-no-fold'.
    """

    edition: Literal["mmsa", "csd", "table"]
    segments: tuple[Segment, ...]
    joined: Mapping[str, int]
    unplaced: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    files: tuple[Path, ...]


def load_mosei(folder: Path) -> MoseiCorpus:
    """Read the labels of a folder.

    Raises:
        FileNotFoundError: no label file, or the csd without folds or transcripts.
        ValueError: a file is not as published.
    """
    labels, csds, tables = (
        find_files([folder], name)
        for name in ("label.csv", "CMU_MOSEI_Labels.csd", "CMU_MOSEI_Labels.csv")
    )
    if not labels and not csds and not tables:
        raise FileNotFoundError(
            f"MOSEI labels: no file label.csv (MMSA), CMU_MOSEI_Labels.csd (SDK) or "
            f"CMU_MOSEI_Labels.csv in {folder} or below"
        )
    if labels:
        rows = read_label_csv(labels[0])
        intervals = read_csd(csds[0]) if csds else []
        segments, joined = join_by_rank(rows, intervals)
        files = (labels[0], *csds[:1])
        return MoseiCorpus(edition="mmsa", segments=segments, joined=joined, files=files)
    path = (csds or tables)[0]
    intervals = read_csd(path) if csds else read_table(path)
    folds, more = {}, []
    if csds or find_files([folder], "standard_folds.json"):
        fold = find_one([folder], ["*std_folds.py", "standard_folds.json"], what="MOSEI folds")
        folds, more = read_folds(fold), [fold]
    segments, joined = join_by_time(intervals, _transcripts(folder), folds)
    return MoseiCorpus(
        edition="csd" if csds else "table",
        segments=segments,
        joined=joined,
        unplaced=_unplaced(intervals, folds),
        files=(path, *more),
    )


def _unplaced(
    intervals: Sequence[Interval], folds: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Videos with labels that are in no fold, and videos of the folds that have no labels."""
    labelled = {interval.video for interval in intervals}
    placed = set(folds) if folds else {i.video for i in intervals if i.split}
    videos = {
        "videos-in-no-fold": tuple(sorted(labelled - placed)),
        "videos-of-folds-without-labels": tuple(sorted(set(folds) - labelled)),
    }
    return {why: names for why, names in videos.items() if names}


def _transcripts(folder: Path) -> Callable[[str], list[Line]]:
    """A function from a video to the lines of its transcript; no lines if there is no file."""
    paths = {
        path.stem: path for path in find_files([folder], "Transcript/Segmented/Combined/*.txt")
    }
    paths |= {path.stem: path for path in find_files([folder], "Combined/*.txt")}
    return lambda video: read_transcript(paths[video]) if video in paths else []


def join_by_rank(
    rows: Sequence[LabelRow], intervals: Sequence[Interval]
) -> tuple[tuple[Segment, ...], dict[str, int]]:
    """MMSA's rows with the times and emotions of the csd.

    Within a video, the n-th clip number is paired with the interval that ends as the n-th: in 1,318
    of 3,293 videos the csd is not sorted by time. A video gets no emotions if the counts differ, or
    if any sentiment differs, which proves a wrong pairing.
    """
    spans: defaultdict[str, list[Interval]] = defaultdict(list)
    for interval in intervals:
        spans[interval.video].append(interval)
    clips: defaultdict[str, list[LabelRow]] = defaultdict(list)
    for row in rows:
        clips[row.video].append(row)
    partner: dict[tuple[str, str], Interval] = {}
    joined: Counter[str] = Counter({"segments": len(rows)})
    for video, listed in clips.items():
        ranked = sorted(spans[video], key=lambda interval: (interval.end_s, interval.start_s))
        listed = sorted(listed, key=lambda row: int(row.clip))
        if len(ranked) != len(listed):
            joined["videos_counts_differ"] += bool(intervals)
        elif any(
            abs(a.sentiment - b.sentiment) > _SAME_SENTIMENT
            for a, b in zip(listed, ranked, strict=True)
        ):
            joined["videos_sentiment_differs"] += 1
        else:
            pairs = zip(listed, ranked, strict=True)
            partner |= {(row.video, row.clip): interval for row, interval in pairs}
    joined["segments_with_emotions"] = len(partner)
    segments = []
    for row in rows:
        match = partner.get((row.video, row.clip))
        segments.append(
            Segment(
                video=row.video,
                clip=row.clip,
                text=row.text,
                sentiment=row.sentiment,
                split=row.split,
                start_s=None if match is None else match.start_s,
                end_s=None if match is None else match.end_s,
                intensities=None if match is None else match.intensities,
            )
        )
    return tuple(segments), dict(joined)


def join_by_time(
    intervals: Sequence[Interval],
    transcript_of: Callable[[str], Sequence[Line]],
    folds: Mapping[str, str],
) -> tuple[tuple[Segment, ...], dict[str, int]]:
    """Intervals with the words spoken in them: the transcript line of the same start and end.

    The clip gets the number of the line, and no line is used twice. An interval without a line is
    named after its index in the file ('i7') and has no words. Videos in no fold are left out.
    """
    joined: Counter[str] = Counter()
    segments: list[Segment] = []
    lines: dict[str, list[Line]] = {}
    for interval in intervals:
        split = folds.get(interval.video, "") if folds else interval.split
        if not split:
            joined["segments_in_no_fold"] += 1
            continue
        if interval.video not in lines:
            lines[interval.video] = list(transcript_of(interval.video))
        line = _nearest(interval, lines[interval.video])
        if line is not None:
            lines[interval.video].remove(line)
        joined["segments"] += 1
        joined["segments_without_words"] += line is None
        if line is not None and line.was_repaired:
            joined["segments_with_repaired_words"] += 1
        joined["segments_start_below_zero"] += interval.start_s < 0
        segments.append(
            Segment(
                video=interval.video,
                clip=f"i{interval.index}" if line is None else line.index,
                text="" if line is None else line.text,
                sentiment=interval.sentiment,
                split=split,
                start_s=interval.start_s,
                end_s=interval.end_s,
                intensities=interval.intensities,
            )
        )
    return tuple(segments), dict(joined)


def _nearest(interval: Interval, lines: Sequence[Line]) -> Line | None:
    def distance(line: Line) -> float:
        return max(abs(line.start_s - interval.start_s), abs(line.end_s - interval.end_s))

    best = min(lines, key=distance, default=None)
    return best if best is not None and distance(best) <= _SAME_TIME_S else None


def emotion_of(
    intensities: Sequence[float], rule: EmotionRule = "strongest", ties: Ties = "first"
) -> str | None:
    """The emotion of a segment with intensities 0 to 3; None if it has no single one.

    A segment with all intensities 0 is neutral. The rule 'strongest' takes the highest intensity;
    `ties` decides between equally high ones: the first in the csd's order, or no emotion. The rule
    'single' gives no emotion if more than one is above 0.
    """
    top = max(intensities)
    if top <= 0:
        return "neutral"
    if rule == "single" and sum(value > 0 for value in intensities) > 1:
        return None
    best = [name for name, value in zip(CSD_EMOTIONS, intensities, strict=True) if value == top]
    return best[0] if len(best) == 1 or ties == "first" else None


class MoseiClips:
    """The media of segments: clip files <video>/<clip>.mp4, or whole videos <video>.mp4."""

    def __init__(self, folder: Path) -> None:
        folders = (folder / "Raw", folder)
        with_clips = (f for f in folders if any(f.glob("*/[0-9]*.mp4")))
        self._clips = next(with_clips, folders[0])
        whole = [*find_files([folder], "Full/Combined/*.mp4"), *find_files([folder], "Full/*.mp4")]
        whole = whole or find_files([folder], "*.mp4", depth=0)
        self._whole = {path.stem: path for path in whole}

    def clip(self, segment: Segment) -> Clip:
        """The clip file if there is one, else a span of the whole video."""
        path = self._clips / segment.video / f"{segment.clip}.mp4"
        if path.is_file():
            return Clip(path=path)
        if segment.video in self._whole and segment.end_s is not None:
            whole = self._whole[segment.video]
            return Clip(path=whole, start_s=segment.start_s, end_s=segment.end_s)
        return Clip(path=None, expected=str(path))


def mosei_record(
    segment: Segment,
    clips: MoseiClips,
    *,
    rule: EmotionRule = "strongest",
    ties: Ties = "first",
    neutral_msa: bool = True,
    still: bool = False,
) -> PendingRecord | None:
    """The pending record of a segment; None if it serves neither MSA nor ER.

    Args:
        rule, ties: see `emotion_of`.
        neutral_msa: whether segments with a sentiment of 0 serve MSA.
        still: store one frame instead of the clip.
    """
    emotion = None if segment.intensities is None else emotion_of(segment.intensities, rule, ties)
    tasks = (
        *((Task.MSA,) if neutral_msa or segment.sentiment != 0 else ()),
        *((Task.ER,) if emotion is not None else ()),
    )
    if not tasks:
        return None
    notes: dict[str, Any] = {"video": segment.video, "clip": segment.clip}
    if segment.start_s is not None and segment.end_s is not None:
        notes |= {"start_s": segment.start_s, "end_s": segment.end_s}
    if segment.intensities is not None:
        notes |= dict(zip(CSD_EMOTIONS, segment.intensities, strict=True))
    return PendingRecord(
        key=segment.key,
        source="mosei",
        split=segment.split,
        utterance=segment.text,
        speaker="",
        sentiment=segment.sentiment,
        emotion=emotion,
        tasks=tasks,
        notes=notes,
        clip=clips.clip(segment),
        still=still,
    )
