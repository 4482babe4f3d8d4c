"""The corpora joined: which records come out, with which tasks, and what is left out and why."""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_shards.build.source_item import FileItem
from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import ShardReader
from data_shards.shards.record import Record
from data_shards.sources import emt
from launch import cli

HEADER = (
    "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,"
    "StartTime,EndTime"
)
# (split, dialogue, utterance, emotion, sentiment, start); dialogue 309 holds a known bad clip.
MELD = (
    ("train", 0, 0, "neutral", "neutral", "0:00:01,000"),
    ("train", 0, 1, "joy", "positive", "0:00:02,000"),
    ("train", 1, 3, "anger", "negative", "0:00:03,000"),
    ("train", 309, 0, "joy", "positive", "0:00:09,000"),
    ("dev", 0, 0, "fear", "negative", "0:00:04,000"),
    ("test", 0, 0, "sadness", "negative", "0:00:05,000"),
    ("test", 0, 1, "joy", "positive", "0:00:02,000"),  # the moment of train dia0_utt1
)
# Conversation 5 touches MELD test, conversation 6 MELD dev; one utterance of 4 is in no MELD.
ECF = """4 3
(2,1),(2,2),(3,2)
1 | Ann | neutral | Words 0 . | Friends_S1E1: 00:00:01.000 - 00:00:02.000
2 | Ann | joy | Words 1 . | Friends_S1E1: 00:00:02.000 - 00:00:03.000
3 | Bob | surprise | No ! | Friends_S1E1: 00:00:03.000 - 00:00:03.500
5 2
(1,1),(2,1)
1 | Ann | sadness | Words 0 . | Friends_S1E1: 00:00:05.000 - 00:00:06.000
2 | Ann | joy | Words 1 . | Friends_S1E1: 00:00:02.000 - 00:00:03.000
6 1
(1,1)
1 | Ann | fear | Words 0 . | Friends_S1E1: 00:00:04.000 - 00:00:05.000
"""
PLACES = {
    (4, 1): "train_dia0_utt0",
    (4, 2): "train_dia0_utt1",
    (4, 3): "",
    (5, 1): "test_dia0_utt0",
    (5, 2): "test_dia0_utt1",
    (6, 1): "dev_dia0_utt0",
}
FOLDERS = {
    "train": "train/train_splits",
    "dev": "dev/dev_splits_complete",
    "test": "test/output_repeated_splits_test",
}


@pytest.fixture
def corpora(tmp_path: Path, clip_bytes: bytes) -> Path:
    """MELD.Raw, ECF and MOSEI in small: every clip is there but train dia1_utt3."""
    meld, ecf, mosei = (tmp_path / name for name in ("meld", "ecf", "mosei"))
    for folder in (meld, ecf, mosei):
        folder.mkdir()
    for split, folder in FOLDERS.items():
        lines = [HEADER]
        (meld / folder).mkdir(parents=True)
        for number, (of, dialogue, utterance, emotion, sentiment, start) in enumerate(MELD):
            if of != split:
                continue
            lines.append(
                f"{number},Words {utterance}.,Ann,{emotion},{sentiment},{dialogue},{utterance},"
                f'1,1,"{start}","{start}"'
            )
            if (split, dialogue) != ("train", 1):
                (meld / folder / f"dia{dialogue}_utt{utterance}.mp4").write_bytes(clip_bytes)
        (meld / f"{split}_sent_emo.csv").write_text("\n".join(lines) + "\n")
    (ecf / "all_data_pair.txt").write_text(ECF)
    (ecf / "all_data_pair_ECFvsMELD.txt").write_text(_mapped(ECF))
    (mosei / "Raw" / "-v_1").mkdir(parents=True)
    labels = "video_id,clip_id,text,label,annotation,mode\n"
    for clip, (label, mode) in enumerate(((1.0, "train"), (0.0, "train"), (-1.0, "valid"))):
        labels += f"-v_1,{clip},words {clip},{label},,{mode}\n"
        (mosei / "Raw" / "-v_1" / f"{clip}.mp4").write_bytes(clip_bytes)
    (mosei / "label.csv").write_text(labels)
    return tmp_path


