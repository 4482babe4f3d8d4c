"""The sampler: ranks share a step exactly and evenly, state is a number and a fingerprint."""

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.plan.plan import StageSpec, plan_stages
from data_shards.plan.sampler import WeightedTaskSampler, audit_hash, balanced_shares
from data_shards.tasks import TASKS, Task, mask_of

MSA, ER, FER, ERI, ECPE = TASKS
SPEC = StageSpec(
    name="stage1",
    rates=((MSA, Fraction(2, 5)), (ER, Fraction(1, 5)), (FER, Fraction(2, 5))),
    take=301,
    epochs=2,
)
MakeSampler = Callable[..., WeightedTaskSampler]


@pytest.fixture(scope="session")
def make_sampler(memory_table: Any) -> MakeSampler:
    table = memory_table.of_classes({mask_of([MSA, ER, FER]): 200, mask_of([MSA, ER]): 200}, 50)
    plan = plan_stages(table, [SPEC], seed=1).stages["stage1"]

    def make(
        *, batch: int = 64, rank: int = 0, world: int = 1, stage: Any = plan
    ) -> WeightedTaskSampler:
        return WeightedTaskSampler(
            stage, table, global_batch_size=batch, rank=rank, world_size=world
        )

    return make


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 96), world=st.integers(1, 64), data=st.data())
def test_ranks_share_every_step(
    make_sampler: MakeSampler, batch: int, world: int, data: st.DataObject
) -> None:
    world = min(world, batch)
    ranks = [make_sampler(batch=batch, rank=rank, world=world) for rank in range(world)]
    steps = ranks[0].num_steps
    assert steps == -(-602 // batch)
    plan = ranks[0].stage_plan
    for step in {data.draw(st.integers(0, steps - 1)), steps - 1}:
        shares = [sampler.share(step) for sampler in ranks]
        slots = [slot for share in shares for slot in share]
        first = step * batch
        expected = range(first, min(first + batch, 602))
        assert sorted(slot.position for slot in slots) == list(expected)
        assert all(slot.placement == plan.at(slot.position) for slot in slots)
        for share in shares:
            assert len(expected) // world <= len(share) <= -(-len(expected) // world)
            assert [s.position for s in share] == sorted(s.position for s in share)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 4_000), max_size=80),
    world=st.integers(1, 64),
    first=st.integers(0, 99),
)
def test_shares_are_balanced(lengths: list[int], world: int, first: int) -> None:
    shares = balanced_shares(lengths, world, first=first)
    assert sorted(place for share in shares for place in share) == list(range(len(lengths)))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    loads = [sum(lengths[place] for place in share) for share in shares]
    # Longest first: what a rank got beyond another is at most one sample, while it had room.
    assert max(loads) - min(loads) <= max(lengths, default=0) * (1 + max(sizes) - min(sizes))


def test_length_decides_and_turns_rotate() -> None:
    assert balanced_shares([9, 1, 1, 9], 2) == [[0, 1], [2, 3]]
    assert balanced_shares([10, 6, 5, 1], 2) == [[0, 3], [1, 2]]
    equal = [balanced_shares([5, 5, 5, 5, 5], 2, first=step) for step in range(2)]
    assert [len(shares[0]) for shares in equal] == [3, 2]
    assert balanced_shares([3], 3, first=2) == [[], [], [0]]


def test_image_samples_weigh_less_than_clips(make_sampler: MakeSampler) -> None:
    """Two ranks with equally many samples have nearly the same number of frames."""
    ranks = [make_sampler(rank=rank, world=2) for rank in range(2)]
    for step in range(ranks[0].num_steps - 1):
        shares = [sampler.share(step) for sampler in ranks]
        frames = [sum(1 if s.placement.task is FER else 8 for s in share) for share in shares]
        assert [len(share) for share in shares] == [32, 32]
        assert abs(frames[0] - frames[1]) <= 7


def test_texts_decide_where_frames_do_not(memory_table: Any, make_sampler: MakeSampler) -> None:
    """Longest first, by number of characters: the loads differ by less than one sample."""
    plan = make_sampler().stage_plan
    table = memory_table.of_classes({mask_of([MSA, ER, FER]): 200, mask_of([MSA, ER]): 200}, 50)
    ranks = [
        WeightedTaskSampler(
            plan, table, global_batch_size=64, rank=rank, world_size=2, tokens_per_frame=1
        )
        for rank in range(2)
    ]
    for step in range(ranks[0].num_steps - 1):
        loads = [
            sum(
                int(table.entries(s.placement.shard)["text_chars"][s.placement.slot]) for s in share
            )
            for share in (sampler.share(step) for sampler in ranks)
        ]
        assert abs(loads[0] - loads[1]) < 250


def test_steps_do_not_depend_on_the_world_size(make_sampler: MakeSampler) -> None:
    def step(world: int) -> list[tuple[int, Any]]:
        shares = [make_sampler(rank=rank, world=world).share(3) for rank in range(world)]
        return sorted((s.position, repr(s.placement)) for share in shares for s in share)

    assert step(1) == step(2) == step(3) == step(64)


