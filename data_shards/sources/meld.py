"""MELD: the three csv files and the clips of MELD.Raw as pending records (tasks MSA and ER).

In: the folder as downloaded. Out: the rows in the order of the files, a pending record per row, the
known defects of clips, and the clip files that no row describes. Keys contain the split, because
the clips of all three splits have the same names. Facts are from declare-lab/MELD@2d2011b; issue
numbers are of that repository.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple

from data_shards.build.clip_record import Clip, PendingRecord
from data_shards.sources.raw_files import find_one, parse_time, read_csv, repair_text
from data_shards.tasks import EMOTIONS, Task

SPLITS: Final = ("train", "dev", "test")
SENTIMENT: Final = {"positive": 1.0, "neutral": 0.0, "negative": -1.0}
_COLUMNS: Final = (
    *("Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID"),
    *("Season", "Episode", "StartTime", "EndTime"),
)
# Folders of the clips in MELD.Raw, as public loaders expect them; or a folder named like the split.
_CLIP_FOLDERS: Final = {
    "train": ("train/train_splits", "train_splits", "train"),
    "dev": ("dev/dev_splits_complete", "dev_splits_complete", "dev"),
    "test": ("test/output_repeated_splits_test", "output_repeated_splits_test", "test"),
}
_CLIP_NAME: Final = re.compile(r"dia(\d+)_utt(\d+)\.mp4")
_GROUP: Final = re.compile(r"^(all|both|everyone|the guys|the girls)$|\band\b|/|&", re.IGNORECASE)

# Defects that others have reported. The option `known_bad` decides whether the clip is left out.
KNOWN_BAD: Final[dict[tuple[str, int, int], str]] = {
    ("train", 125, 3): "corrupt (MELD issues 39 and 52)",
    ("dev", 110, 7): "missing from the download (MELD issues 22 and 27)",
    ("test", 38, 4): "badly cut, 305 s (MELD issue 20)",
    ("test", 220, 0): "badly cut, 235 s (MELD issue 20)",
    ("train", 309, 0): "badly cut, 41 s (MELD issue 20)",
    ("test", 279, 15): "listed as problematic by MERTools",
}
# Dialogues whose text and video are out of sync (issue 9); 757 and 485 exist in train only.
OUT_OF_SYNC: Final = frozenset({("train", 241), ("train", 757), ("train", 485)})

KnownBad = Literal["skip-train", "skip", "keep"]
Moment = tuple[int, int, float, str]  # season, episode, start in seconds, words


class MeldClipId(NamedTuple):
    """A MELD clip; its ids do not count from 1."""

    split: str
    dialogue: int
    utterance_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MeldRow:
    """One row of a csv; the ids are those of the file and not positions in it."""

    split: str
    dialogue: int
    utterance_id: int
    text: str
    speaker: str
    emotion: str
    sentiment: str  # 'positive', 'neutral' or 'negative'
    season: int
    episode: int
    start_s: float  # in the episode
    end_s: float

    @property
    def name(self) -> str:
        """The clip's file name without extension; not unique across splits."""
        return f"dia{self.dialogue}_utt{self.utterance_id}"

    @property
    def clip_id(self) -> MeldClipId:
        return MeldClipId(self.split, self.dialogue, self.utterance_id)

    @property
    def key(self) -> str:
        return f"meld_{self.split}_{self.name}"

    @property
    def is_group(self) -> bool:
        """Whether several people speak, so that no single face is the speaker's."""
        return bool(_GROUP.search(self.speaker))

    @property
    def moment(self) -> Moment:
        """Equal for two rows with the same words at the same moment of the series."""
        return self.season, self.episode, self.start_s, self.text


def annotation_files(folder: Path, splits: Sequence[str] = SPLITS) -> dict[str, Path]:
    """Split -> csv file. Raises FileNotFoundError, or ValueError for two different copies."""
    return {
        split: find_one([folder], [f"{split}_sent_emo.csv"], what=f"MELD {split} annotation")
        for split in splits
    }


def read_meld(folder: Path, splits: Sequence[str] = SPLITS) -> list[MeldRow]:
    """All rows of the splits in the order of the files.

    Raises:
        FileNotFoundError: no folder or no csv.
        ValueError: a header, label, time or number is not as in MELD, or a clip is listed twice;
            names file and line.
    """
    rows: list[MeldRow] = []
    for split, path in annotation_files(folder, splits).items():
        rows += _read_csv(path, split)
    return rows


def _read_csv(path: Path, split: str) -> Iterator[MeldRow]:
    seen: set[str] = set()
    for line, fields in read_csv(path, _COLUMNS):
        try:
            row = _row(fields, split)
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from error
        if row.name in seen:
            raise ValueError(f"{path}:{line}: {row.name} comes twice in {split}")
        seen.add(row.name)
        yield row


