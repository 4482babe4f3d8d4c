"""The index: what it answers, and that it refuses a folder that does not fit together."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_shards.shards.index import ENTRY_DTYPE, ShardIndex
from data_shards.tasks import Task
from tests.builders import make_record, make_shards


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight records in shards of three: masks 3, 1, 3, 1, ..."""
    tasks = (Task.MSA, Task.ER)
    records = [make_record(f"clip_{n}", tasks=tasks[: 1 + (n + 1) % 2]) for n in range(8)]
    folder = tmp_path_factory.mktemp("index") / "shards"
    return make_shards(folder, records, per_shard=3, provenance={"seed": 1})


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(built, tmp_path / "shards"))


def test_an_index_answers_without_tars(built: Path) -> None:
    index = ShardIndex.load(built)
    assert (index.num_shards, index.num_records) == (3, 8)
    assert index.class_counts() == {1: 4, 3: 4}
    assert index.class_counts(0) == {1: 1, 3: 2} and index.class_counts(2) == {1: 1, 3: 1}
    assert index.slots(0, 3).tolist() == [0, 2] and index.slots(1, 3).tolist() == [1]
    assert index.slots(0, 31).tolist() == []
    assert index.keys(1) == ("clip_3", "clip_4", "clip_5") and index.key(2, 1) == "clip_7"
    assert index.entries(0).dtype == ENTRY_DTYPE and not index.entries(0).flags.writeable
    assert index.provenance == {"seed": 1} and index.options["frames"] == "video"


def test_number_and_address_are_inverse(built: Path) -> None:
    index = ShardIndex.load(built)
    addresses = [index.address(number) for number in range(8)]
    assert addresses == [(s, i) for s, n in enumerate((3, 3, 2)) for i in range(n)]
    assert [index.ordinal(*address) for address in addresses] == list(range(8))
    with pytest.raises(ValueError, match=r"must be 0\.\.7, found 8"):
        index.address(8)


def test_fingerprint_is_of_the_content_not_of_the_place(built: Path, folder: Path) -> None:
    fingerprint = ShardIndex.load(built).fingerprint
    assert ShardIndex.load(str(folder)).fingerprint == fingerprint and len(fingerprint) == 64
    edit_document(folder, lambda d: d["provenance"].update(seed=2))
    assert ShardIndex.load(folder).fingerprint == fingerprint
    edit_document(folder, lambda d: d["shards"].reverse())
    assert ShardIndex.load(folder).fingerprint != fingerprint


def test_an_index_crosses_to_workers_small(built: Path) -> None:
    index = ShardIndex.load(built)
    entries = index.entries(0).tolist()
    copy = pickle.loads(pickle.dumps(index))
    assert copy._entries == {} and copy.entries(0).tolist() == entries
    assert copy.fingerprint == index.fingerprint


def test_only_some_shards_stay_open(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_shards.shards.index._CACHED_RECORDS", 6)
    index = ShardIndex.load(built)
    for shard in (0, 1, 0, 2):
        index.entries(shard)
        index.keys(shard)
    assert list(index._entries) == [0, 2] == list(index._keys)


def edit_document(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "index.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def test_no_folder_or_an_unfinished_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; build it with 'emov"):
        ShardIndex.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"index\.json: missing, so .* not a finished"):
        ShardIndex.load(tmp_path)


@pytest.mark.parametrize("suffix", ["tar", "idx", "keys"])
def test_a_missing_file(folder: Path, suffix: str) -> None:
    (folder / f"shard-000001.{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"shard-000001\.{suffix}: missing, but index\.j"):
        ShardIndex.load(folder)


@pytest.mark.parametrize("suffix", ["tar", "idx"])
def test_a_file_cut_short(folder: Path, suffix: str) -> None:
    path = folder / f"shard-000001.{suffix}"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=rf"shard-000001\.{suffix}: must have \d+ bytes.*cut sho"):
        ShardIndex.load(folder)


def test_changed_side_files_are_noticed_on_first_use(folder: Path) -> None:
    for suffix in ("idx", "keys"):
        path = folder / f"shard-000001.{suffix}"
        content = bytearray(path.read_bytes())
        content[3] ^= 1
        path.write_bytes(content)
    index = ShardIndex.load(folder)
    index.entries(0)
    with pytest.raises(ValueError, match=r"shard-000001\.idx: does not fit idx_sha256"):
        index.entries(1)
    with pytest.raises(ValueError, match=r"shard-000001\.keys: does not fit keys_sha256"):
        index.keys(1)


def test_entries_must_fit_the_classes(folder: Path) -> None:
    """A folder put together from two builds: checksums fit, counts do not."""
    edit_document(folder, lambda d: d["shards"][0].update(classes={"1": 2, "3": 1}))
    with pytest.raises(ValueError, match=r"shard-000000\.idx: does not fit classes and bytes"):
        ShardIndex.load(folder).entries(0)


@pytest.mark.parametrize(
    ("edit", "rule"),
    [
        (lambda d: d.update(schema_version=99), "reads version 1, found 99"),
        (lambda d: d.pop("options"), "options: must be a dict, found None"),
        (lambda d: d.update(shards=[]), "must list at least one shard"),
        (lambda d: d["shards"].append(d["shards"][0]), "none twice, found 4 shards with 3 names"),
        (lambda d: d["shards"][1].pop("bytes"), r"shards\[1\]: a shard must have the fields"),
        (lambda d: d["shards"][1].update(bytes=-1), r"bytes must be a whole number above 0"),
        (lambda d: d["shards"][1].update(records=True), "records must be a whole number"),
        (lambda d: d["shards"][1].update(name="../x.tar"), "must be a plain file name"),
        (lambda d: d["shards"][1].update(records=4), "classes must sum to records, found 3 and 4"),
        (
            lambda d: d["shards"][1].update(classes={"32": 3}),
            r"masks 1\.\.31 to counts, found '32'",
        ),
        (lambda d: d["shards"][1].update(classes=[3]), "classes must map task masks to counts"),
        (lambda d: d["shards"][1].update(idx_sha256="0"), "must be 64 hexadecimal digits"),
    ],
)
def test_a_wrong_document(
    folder: Path, edit: Callable[[dict[str, Any]], object], rule: str
) -> None:
    edit_document(folder, edit)
    with pytest.raises(ValueError, match=rf"index\.json.*{rule}.*build the folder again"):
        ShardIndex.load(folder)


def test_a_torn_document(folder: Path) -> None:
    path = folder / "index.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=r"index\.json: must be JSON, found: "):
        ShardIndex.load(folder)
