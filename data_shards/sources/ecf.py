"""ECF 1.0 and 2.0: conversations with emotion-cause pairs as pending records (task ECPE).

In: the folder(s) with the authors' files, in the text form or the JSON form of subtask 2. Out:
conversations, and one pending record per target utterance: the text of the conversation and the
clip of the target. ECF has its own numbers for conversations and clips; only the file
`all_data_pair_ECFvsMELD.txt` maps an utterance to its MELD clip. Facts are from
NUSTM/MECPE@359c97c and NUSTM/SemEval-2024_ECAC@f605436.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from data_shards.build.clip_record import Clip, PendingRecord
from data_shards.jsonl import read_utf8
from data_shards.shards.record import Turn
from data_shards.sources.meld import MeldClipId
from data_shards.sources.raw_files import find_files, find_one, parse_time, repair_text
from data_shards.tasks import EMOTIONS, Pair, Task

Targets = Literal["with_cause", "emotional"]
Edition = Literal["2", "1"]
SPLITS_OF: Final[dict[str, tuple[str, ...]]] = {
    "2": ("train", "test"),
    "1": ("train", "dev", "test"),
}
ALL_FILE: Final = "all_data_pair.txt"
MELD_FILE: Final = "all_data_pair_ECFvsMELD.txt"

_HEAD: Final = re.compile(r"(\d+) (\d+)")
_PAIRS: Final = re.compile(r"(?:\(\d+,\d+\)(?:,(?=\()|$))*")
_SOURCE: Final = re.compile(r"Friends_S(\d+)E(\d+): (\S+) - (\S+)")
_EPISODE: Final = re.compile(r"S(\d{1,2})E(\d{1,2})")
_MELD_CLIP: Final = re.compile(r"(train|dev|test)_dia(\d+)_utt(\d+)")


class UtteranceId(NamedTuple):
    """An utterance of ECF; both numbers are ECF's own."""

    conversation: int
    utterance: int  # counted from 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Utterance:
    """One utterance. `number` counts from 1; without a time stamp the episode is empty."""

    number: int
    speaker: str
    emotion: str
    text: str
    episode: str = ""  # 'S01E01'
    start_s: float = 0.0
    end_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """One conversation; pairs are (emotion utterance, cause utterance), numbered from 1."""

    id: int
    utterances: tuple[Utterance, ...]
    pairs: tuple[tuple[int, int], ...]

    def targets(self, rule: Targets = "with_cause") -> tuple[int, ...]:
        """Target utterances: those with a cause, or all that are not neutral."""
        if rule == "with_cause":
            return tuple(sorted({target for target, _ in self.pairs}))
        return tuple(u.number for u in self.utterances if u.emotion != "neutral")


@dataclass(frozen=True, kw_only=True, slots=True)
class EcfCorpus:
    """The files of the given folders, read."""

    edition: Edition
    splits: Mapping[str, tuple[Conversation, ...]]
    meld_of: Mapping[UtteranceId, MeldClipId] | None  # None: the folders lack MELD_FILE
    files: tuple[Path, ...]


def load_ecf(
    folders: Sequence[Path], *, edition: Edition = "2", splits: Sequence[str] | None = None
) -> EcfCorpus:
    """Read ECF.

    Args:
        edition: '2' is that of SemEval-2024, whose training set is all of ECF 1.0; '1' has its own
            splits.
        splits: which to read, default all of the edition.

    Raises:
        FileNotFoundError: a folder, or the file of a split, is missing.
        ValueError: a file is not as published; names file and line or conversation.
    """
    files: list[Path] = []
    conversations: dict[str, tuple[Conversation, ...]] = {}
    for split in SPLITS_OF[edition] if splits is None else splits:
        path = find_one(folders, _patterns(edition, split), what=f"ECF {edition} {split}")
        files.append(path)
        read = read_json if path.suffix == ".json" else read_text
        conversations[split] = tuple(sorted(read(path), key=lambda conversation: conversation.id))
    maps = find_files(folders, MELD_FILE)
    if maps:
        files.append(maps[0])
    return EcfCorpus(
        edition=edition,
        splits=conversations,
        meld_of=read_meld_map(maps[0]) if maps else None,
        files=tuple(files),
    )


def _patterns(edition: Edition, split: str) -> list[str]:
    if split not in SPLITS_OF[edition]:
        rule = f"ECF {edition} has the splits {', '.join(SPLITS_OF[edition])}"
        raise ValueError(f"ECF split: {rule}, found {split!r}")
    if edition == "1":
        return [f"{split}.txt"]
    names = [f"Subtask_2_{split}.json", f"Subtask_2_{split}*.json"]
    return [*names, ALL_FILE] if split == "train" else names


# --------------------------------------------------------------------------------------- the files