def test_resume_at_another_world_size_continues_the_plan(make_sampler: MakeSampler) -> None:
    whole = [slot for step in range(10) for slot in make_sampler().share(step)]
    state = json.loads(json.dumps(make_sampler(rank=1, world=4).state(7)))
    assert state["consumed"] == 7 * 64 and state["quarantine"] == []
    ranks = [make_sampler(rank=rank, world=3) for rank in range(3)]
    starts = {sampler.load_state(state) for sampler in ranks}
    assert starts == {7}
    rest = [slot for step in range(7, 10) for sampler in ranks for slot in sampler.share(step)]
    assert sorted(rest, key=lambda slot: slot.position) == whole[7 * 64 :]


@settings(max_examples=12, deadline=None)
@given(data=st.data(), batch=st.integers(1, 70))
def test_any_history_of_restarts_trains_the_plan(
    make_sampler: MakeSampler, data: st.DataObject, batch: int
) -> None:
    """Other ranks (1 to 64) and data workers (0 to 4) after every stop: the same steps, once each.

    A worker makes every W-th step, in whatever order the workers get on.
    """
    trained: list[list[tuple[int, Any]]] = []
    state = make_sampler(batch=batch).state(0)
    while True:
        world = data.draw(st.integers(1, min(64, batch)))
        workers = data.draw(st.integers(0, 4)) or 1
        ranks = [make_sampler(batch=batch, rank=rank, world=world) for rank in range(world)]
        start = {sampler.load_state(json.loads(json.dumps(state))) for sampler in ranks}.pop()
        if start == ranks[0].num_steps:
            break
        stop = data.draw(st.integers(start + 1, ranks[0].num_steps))
        turns = [list(range(start + worker, stop, workers)) for worker in range(workers)]
        made = {}
        for step in data.draw(st.permutations([step for turn in turns for step in turn])):
            slots = [slot for sampler in ranks for slot in sampler.share(step)]
            made[step] = sorted(
                ((slot.position, slot.placement) for slot in slots), key=lambda pair: pair[0]
            )
        trained += [made[step] for step in range(start, stop)]
        state = ranks[0].state(stop)
    plan = make_sampler().stage_plan
    flat = [slot for step in trained for slot in step]
    assert flat == [(position, plan.at(position)) for position in range(plan.num_samples)]
    assert [len(step) for step in trained[:-1]] == [batch] * (len(trained) - 1)


def test_the_quarantine_travels_with_the_state(make_sampler: MakeSampler) -> None:
    sampler = make_sampler()
    sampler.quarantine.append({"position": 3, "key": "a"})
    other = make_sampler(world=2)
    other.load_state(sampler.state(1))
    assert other.quarantine == [{"position": 3, "key": "a"}]
    assert other.state(1) == sampler.state(1)


def test_the_end_is_a_state_too(make_sampler: MakeSampler) -> None:
    sampler = make_sampler()
    state = sampler.state(sampler.num_steps)
    assert state["consumed"] == 602
    assert sampler.load_state(state) == sampler.num_steps == 10
    assert make_sampler(batch=1).load_state(sampler.state(2)) == 128  # another batch size that fits


def test_a_state_of_another_plan_is_refused(make_sampler: MakeSampler, memory_table: Any) -> None:
    sampler = make_sampler()
    table = memory_table.of_classes({mask_of([MSA, ER, FER]): 400}, 50)
    spec = replace(SPEC, take=300)
    other = plan_stages(table, [spec], seed=1).stages["stage1"]
    with pytest.raises(ValueError, match=r"stages\.stage1: the checkpoint belongs to another plan"):
        make_sampler(stage=other).load_state(sampler.state(1))
    state = sampler.state(1)
    for consumed in (-64, 63, 603):
        with pytest.raises(ValueError, match=rf"stands at sample {consumed} of 602, .*64"):
            sampler.load_state({**state, "consumed": consumed})


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"batch": 0}, r"train\.global_batch_size: must be at least 1, found 0"),
        ({"batch": 4, "world": 5}, r"world size: must be 1\.\.train\.global_batch_size = 4.* 5;"),
        ({"world": 0}, r"world size: must be 1\.\..*found 0"),
        ({"world": 2, "rank": 2}, r"rank: must be 0\.\.1, found 2"),
    ],
)
def test_wrong_numbers_are_named(
    make_sampler: MakeSampler, numbers: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_sampler(**numbers)


def test_steps_have_limits(make_sampler: MakeSampler) -> None:
    sampler = make_sampler()
    for step in (-1, 10):
        with pytest.raises(IndexError, match=r"step must be 0\.\.9, found"):
            sampler.share(step)
    for step in (-1, 11):
        with pytest.raises(IndexError, match=r"step must be 0\.\.10, found"):
            sampler.state(step)


def test_the_audit_hash_is_order_free_and_sees_every_change() -> None:
    samples = [(0, "a", MSA), (1, "b", ER), (2, "c", ER)]

    def total(samples: list[tuple[int, str, Task]]) -> int:
        return sum(audit_hash(*sample) for sample in samples) % 2**64

    assert total(samples) == total(samples[::-1])
    others = [
        [(1, "a", MSA), (0, "b", ER), (2, "c", ER)],
        [(0, "a", ER), (1, "b", MSA), (2, "c", ER)],
        [(0, "a", MSA), (1, "c", ER), (2, "b", ER)],
        [(0, "a", MSA), (1, "b", ER)],
        [(0, "a", MSA), (1, "b", ER), (2, "d", ER)],
    ]
    assert len({total(samples), *map(total, others)}) == 6
    assert audit_hash(5, "clip_7", FER) == GOLDEN_AUDIT


GOLDEN_AUDIT = 2671684027700784278