def _mapped(text: str) -> str:
    """The text with the last column of an utterance replaced by its MELD clip."""
    lines, conversation = [], 0
    for line in text.splitlines():
        fields = line.split(" | ")
        if len(fields) == 1 and " " in line:
            conversation = int(line.split()[0])
        if len(fields) == 5:
            line = " | ".join([*fields[:4], PLACES[conversation, int(fields[0])]])
        lines.append(line)
    return "\n".join(lines) + "\n"


Build = Callable[..., tuple[int, dict[str, Any], list[Record]]]


@pytest.fixture
def build(corpora: Path, capsys: pytest.CaptureFixture[str]) -> Build:
    """Run `emoverse build SOURCE ...` on the corpora; exit code, its JSON, the records by key."""

    def run(source: str, *words: object, names: str = "") -> tuple[int, Any, list[Record]]:
        out = corpora / "out" / f"{source}{len(list(corpora.glob('out/*')))}"
        out.parent.mkdir(exist_ok=True)
        folders = [f"--{name}={corpora / name}" for name in (names or source).split()]
        command = ["build", source, *folders, "--out", out, "--json", *words]
        code = cli.main([str(word) for word in command])
        said = capsys.readouterr()
        if code != 0:
            return code, said.err, []
        index = ShardIndex.load(out)
        reader = ShardReader(out, index)
        records = [
            reader.read(shard, slot)
            for shard, info in enumerate(index.shards)
            for slot in range(info.records)
        ]
        reader.close()
        report = json.loads(said.out) | {"provenance": dict(index.provenance)}
        return code, report, sorted(records, key=lambda record: record.key)

    return run


ALL = "meld mosei ecf"


def test_the_joined_dataset(build: Build) -> None:
    _, report, records = build("emt", names=ALL)
    assert {record.key: "+".join(record.tasks) for record in records} == {
        "ecf_train_dia4_utt2": "ecpe",
        "ecf_train_dia6_utt1": "ecpe",
        "meld_train_dia0_utt0": "msa+er",
        "mosei_-v_1_0": "msa",
        "mosei_-v_1_1": "msa",
    }
    assert report["leakage"] == "no_meld_test"
    assert report["left_out"] == {
        "ecf": {"leakage": 2, "leakage-conversations": 1},
        "meld": {"known-bad": 1, "leakage": 1},
    }
    # Clip dia1_utt3 of MELD is missing, utterance 3 of conversation 4 has no place at all.
    assert report["skipped"] == {"ecf": {"media-missing": 1}, "meld": {"media-missing": 1}}
    provenance = report["provenance"]
    assert provenance["leakage"] == "no_meld_test" and provenance["split"] == "train"
    assert provenance["choices"]["known_bad"] == "skip-train"
    named = {name: [file["name"] for file in part] for name, part in provenance["files"].items()}
    assert named["ecf"] == ["all_data_pair.txt", "all_data_pair_ECFvsMELD.txt"]
    assert len(named["meld"]) == 3 and named["mosei"] == ["label.csv"]
    assert all(len(f["sha256"]) == 64 for part in provenance["files"].values() for f in part)


@pytest.mark.parametrize(
    ("rule", "ecf", "meld"),
    [("paper", 4, 2), ("no_meld_test", 2, 1), ("no_meld_dev_test", 1, 1)],
)
def test_leakage_rules(build: Build, rule: str, ecf: int, meld: int) -> None:
    _, report, records = build("emt", "--leakage", rule, names=ALL)
    counts = Counter(record.source for record in records)
    assert (counts["ecf"], counts["meld"]) == (ecf, meld)
    assert report["provenance"]["leakage"] == rule