def read_text(path: Path) -> tuple[Conversation, ...]:
    """The conversations of a text-form file; the line of the pairs may be empty."""
    conversations = []
    for block in _blocks(path):
        conversation = Conversation(
            id=block.conversation,
            utterances=tuple(_utterance(path, line, *columns) for line, columns in block.rows),
            pairs=tuple(sorted(block.pairs)),
        )
        _require_valid(conversation, str(path))
        conversations.append(conversation)
    return tuple(conversations)


def read_meld_map(path: Path) -> dict[UtteranceId, MeldClipId]:
    """The MELD clip of each utterance, without the utterances that MELD does not have."""
    clip_ids = {}
    for block in _blocks(path):
        for line, (number, _speaker, _emotion, _text, name) in block.rows:
            match = _MELD_CLIP.fullmatch(name)
            if match is not None:
                clip_id = MeldClipId(match[1], int(match[2]), int(match[3]))
                clip_ids[UtteranceId(block.conversation, int(number))] = clip_id
            elif name:
                rule = "the last column must be like train_dia559_utt3 or empty"
                raise ValueError(f"{path}:{line}: {rule}, found {name!r}")
    return clip_ids


class _Block(NamedTuple):
    """One conversation of a text-form file."""

    conversation: int
    pairs: tuple[tuple[int, int], ...]
    rows: list[tuple[int, list[str]]]  # line number in the file, the five columns


def _blocks(path: Path) -> Iterator[_Block]:
    """A block is a line 'conversation count', a line of pairs, and `count` lines of utterances."""
    lines = read_utf8(path).split("\n")
    start = 0  # index of the block's first line; line numbers in messages count from 1
    while start < len(lines):
        if not lines[start].strip():
            start += 1
            continue
        head = _HEAD.fullmatch(lines[start].strip())
        if head is None:
            rule = "a block must start with the conversation and its number of utterances"
            raise ValueError(f"{path}:{start + 1}: {rule}, found {lines[start]!r}")
        end = start + 2 + int(head[2])
        if end > len(lines):
            raise ValueError(f"{path}:{start + 1}: conversation {head[1]} is cut short")
        pairs = lines[start + 1].replace(" ", "")
        if not _PAIRS.fullmatch(pairs):
            rule = "the pairs must look like (3,1),(3,3) or the line be empty"
            raise ValueError(f"{path}:{start + 2}: {rule}, found {lines[start + 1]!r}")
        numbers = [int(digits) for digits in re.findall(r"\d+", pairs)]
        rows = []
        for utterance, line in enumerate(lines[start + 2 : end], start=1):
            columns = [column.strip() for column in line.split("|")]
            if len(columns) != 5 or columns[0] != str(utterance):
                rule = f"must be utterance {utterance} with five columns separated by ' | '"
                raise ValueError(f"{path}:{start + 2 + utterance}: {rule}, found {line!r}")
            rows.append((start + 2 + utterance, columns))
        yield _Block(int(head[1]), tuple(zip(numbers[::2], numbers[1::2], strict=True)), rows)
        start = end


def _utterance(
    path: Path, line: int, number: str, speaker: str, emotion: str, text: str, source: str
) -> Utterance:
    match = _SOURCE.fullmatch(source)
    if match is None:
        rule = "the last column must be like Friends_S1E1: 00:01:19.037 - 00:01:25.417"
        raise ValueError(f"{path}:{line}: {rule}, found {source!r}")
    return Utterance(
        number=int(number),
        speaker=repair_text(speaker),
        emotion=emotion,
        text=repair_text(text),
        episode=f"S{int(match[1]):02d}E{int(match[2]):02d}",
        start_s=parse_time(match[3]),
        end_s=parse_time(match[4]),
    )


def read_json(path: Path) -> tuple[Conversation, ...]:
    """The conversations of a JSON-form file, whose pairs look like [["3_surprise", "1"], ...]."""
    try:
        documents = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(documents, list):
            raise ValueError("must be a list of conversations")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    conversations = []
    for document in documents:
        identifier = document.get("conversation_ID") if isinstance(document, dict) else document
        where = f"{path}: conversation {identifier}"
        try:
            conversation = _conversation(document)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{where}: not as published: {error!r}") from error
        _require_valid(conversation, where)
        conversations.append(conversation)
    return tuple(conversations)


def _conversation(document: dict[str, Any]) -> Conversation:
    utterances = []
    for item in document["conversation"]:
        source = item.get("video_source") or ("", "0:00:00", "0:00:00")
        episode = _EPISODE.fullmatch(source[0])
        utterances.append(
            Utterance(
                number=int(item["utterance_ID"]),
                speaker=repair_text(item["speaker"]),
                emotion=item.get("emotion", "neutral"),
                text=repair_text(item["text"]),
                episode=f"S{int(episode[1]):02d}E{int(episode[2]):02d}" if episode else "",
                start_s=parse_time(source[1]),
                end_s=parse_time(source[2]),
            )
        )
    labels = {u.number: u.emotion for u in utterances}
    pairs = []
    for named, cause in document.get("emotion-cause_pairs", ()):
        number, _, emotion = named.partition("_")
        if labels.get(int(number)) != emotion:
            rule = f"utterance {number} has the emotion {labels.get(int(number))}"
            raise ValueError(f"pair {named}: {rule}")
        pairs.append((int(number), int(cause.partition("_")[0])))
    return Conversation(
        id=int(document["conversation_ID"]),
        utterances=tuple(utterances),
        pairs=tuple(sorted(pairs)),
    )


