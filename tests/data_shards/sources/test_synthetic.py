"""The synthetic corpus as records: sound, decodable, annotated, and split by identity."""

import numpy as np
import pytest

from data_shards.build.worker_pool import ordered_map
from data_shards.media.video import count_frames, decode_frames
from data_shards.shards.record import Video, from_members, to_members
from data_shards.sources.synthetic import (
    SyntheticOptions,
    compose_reason,
    make_record,
    make_scene,
    synthetic_items,
)
from data_shards.tasks import TASKS, Task

OPTIONS = SyntheticOptions(clips=40, seed=5, identities=8)
RECORDS = [make_record(OPTIONS, index) for index in range(OPTIONS.clips)]


def test_records_survive_the_disk() -> None:
    for record in RECORDS[:8]:
        assert from_members(record.key, to_members(record)) == record


def test_all_tasks_are_offered() -> None:
    assert {task for record in RECORDS for task in record.tasks} == set(TASKS)


def test_clips_decode_to_their_length_and_peak() -> None:
    for record in RECORDS[:6]:
        assert isinstance(record.media, Video)
        assert count_frames(record.media.mp4) == record.num_frames
        if record.peak_frame is not None:
            assert decode_frames(record.media.mp4, [record.peak_frame]).shape == (1, 112, 112, 3)


def test_a_clip_is_a_function_of_seed_split_and_number_alone() -> None:
    in_workers = list(ordered_map(lambda item: item(), synthetic_items(OPTIONS), workers=2))
    assert in_workers == RECORDS
    assert make_record(OPTIONS, 7) == RECORDS[7]
    assert make_record(SyntheticOptions(clips=40, seed=6, identities=8), 7) != RECORDS[7]


def test_splits_share_no_person() -> None:
    people = {}
    for split in ("train", "test"):
        options = SyntheticOptions(clips=200, seed=5, split=split, identities=30)
        people[split] = {make_scene(options, number)[0].person for number in range(200)}
    assert len(people["train"]) == len(people["test"]) == 30
    assert not people["train"] & people["test"]


def test_phrases_agree_with_what_the_face_shows() -> None:
    """The annotation reads noisy measurements; it finds most shown units and invents few."""
    found = shown = invented = 0
    for number in range(60):
        scene, _ = make_scene(OPTIONS, number)
        record = make_record(OPTIONS, number)
        if record.expressions is not None:
            found += len(record.expressions)
            shown += len(scene.units)
            invented += max(0, len(record.expressions) - len(scene.units))
    assert found >= 0.9 * shown
    assert invented <= 0.1 * shown


def test_a_reason_ends_with_the_emotion_and_its_cause() -> None:
    for number in range(60):
        scene, _ = make_scene(OPTIONS, number)
        reason = compose_reason(scene, None)
        cause = f" because of {scene.event}" if scene.event else ""
        assert reason.endswith(f" feels {scene.emotion}{cause}.")


def test_reasons_are_scarcer_than_labels() -> None:
    counts = {task: sum(task in record.tasks for record in RECORDS) for task in TASKS}
    assert counts[Task.ERI] < counts[Task.MSA] < counts[Task.ER]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "dev"}, "split: must be one of train, test, found 'dev'"),
        ({"clips": 0}, "clips and identities: must be at least 1, found 0 and 8"),
    ],
)
def test_wrong_options_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticOptions(**({"clips": 40, "identities": 8} | change))  # type: ignore[arg-type]


def test_two_seeds_are_two_corpora() -> None:
    assert not np.array_equal(
        [r.emotion for r in RECORDS],
        [
            make_scene(SyntheticOptions(clips=40, seed=9, identities=8), n)[0].emotion
            for n in range(40)
        ],
    )