def test_clips_of_ecf_are_melds_by_the_map(build: Build, corpora: Path) -> None:
    """Utterance 1 of ECF's conversation 6 is dev dia0_utt0; MELD has no dia6 at all."""
    _, _, records = build("ecf", "--leakage", "paper", names="ecf meld")
    assert {record.key for record in records} == {
        "ecf_train_dia4_utt2",
        "ecf_train_dia5_utt1",
        "ecf_train_dia5_utt2",
        "ecf_train_dia6_utt1",
    }
    (corpora / "meld" / FOLDERS["dev"] / "dia0_utt0.mp4").unlink()
    _, report, fewer = build("ecf", "--leakage", "paper", names="ecf meld")
    assert len(fewer) == 3 and report["skipped"]["ecf"]["media-missing"] == 2


def test_splits(build: Build) -> None:
    _, report, records = build("emt", "--split", "test", names=ALL.replace(" ecf", ""))
    assert [r.key for r in records] == ["meld_test_dia0_utt0", "meld_test_dia0_utt1"]
    assert report["left_out"] == {}  # nothing is a leak in the test set itself
    _, _, records = build("emt", "--split", "dev", names=ALL)
    assert [r.key for r in records] == ["meld_dev_dia0_utt0", "mosei_-v_1_2"]
    code, message, _ = build("ecf", "--split", "dev")
    assert code == 2 and "ECF 2 has the splits train, test, found dev" in message


def test_labels_from_files(build: Build, corpora: Path) -> None:
    fer = [
        {"key": "mosei_-v_1_0", "peak_frame": 2, "aus": ["AU12"], "phrases": ["Big smile"]},
        {"key": "meld_train_dia0_utt0", "peak_frame": 7, "aus": [], "phrases": ["Smile"]},
        {"key": "meld_dev_dia0_utt0", "peak_frame": 0, "aus": [], "phrases": ["Smile"]},
    ]
    (corpora / "fer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fer))
    reasons = [{"key": "mosei_-v_1_0", "emotion": "joy", "reason": "She  smiles.\nSo", "m": 1}]
    (corpora / "why.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reasons))
    files = ("--fer", corpora / "fer.jsonl", "--reasons", corpora / "why.jsonl")
    _, report, records = build("emt", *files, names=ALL)
    found = {record.key: record for record in records}
    both = found["mosei_-v_1_0"]
    assert both.tasks == ("msa", "fer", "eri")
    assert (both.peak_frame, both.expressions) == (2, ("Big smile",))
    assert both.reason == "She smiles. So"
    # The clip has 3 frames: this csv was made from another one.
    assert "meld_train_dia0_utt0" not in found
    assert report["skipped"]["meld"] == {"media-missing": 1, "peak-outside": 1}
    assert report["attached"] == {"fer": {"used": 2, "of_other_clips": 1}}
    assert report["curation"]["reasons"] == 1
    _, _, stills = build("mosei", *files, "--mosei-visual", "peak_frame")
    assert {r.key: (r.num_frames, r.peak_frame) for r in stills} == {
        "mosei_-v_1_0": (1, 0),
        "mosei_-v_1_1": (1, 0),
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"key": "a", "peak_frame": -1, "phrases": ["x"]}', "peak_frame: must be 0 or more"),
        ('{"key": "a", "peak_frame": 1, "phrases": []}', "phrases: must be a list of texts"),
        ('{"peak_frame": 1, "phrases": ["x"]}', "key: must be text"),
        ('{"key": "a", "peak_frame": 1, "phrases": ["x"]}\n' * 2, "key: must be unique, found 'a'"),
        ("x", "must be a JSON object"),
    ],
)
def test_wrong_labels_of_files_are_named(
    build: Build, corpora: Path, line: str, message: str
) -> None:
    (corpora / "fer.jsonl").write_text(line)
    code, said, _ = build("meld", "--fer", corpora / "fer.jsonl")
    assert code == 2 and "fer.jsonl:" in said and message in said