def _row(fields: dict[str, str], split: str) -> MeldRow:
    emotion, sentiment = fields["Emotion"].strip().lower(), fields["Sentiment"].strip().lower()
    if emotion not in EMOTIONS:
        raise ValueError(f"Emotion: must be one of {', '.join(EMOTIONS)}, found {emotion!r}")
    if sentiment not in SENTIMENT:
        raise ValueError(f"Sentiment: must be one of {', '.join(SENTIMENT)}, found {sentiment!r}")
    return MeldRow(
        split=split,
        dialogue=int(fields["Dialogue_ID"]),
        utterance_id=int(fields["Utterance_ID"]),
        text=repair_text(fields["Utterance"]),
        speaker=repair_text(fields["Speaker"]),
        emotion=emotion,
        sentiment=sentiment,
        season=int(fields["Season"]),
        episode=int(fields["Episode"]),
        start_s=parse_time(fields["StartTime"]),
        end_s=parse_time(fields["EndTime"]),
    )


class MeldClips:
    """The clip files of MELD.Raw by (split, dialogue, utterance)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths: dict[MeldClipId, Path] = {}
        self._other_files: list[Path] = []  # not named like a clip
        for split, names in _CLIP_FOLDERS.items():
            folders = (folder / name for name in names)
            clips = next((paths for f in folders if (paths := sorted(f.glob("*.mp4")))), [])
            for path in clips:
                match = _CLIP_NAME.fullmatch(path.name)
                if match is None:
                    self._other_files.append(path)
                else:
                    self._paths[MeldClipId(split, int(match[1]), int(match[2]))] = path

    def __len__(self) -> int:
        return len(self._paths)

    def clip(self, clip_id: MeldClipId) -> Clip:
        """The clip file, or where it should be."""
        name = f"dia{clip_id.dialogue}_utt{clip_id.utterance_id}.mp4"
        expected = str(self.folder / _CLIP_FOLDERS[clip_id.split][0] / name)
        return Clip(path=self._paths.get(clip_id), expected=expected)

    def without_annotation(self, rows: Sequence[MeldRow]) -> list[Path]:
        """Files that no row of the annotation describes, among them `final_videos_test...`."""
        annotated = {row.clip_id for row in rows}
        splits = {row.split for row in rows}
        unannotated = [
            path
            for clip_id, path in self._paths.items()
            if clip_id.split in splits and clip_id not in annotated
        ]
        return sorted([*unannotated, *self._other_files])


def known_issue(row: MeldRow) -> str:
    """The known defect of the row's clip; empty for none."""
    if (row.split, row.dialogue) in OUT_OF_SYNC:
        return "text and video out of sync (MELD issue 9)"
    return KNOWN_BAD.get(row.clip_id, "")


def is_left_out(row: MeldRow, rule: KnownBad) -> bool:
    """Whether a clip of KNOWN_BAD is left out: in train only (an evaluation keeps the whole test
    set), everywhere, or nowhere. Clips out of sync are never left out."""
    return row.clip_id in KNOWN_BAD and (
        rule == "skip" or (rule == "skip-train" and row.split == "train")
    )


def repeats(rows: Sequence[MeldRow]) -> dict[str, list[MeldRow]]:
    """Rows that repeat the moment and words of an earlier row.

    They are grouped by the splits in which the moment occurs: 'train', 'train+test', ...
    """
    groups: dict[Moment, list[MeldRow]] = {}
    for row in rows:
        groups.setdefault(row.moment, []).append(row)
    by_splits: dict[str, list[MeldRow]] = {}
    for group in groups.values():
        if len(group) > 1:
            splits = "+".join(split for split in SPLITS if any(r.split == split for r in group))
            by_splits.setdefault(splits, []).extend(group[1:])
    return by_splits


def meld_record(row: MeldRow, clips: MeldClips, *, neutral_msa: bool = True) -> PendingRecord:
    """The pending record of one row.

    Args:
        neutral_msa: whether rows with neutral sentiment serve MSA too (the paper's Table I counts
            every row, and a sentiment of 0 is non-negative).
    """
    issue = known_issue(row)
    serves_msa = neutral_msa or row.sentiment != "neutral"
    return PendingRecord(
        key=row.key,
        source="meld",
        split=row.split,
        utterance=row.text,
        speaker=row.speaker,
        sentiment=SENTIMENT[row.sentiment],
        emotion=row.emotion,
        tasks=(Task.MSA, Task.ER) if serves_msa else (Task.ER,),
        notes={
            "dialogue": row.dialogue,
            "utterance_id": row.utterance_id,
            "season": row.season,
            "episode": row.episode,
            "start_s": row.start_s,
            "end_s": row.end_s,
            "group_speaker": row.is_group,
            **({"media_issue": issue} if issue else {}),
        },
        clip=clips.clip(row.clip_id),
    )
