"""Which rank is this: every launcher's environment, whole and partly set."""

import pytest

from launch.context import RANK_VARIABLES, RankContext, first_host, read_context

FIVE = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}
# What srun sets on the second task of the second node.
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_RESTART_COUNT": "2",
}
SUBMITIT = {
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1",
    "SUBMITIT_LOCAL_NTASKS": "2",
    "SUBMITIT_LOCAL_JOB_ID": "987",
}


def test_nobody_means_one_process() -> None:
    context = read_context({"HOME": "/x"})
    assert context == RankContext(launcher="none")
    environ = {"HOME": "/x"}
    context.export(environ)
    assert environ == {"HOME": "/x"}


def test_srun() -> None:
    context = read_context(SRUN)
    assert (context.launcher, context.rank, context.local_rank, context.world_size) == (
        "slurm",
        3,
        1,
        4,
    )
    assert (context.address, context.job, context.num_restarts) == ("gpu003", "4711", 2)
    assert 1024 < context.port < 32768
    environ = dict(SRUN)
    context.export(environ)
    assert [environ[name] for name in RANK_VARIABLES] == [
        "3",
        "1",
        "4",
        "gpu003",
        str(context.port),
    ]


def test_all_ranks_of_a_step_meet_at_the_same_place() -> None:
    contexts = [read_context(SRUN | {"SLURM_PROCID": str(rank)}) for rank in range(4)]
    assert len({(context.address, context.port) for context in contexts}) == 1
    # Two steps of a job, and two jobs, may share a node.
    others = [SRUN | {"SLURM_STEP_ID": "1"}, SRUN | {"SLURM_JOB_ID": "4712"}]
    assert len({read_context(environ).port for environ in (SRUN, *others)}) == 3


def test_the_tasks_of_an_array_have_names_of_their_own() -> None:
    array = {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "11"}
    assert read_context(SRUN | array).job == "4700_11"


def test_an_address_that_the_user_has_chosen_is_kept() -> None:
    context = read_context(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (context.address, context.port) == ("10.0.0.1", 1234)


def test_torchrun_wins_over_slurm_and_nobody_is_requeued() -> None:
    context = read_context(SRUN | FIVE)
    assert (context.launcher, context.address, context.job) == ("variables", "head", None)
    environ = SRUN | FIVE
    context.export(environ)
    assert environ == SRUN | FIVE


def test_submitit_on_this_machine() -> None:
    context = read_context(SUBMITIT)
    assert (context.launcher, context.rank, context.world_size) == ("submitit", 1, 2)
    assert (context.address, context.job) == ("127.0.0.1", "987")


@pytest.mark.parametrize("missing", RANK_VARIABLES)
def test_half_set_rank_variables(missing: str) -> None:
    environ = {name: value for name, value in FIVE.items() if name != missing}
    with pytest.raises(
        ValueError, match=f"partly set: .* are set, {missing} are not; set all five"
    ):
        read_context(environ)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_a_lone_rank_variable_inside_a_step(name: str) -> None:
    with pytest.raises(ValueError, match=f"partly set: {name} are set"):
        read_context(SRUN | {name: "1"})


@pytest.mark.parametrize(
    "missing", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"]
)
def test_half_a_step(missing: str) -> None:
    environ = {name: value for name, value in SRUN.items() if name != missing}
    with pytest.raises(ValueError, match=f"{missing} are not; srun sets them"):
        read_context(environ)


@pytest.mark.parametrize("missing", [name for name in SUBMITIT if "GLOBALID" not in name])
def test_half_a_submitit_job(missing: str) -> None:
    environ = {name: value for name, value in SUBMITIT.items() if name != missing}
    with pytest.raises(ValueError, match=f"{missing} are not; submitit's local executor"):
        read_context(environ)


def test_a_batch_shell_without_srun_does_not_wait_for_ever() -> None:
    environ = {name: value for name, value in SRUN.items() if "STEP" not in name}
    with pytest.raises(ValueError, match=r"SLURM_NTASKS=4 but .* not started by srun"):
        read_context(environ)
    assert read_context(environ | {"SLURM_NTASKS": "1"}).world_size == 1


def test_numbers_are_numbers() -> None:
    with pytest.raises(ValueError, match="SLURM_PROCID must be an integer, found 'one'"):
        read_context(SRUN | {"SLURM_PROCID": "one"})


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[003-007,9],x1", "gpu003"),
        ("login,gpu[1-2]", "login"),
        ("rack[1-2]node[05-06]", "rack1node05"),
        ("10.0.0.7", "10.0.0.7"),
        ("a-b[7]", "a-b7"),
    ],
)
def test_the_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_no_host() -> None:
    with pytest.raises(ValueError, match="must name hosts, found ''"):
        first_host("")