def _require_valid(conversation: Conversation, where: str) -> None:
    numbers = [u.number for u in conversation.utterances]
    if numbers != list(range(1, len(numbers) + 1)):
        raise ValueError(f"{where}: utterances must be numbered from 1, found {numbers}")
    for u in conversation.utterances:
        if u.emotion not in EMOTIONS:
            rule = f"an emotion must be one of {', '.join(EMOTIONS)}"
            raise ValueError(
                f"{where}: conversation {conversation.id}: {rule}, found {u.emotion!r}"
            )
    for pair in conversation.pairs:
        if not all(1 <= number <= len(numbers) for number in pair):
            rule = f"a pair must name utterances 1 to {len(numbers)}"
            raise ValueError(f"{where}: conversation {conversation.id}: {rule}, found {pair}")


# ------------------------------------------------------------------------------------- the records


@dataclass(frozen=True, kw_only=True, slots=True)
class EcfClips:
    """The three sources of ECF's clips; the first that has an utterance is used.

    own: clips named with ECF's own numbers, dia1375utt1.mp4. MELD clips must not be among them:
        dia3utt1 of ECF and dia3_utt1 of MELD are different moments.
    meld: clips of MELD, mapped by MELD_FILE.
    episodes: whole episodes ('S01E01'), from which clips are cut by time.
    """

    own: Mapping[UtteranceId, Path]
    meld: Mapping[UtteranceId, Clip]
    episodes: Mapping[str, Path]

    def clip(self, conversation: int, utterance: Utterance) -> Clip:
        utterance_id = UtteranceId(conversation, utterance.number)
        if utterance_id in self.own:
            return Clip(path=self.own[utterance_id])
        of_meld = self.meld.get(utterance_id)
        if of_meld is not None and of_meld.path is not None:
            return of_meld
        if utterance.episode in self.episodes:
            path = self.episodes[utterance.episode]
            return Clip(path=path, start_s=utterance.start_s, end_s=utterance.end_s)
        expected = [f"dia{conversation}utt{utterance.number}.mp4"]
        expected += [of_meld.expected] if of_meld is not None else []
        return Clip(path=None, expected=" or ".join([*expected, utterance.episode]))


def own_clips(folder: Path) -> dict[UtteranceId, Path]:
    """The clips of files named dia{conversation}utt{utterance}.mp4."""
    clips = {}
    for path in find_files([folder], "dia*utt*.mp4"):
        match = re.fullmatch(r"dia(\d+)utt(\d+)\.mp4", path.name)
        if match is None:
            rule = "clips of ECF are named dia1utt2.mp4; give MELD's own clips with --meld"
            raise ValueError(f"{path}: {rule}")
        clips[UtteranceId(int(match[1]), int(match[2]))] = path
    return clips


def episodes(folder: Path) -> dict[str, Path]:
    """'S01E01' -> the video whose name contains it. Raises ValueError for two of one episode."""
    videos: dict[str, Path] = {}
    for path in find_files([folder], "*.*"):
        match = re.search(r"s(\d{1,2})[ ._-]?e(\d{1,2})", path.name, re.IGNORECASE)
        if match is None or path.suffix.lower() not in (".mp4", ".mkv", ".avi", ".m4v", ".mov"):
            continue
        episode = f"S{int(match[1]):02d}E{int(match[2]):02d}"
        if episode in videos:
            raise ValueError(f"{path}: {episode} must be one file, found {videos[episode]} too")
        videos[episode] = path
    return videos


def ecf_records(
    conversation: Conversation, split: str, clips: EcfClips, *, targets: Targets = "with_cause"
) -> Iterator[PendingRecord]:
    """One pending record per target utterance of the conversation."""
    turns = tuple(Turn(speaker=u.speaker, text=u.text) for u in conversation.utterances)
    for number in conversation.targets(targets):
        utterance = conversation.utterances[number - 1]
        causes = sorted({cause for target, cause in conversation.pairs if target == number})
        yield PendingRecord(
            key=f"ecf_{split}_dia{conversation.id}_utt{number}",
            source="ecf",
            split=split,
            utterance=utterance.text,
            speaker=utterance.speaker,
            conversation=turns,
            target=number,
            emotion=utterance.emotion,
            pairs=tuple(Pair(number, utterance.emotion, cause) for cause in causes),
            tasks=(Task.ECPE,),
            notes={
                "conversation": conversation.id,
                "episode": utterance.episode,
                "start_s": utterance.start_s,
                "end_s": utterance.end_s,
            },
            clip=clips.clip(conversation.id, utterance),
        )