@pytest.mark.parametrize(
    ("source", "names", "message"),
    [
        ("meld", "mosei", "build meld: needs --meld DIR"),
        ("meld", "meld ecf", "--ecf is not used here; build emt joins the corpora"),
        ("ecf", "ecf mosei", "--mosei is not used here"),
    ],
)
def test_folders_must_fit_the_source(build: Build, source: str, names: str, message: str) -> None:
    code, said, _ = build(source, names=names)
    assert code == 2 and message in said


def test_emt_needs_a_corpus(build: Build, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["build", "emt", "--out", str(tmp_path / "o")]) == 2
    assert "needs one or more of --meld, --mosei and --ecf" in capsys.readouterr().err


def test_every_item_names_the_file_that_it_reads(corpora: Path) -> None:
    """So that the next start of a killed build sees a file that has changed."""
    (corpora / "films").mkdir()
    film = corpora / "films" / "friends.S01E01.mp4"
    film.write_bytes(next((corpora / "meld").rglob("*.mp4")).read_bytes())
    parser = argparse.ArgumentParser()
    emt.add_arguments(parser)
    folders = [f"--{name}={corpora / name}" for name in ALL.split()]
    args = parser.parse_args([*folders, "--leakage", "paper", "--episodes", str(film.parent)])
    args.source = "emt"
    items = list(emt.open_source(args).items)
    assert all(isinstance(item, FileItem) for item in items)
    paths = {item.path for item in items if isinstance(item, FileItem)}
    clips = {
        path
        for path in corpora.rglob("*.mp4")
        if path.name != "dia309_utt0.mp4" and path.stem != "2" and "films" not in path.parts
    }
    # The clip without a file, and the film that utterance 3 of conversation 4 is cut from.
    assert paths == {*clips, film, None}


def test_strict_stops_at_a_missing_clip(build: Build) -> None:
    code, said, _ = build("meld", "--strict")
    assert code == 2 and "media-missing" in said and "dia1_utt3.mp4" in said
    code, _, records = build("meld", "--known-bad", "keep", "--leakage", "paper")
    assert code == 0 and len(records) == 3


def test_ecf_without_the_map_needs_the_paper_rule(build: Build, corpora: Path) -> None:
    (corpora / "ecf" / "all_data_pair_ECFvsMELD.txt").unlink()
    code, said, _ = build("ecf", names="ecf meld")
    assert code == 2 and "needs all_data_pair_ECFvsMELD.txt" in said
    clips = corpora / "own"
    clips.mkdir()
    (clips / "dia4utt2.mp4").write_bytes(next((corpora / "meld").rglob("*.mp4")).read_bytes())
    code, _, records = build("ecf", "--leakage", "paper", "--ecf-clips", clips)
    assert [record.key for record in records] == ["ecf_train_dia4_utt2"]


def test_mosei_without_words_is_refused(build: Build, corpora: Path) -> None:
    path = corpora / "mosei" / "label.csv"
    path.write_text(path.read_text().replace("words 0", "").replace("words 1", ""))
    _, report, _ = build("emt", names="mosei meld")
    assert report["left_out"]["mosei"] == {"no-words": 2}
    path.write_text(path.read_text().replace("words 2", ""))
    code, said, _ = build("mosei")
    assert code == 2 and "no segment has words; add the transcripts" in said


def test_files_that_nobody_annotated_are_counted(build: Build, corpora: Path) -> None:
    place = corpora / "meld" / FOLDERS["train"]
    (place / "dia66_utt9.mp4").write_bytes(b"")
    (place / "final_videos_testdia0_utt0.mp4").write_bytes(b"")
    _, report, _ = build("meld")
    assert report["left_out"]["meld"]["file-without-annotation"] == 2


def test_a_broken_clip_is_reported_and_the_build_goes_on(build: Build, corpora: Path) -> None:
    (corpora / "meld" / FOLDERS["train"] / "dia0_utt0.mp4").write_bytes(b"<html>")
    _, report, records = build("meld", "--leakage", "paper")
    assert report["skipped"] == {"meld": {"media-damaged": 1, "media-missing": 1}}
    assert [record.key for record in records] == ["meld_train_dia0_utt1"]
