"""The check of the nodes: which one is named, for what, and that every rank raises it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from emoverse.engine import health
from emoverse.engine.distributed import RankError, World, is_lost_peer, shutdown
from emoverse.engine.health import NodeFacts, check_nodes, memory_notes, notes_of, problems_of
from emoverse.estimate.memory import GIB, MemoryEstimate


def facts(rank: int, **changes: Any) -> NodeFacts:
    usual = NodeFacts(
        rank=rank,
        host=f"n{rank // 2}",
        versions={"torch": "2.13.0", "python": "3.11.7"},
        clock=1000.0,
        device="A100",
        gpus=2,
        memory=80 * GIB,
        free_share=0.99,
        work_s=0.01,
        reduced=True,
        reduce_s=0.001,
    )
    return replace(usual, **changes)


# Of an 8B model on one card.
NEED = MemoryEstimate(
    weights=15 * GIB,
    gathered=0,
    gradients=1 * GIB,
    optimizer=1 * GIB,
    activations=30 * GIB,
    logits=0,
    vision=0,
    workspace=0,
    host=0,
)
FOUR = [facts(rank) for rank in range(4)]


def test_equal_nodes_have_no_problem() -> None:
    assert problems_of(FOUR, NEED) == []
    assert memory_notes(FOUR, NEED) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"versions": {"torch": "2.12.0", "python": "3.11.7"}}, "torch 2.12.0, elsewhere 2.13.0"),
        ({"versions": {"torch": "2.13.0"}}, "python missing, elsewhere 3.11.7"),
        ({"device": "V100"}, "device V100, elsewhere A100"),
        ({"free_share": 0.4}, "rank 3: 60% of its GPU's memory is used by another process"),
        (
            {"memory": 16 * GIB},
            "rank 3: its GPU has 16.0 GiB, weights and optimiser states alone take 17.0 GiB; "
            "emoverse plan shows what fits",
        ),
        ({"reduced": False}, "rank 3 received a wrong sum from all_reduce"),
    ],
)
def test_the_differing_node_is_named(changes: dict[str, Any], problem: str) -> None:
    assert problems_of([*FOUR[:3], facts(3, **changes)], NEED) == [("n1", problem)]


def test_gpus_that_torch_cannot_use_are_a_problem() -> None:
    alike = {"device": "cpu", "memory": 0, "versions": {"torch": "2.13.0+cpu"}}
    problems = problems_of([facts(rank, **alike) for rank in range(4)], NEED)
    assert [host for host, _ in problems] == ["n0", "n1"]
    assert problems[0][1].startswith(
        "the job has 2 GPUs there, but torch 2.13.0+cpu would train on"
    )
    assert "EMOVERSE_CPU=1" in problems[0][1]
    assert problems_of([facts(rank, **alike, gpus=0) for rank in range(4)], NEED) == []
    assert health._gpus_given({"SLURM_GPUS_ON_NODE": "8"}) == 8
    assert health._gpus_given({"SLURM_GPUS_ON_NODE": "8", "EMOVERSE_CPU": "1"}) == 0
    assert health._gpus_given({}) == health._gpus_given({"SLURM_GPUS_ON_NODE": "?"}) == 0


def test_a_gpu_that_may_be_too_small_is_noted() -> None:
    small = [*FOUR[:3], facts(3, memory=24 * GIB)]
    assert problems_of(small, NEED) == []
    (note,) = memory_notes(small, NEED)
    assert note.startswith("plan estimates 47.0 GiB per GPU and the smallest has 24.0 GiB")


def test_two_ranks_of_a_host_report_it_once() -> None:
    other = {"torch": "2.12.0", "python": "3.11.7"}
    six = [*FOUR, facts(4, versions=other), facts(5, versions=other)]
    assert problems_of(six, NEED) == [("n2", "torch 2.12.0, elsewhere 2.13.0")]


def test_what_is_suspicious_but_no_error(cpu_world: World) -> None:
    nodes = [*FOUR[:3], facts(3, clock=1070.0, work_s=0.05)]
    first, *notes = notes_of(nodes, nodes[0], cpu_world)
    assert first.startswith("2 equal nodes (A100, torch 2.13.0); all_reduce of 1 MiB in 1.0 ms")
    assert notes == [
        "n1: its clock is +70 s off the others",
        "n1: rank 3 computes 5.0 times slower than the median; if that persists, exclude the node",
    ]


@pytest.fixture
def cpu_world() -> World:
    import torch

    return World(rank=0, world_size=4, local_rank=0, device=torch.device("cpu"))


def test_a_lost_peer_is_distinguished_from_other_faults(
    run_ranks: Callable[..., list[Any]],
) -> None:
    def work(world: World) -> bool | None:
        import torch
        import torch.distributed as dist

        if world.rank == 1:
            shutdown()
            return None
        try:
            for _ in range(100):
                dist.all_reduce(torch.ones(1000))
        except Exception as error:
            return is_lost_peer(error)
        return None

    assert run_ranks(work, 2) == [True, None]
    assert not is_lost_peer(RuntimeError("loss is not finite"))
    assert not is_lost_peer(RankError("rank 1: no such file", wrong_input=True))


def test_ranks_of_one_group(run_ranks: Callable[..., list[Any]]) -> None:
    def good(world: World) -> list[str]:
        return check_nodes(world, NEED)

    assert run_ranks(good, 1) == [[]]
    notes = run_ranks(good, 2)
    assert "1 equal nodes (cpu, torch " in notes[0][0] and " GB/s per rank" in notes[0][0]

    def bad(world: World) -> str:
        if world.rank == 1:
            health.package_versions = lambda: {"torch": "0.1"}
            health.platform.node = lambda: "n7"
        try:
            check_nodes(world, NEED)
        except RankError as error:
            return f"{error.wrong_input}: {error}"
        return "no error"

    one, two = run_ranks(bad, 2)
    assert one == two
    assert one.startswith("False: the nodes cannot train together: ")
    assert "n7: torch 0.1, elsewhere" in one and "emoverse launch --exclude n7" in one
