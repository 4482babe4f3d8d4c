"""MELD: the three csv files and the clips of MELD.Raw as drafts (tasks MSA and ER).

In: the folder as downloaded. Out: rows in the order of the files, drafts whose keys carry the
split (the clips' own names repeat in all three), what is known to be broken about a clip, and the
clips that no row describes. Facts: declare-lab/MELD@2d2011b; issue numbers are that repository's.
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from data_shards.build.clip_record import Clip, Draft
from data_shards.jsonl import read_utf8
from data_shards.sources.raw_files import csv_rows, find_files, find_one, parse_time, repair_text
from data_shards.tasks import EMOTIONS, Task

SPLITS: Final = ("train", "dev", "test")
SENTIMENT: Final = {"positive": 1.0, "neutral": 0.0, "negative": -1.0}
_COLUMNS: Final = (
    *("Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID"),
    *("Season", "Episode", "StartTime", "EndTime"),
)
# Where public loaders find the clips of MELD.Raw; a flat folder named after the split works too.
_CLIP_FOLDERS: Final = {
    "train": ("train/train_splits", "train_splits", "train"),
    "dev": ("dev/dev_splits_complete", "dev_splits_complete", "dev"),
    "test": ("test/output_repeated_splits_test", "output_repeated_splits_test", "test"),
}
_CLIP_NAME: Final = re.compile(r"dia(\d+)_utt(\d+)\.mp4")
_GROUP: Final = re.compile(r"^(all|both|everyone|the guys|the girls)$|\band\b|/|&", re.IGNORECASE)

# Known before the file is opened. 'left out' only where the rule `known_bad` says so.
KNOWN_BAD: Final[dict[tuple[str, int, int], str]] = {
    ("train", 125, 3): "corrupt (MELD issues 39 and 52)",
    ("dev", 110, 7): "missing from the download (MELD issues 22 and 27)",
    ("test", 38, 4): "badly cut, 305 s (MELD issue 20)",
    ("test", 220, 0): "badly cut, 235 s (MELD issue 20)",
    ("train", 309, 0): "badly cut, 41 s (MELD issue 20)",
    ("test", 279, 15): "listed as problematic by MERTools",
}
# Text and video out of sync, by dialogue (issue 9); 757 and 485 exist in train alone.
OUT_OF_SYNC: Final = frozenset({("train", 241), ("train", 757), ("train", 485)})

KnownBad = Literal["skip-train", "skip", "keep"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MeldRow:
    """One row of a csv; the ids are the file's own, neither is a position."""

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
        """The clip's file name without its end; the same in all splits."""
        return f"dia{self.dialogue}_utt{self.utterance_id}"

    @property
    def key(self) -> str:
        return f"meld_{self.split}_{self.name}"

    @property
    def is_group(self) -> bool:
        """Several people speak, so that no single face is the speaker's."""
        return bool(_GROUP.search(self.speaker))

    @property
    def identity(self) -> tuple[int, int, float, str]:
        """Equal for two rows of the same moment of the series with the same words."""
        return self.season, self.episode, self.start_s, self.text


def annotation_files(folder: Path, splits: Sequence[str] = SPLITS) -> dict[str, Path]:
    """Split -> its csv. Raises FileNotFoundError or ValueError (two different copies)."""
    return {
        split: find_one([folder], [f"{split}_sent_emo.csv"], what=f"MELD {split} annotation")
        for split in splits
    }


def read_meld(folder: Path, splits: Sequence[str] = SPLITS) -> list[MeldRow]:
    """All rows of the splits in the order of the files.

    Raises:
        FileNotFoundError: no folder or no csv.
        ValueError: names file and line: another header, label, time or number than MELD's, or
            the same clip twice.
    """
    rows: list[MeldRow] = []
    for split, path in annotation_files(folder, splits).items():
        rows += _read_csv(path, split)
    return rows


def _read_csv(path: Path, split: str) -> Iterator[MeldRow]:
    seen: set[str] = set()
    # No splitlines(): it would cut at U+0085, which old copies hold for an ellipsis.
    reader = csv.DictReader(io.StringIO(read_utf8(path), newline=""), strict=True)
    missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{path}:1: column {missing[0]}: must be in the header, found none")
    for fields in csv_rows(reader, path):
        try:
            row = _row(fields, split)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{reader.line_num}: {error}") from error
        if row.name in seen:
            raise ValueError(f"{path}:{reader.line_num}: {row.name} comes twice in {split}")
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
    """The clips of MELD.Raw by (split, dialogue, utterance)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths: dict[tuple[str, int, int], Path] = {}
        self._strangers: list[Path] = []
        for split, places in _CLIP_FOLDERS.items():
            place = next((folder / p for p in places if any((folder / p).glob("*.mp4"))), None)
            for path in find_files([place], "*.mp4", depth=0) if place is not None else []:
                match = _CLIP_NAME.fullmatch(path.name)
                if match is None:
                    self._strangers.append(path)
                else:
                    self._paths[split, int(match[1]), int(match[2])] = path

    def __len__(self) -> int:
        return len(self._paths)

    def clip(self, split: str, dialogue: int, utterance_id: int) -> Clip:
        """Where a clip is; without a path, where it should be."""
        name = f"dia{dialogue}_utt{utterance_id}.mp4"
        looked_for = str(self.folder / _CLIP_FOLDERS[split][0] / name)
        return Clip(path=self._paths.get((split, dialogue, utterance_id)), looked_for=looked_for)

    def without_annotation(self, rows: Sequence[MeldRow]) -> list[Path]:
        """Files that no row of the annotation describes, among them `final_videos_test...`."""
        known = {(row.split, row.dialogue, row.utterance_id) for row in rows}
        splits = {row.split for row in rows}
        rest = [p for place, p in self._paths.items() if place[0] in splits and place not in known]
        return sorted([*rest, *self._strangers])


def known_issue(row: MeldRow) -> str:
    """What is known to be wrong with the row's clip; empty for nothing."""
    if (row.split, row.dialogue) in OUT_OF_SYNC:
        return "text and video out of sync (MELD issue 9)"
    return KNOWN_BAD.get((row.split, row.dialogue, row.utterance_id), "")


def is_left_out(row: MeldRow, rule: KnownBad) -> bool:
    """Whether a clip of KNOWN_BAD is left out: in train only (an evaluation keeps the whole test
    set), everywhere, or nowhere. Clips out of sync are only noted."""
    listed = (row.split, row.dialogue, row.utterance_id) in KNOWN_BAD
    return listed and (rule == "skip" or (rule == "skip-train" and row.split == "train"))


def repeats(rows: Sequence[MeldRow]) -> dict[str, list[MeldRow]]:
    """Rows of the same moment and words, by where the first one stands: 'train', 'train+test'..."""
    groups: dict[tuple[int, int, float, str], list[MeldRow]] = {}
    for row in rows:
        groups.setdefault(row.identity, []).append(row)
    found: dict[str, list[MeldRow]] = {}
    for group in groups.values():
        if len(group) > 1:
            splits = "+".join(split for split in SPLITS if any(r.split == split for r in group))
            found.setdefault(splits, []).extend(group[1:])
    return found


def meld_draft(row: MeldRow, clips: MeldClips, *, neutral_msa: bool = True) -> Draft:
    """The draft of one row. neutral_msa: whether rows without sentiment serve MSA too (Table I
    counts every row; a sentiment of 0 is non-negative)."""
    issue = known_issue(row)
    serves_msa = neutral_msa or row.sentiment != "neutral"
    return Draft(
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
        clip=clips.clip(row.split, row.dialogue, row.utterance_id),
    )
