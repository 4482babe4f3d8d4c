"""Ranks: the five variables, and errors that all ranks raise together."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from emoverse.engine import distributed
from emoverse.engine.distributed import RankError, World, agree_on_step, fail_together, read_world

FIVE = {
    "RANK": "1",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
ALONE = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
Ranks = Callable[..., list[Any]]


def test_all_five_variables_make_a_world() -> None:
    world = read_world(FIVE)
    assert (world.rank, world.world_size, world.local_rank) == (1, 2, 0)
    assert not world.is_main and world.init_method == "env://"
    assert world.backend == ("nccl" if torch.cuda.is_available() else "gloo")


def test_no_variable_is_one_process_alone() -> None:
    world = read_world({})
    assert (world.rank, world.world_size, world.is_main) == (0, 1, True)
    assert world.init_method.startswith("tcp://127.0.0.1:")


@pytest.mark.parametrize("missing", sorted(FIVE))
def test_half_set_variables_are_refused(missing: str) -> None:
    environ = {name: value for name, value in FIVE.items() if name != missing}
    with pytest.raises(ValueError, match=rf"partly set: .* set, {missing} are not; set all five"):
        read_world(environ)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "two"}, "RANK must be an integer, found 'two'"),
        ({"RANK": "2"}, "the rule is 0 <= RANK < WORLD_SIZE"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK >= 0; check the launcher"),
    ],
)
def test_impossible_ranks_are_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_world(FIVE | change)


def test_a_failure_alone_keeps_the_reason_and_the_cause() -> None:
    with pytest.raises(RankError) as raised, fail_together(ALONE, "reading the data"):
        raise ValueError("no shards")
    assert str(raised.value) == "reading the data: ValueError: no shards"
    assert raised.value.wrong_input
    assert isinstance(raised.value.__cause__, ValueError)
    with pytest.raises(RankError) as fault, fail_together(ALONE, "x"):
        raise ZeroDivisionError("1/0")
    assert not fault.value.wrong_input


@pytest.mark.promise(5)
def test_one_failing_rank_fails_all_with_its_reason(run_ranks: Ranks) -> None:
    def work(world: World) -> Any:
        with fail_together(world, "loading"):  # nobody fails
            pass
        try:
            with fail_together(world, "loading"):
                if world.rank == 1:
                    raise FileNotFoundError("no base model")
        except RankError as error:
            return str(error), error.wrong_input
        return None

    assert run_ranks(work, 2) == [("loading: rank 1: FileNotFoundError: no base model", True)] * 2


def test_equal_reasons_are_reported_once(run_ranks: Ranks) -> None:
    def work(world: World) -> Any:
        with pytest.raises(RankError) as raised, fail_together(world, "loading"):
            raise ValueError("bad key")
        return str(raised.value)

    assert run_ranks(work, 2) == ["loading: rank 0, 1: ValueError: bad key"] * 2


def test_consensus_is_max_of_packs_sum_of_weights_any_of_stop(run_ranks: Ranks) -> None:
    def work(world: World) -> Any:
        consensus = agree_on_step(
            world,
            num_packs=1 + world.rank,
            normaliser=2.5 + world.rank,
            stop=world.rank == 1,
            error=None,
            doing="step 3",
            extra=[7.0, float(world.rank)],
        )
        return consensus.num_packs, consensus.normaliser, consensus.stop, consensus.extra

    assert run_ranks(work, 2) == [(2, 6.0, True, [[7.0, 0.0], [7.0, 1.0]])] * 2


def test_a_consensus_with_an_error_raises_everywhere(run_ranks: Ranks) -> None:
    def work(world: World) -> Any:
        error = ValueError("record k is damaged") if world.rank == 0 else None
        with pytest.raises(RankError) as raised:
            agree_on_step(world, num_packs=1, normaliser=1, stop=False, error=error, doing="step 3")
        return str(raised.value)

    assert run_ranks(work, 2) == ["step 3: rank 0: ValueError: record k is damaged"] * 2


def test_sums_wrap_around_at_64_bits(run_ranks: Ranks) -> None:
    def work(world: World) -> Any:
        return distributed.sum_integers(world, [2**64 - 1, 2**63, 5 + world.rank])

    assert run_ranks(work, 2) == [[2**64 - 2, 0, 11]] * 2


def test_main_ranks_value_reaches_all(run_ranks: Ranks) -> None:
    assert run_ranks(lambda world: distributed.from_main(world, world.rank + 5), 2) == [5, 5]


@pytest.mark.promise(5)
def test_a_rank_that_never_comes_ends_in_bounded_time(run_ranks: Ranks) -> None:
    def work(world: World) -> Any:
        if world.rank == 1:
            return "left"
        begin = time.monotonic()
        with pytest.raises(RuntimeError):
            distributed.gather_rows(world, [1.0, 2.0])
        return time.monotonic() - begin < 40

    assert run_ranks(work, 2, limit_s=60) == [True, "left"]
