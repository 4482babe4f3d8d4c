"""The leakage rule that stands beside a metric is the one of the training data."""

import json
from collections.abc import Callable
from pathlib import Path

from data_shards.shards.index import INDEX_FILE, ShardIndex
from data_shards.tasks import Task
from emoverse.evaluation.metrics_file import leakage_rule


def test_the_training_folder_decides(tmp_path: Path, make_index: Callable[..., ShardIndex]) -> None:
    for name, rule in (("train", "paper"), ("test", "no_meld_test")):
        make_index(tmp_path / name, {(Task.MSA,): 2})
        path = tmp_path / name / INDEX_FILE
        document = json.loads(path.read_text())
        path.write_text(json.dumps(document | {"provenance": {"leakage": rule}}))
    evaluated = ShardIndex.load(tmp_path / "test")
    assert leakage_rule(tmp_path / "train", evaluated) == "paper"
    assert leakage_rule(tmp_path / "gone", evaluated) == "no_meld_test"
    make_index(tmp_path / "plain", {(Task.MSA,): 2})
    assert leakage_rule(tmp_path / "plain", evaluated) is None
