"""`emoverse launch` without a scheduler: dry runs, clusters, variants, and every refusal."""

import dataclasses
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_shards.shards.index import ShardIndex
from data_shards.tasks import TASKS
from emoverse.config.schema import freeze_config, frozen_path, load_config, load_frozen
from launch import cli
from launch.context import RankContext
from launch.slurm import job_log, preflight, snapshot, submit
from launch.slurm.cluster import load_cluster, split_overrides
from launch.slurm.preflight import check_memory
from launch.slurm.variants import make_runs
from launch.worker import Job

ROOT = Path(__file__).resolve().parents[3]
EXPECTED = Path(__file__).resolve().parents[1] / "expected"
CLUSTERS = sorted((ROOT / "configs/cluster").glob("*.yaml"))
NANO = ROOT / "configs/nano.yaml"


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def shards(tmp_path: Path, make_index: Callable[..., ShardIndex]) -> list[str]:
    make_index(tmp_path / "shards", {TASKS: 4000})
    names = [f"{part}.shards={tmp_path / 'shards'}" for part in ("data", "evaluation")]
    return [*names, f"run.run_dir={tmp_path / 'run'}"]


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_a_cluster_loads_and_says_how_it_is_used(path: Path) -> None:
    cluster = load_cluster(path)
    assert cluster.num_ranks >= 1
    assert "emoverse launch configs/cluster/" in path.read_text()


@pytest.mark.parametrize("name", ["a100", "rtx3090", "local"])
def test_a_dry_run_prints_the_exact_scripts(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["cluster.account=lab"] if name == "a100" else []
    code, out, err = call(
        capsys,
        *("launch", ROOT / f"configs/cluster/{name}.yaml", NANO, "run.run_dir=runs/x", "--dry-run"),
        *words,
    )
    assert (code, err) == (0, "")
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"
    config = load_config([NANO], ["run.run_dir=runs/x"])
    for found, name_of in {
        sys.executable: "PYTHON",
        snapshot.code_hash(ROOT): "CODE",
        frozen_path(config, tmp_path).stem: "config-HASH",
        str(tmp_path): "HERE",
    }.items():
        out = out.replace(found, name_of)
    expected = EXPECTED / f"dry_run_{name}.txt"
    assert out == expected.read_text()


def test_seeds_and_variants_make_an_array(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(
        capsys,
        *("launch", ROOT / "configs/cluster/rtx3090.yaml", NANO, "--dry-run", "--seeds", "1,2"),
        *("--variant", "stages.stage1.rates.fer=1/5 stages.stage1.rates.msa=3/5"),
        *("--variant", "train.loss=token", "--exclude", "n7", "cluster.exclude=n[1-2]"),
    )
    assert code == 0
    assert out.count("#SBATCH --array=0-3%4") == 3
    assert out.count("#SBATCH --dependency='aftercorr:<id of stage1>'") == 1
    assert out.count("#SBATCH --exclude='n[1-2],n7'") == 3


def test_every_variant_has_a_run_directory_of_its_own(tmp_path: Path) -> None:
    overlay = tmp_path / "fer_low.yaml"
    overlay.write_text("train: {loss: token}\n")
    runs = make_runs(
        [NANO], ["run.run_dir=runs/x"], variants=[str(overlay), "train.zero_stage=1"], seeds=[3, 4]
    )
    assert [str(run.config.run.run_dir) for run in runs] == [
        *("runs/x/fer_low-seed3", "runs/x/fer_low-seed4"),
        *("runs/x/train.zero_stage_1-seed3", "runs/x/train.zero_stage_1-seed4"),
    ]
    assert [run.config.run.seed for run in runs] == [3, 4, 3, 4]
    assert [run.config.train.loss for run in runs] == ["token", "token", "sample", "sample"]
    assert runs[0].config.run.name == "nano-fer_low-seed3"
    with pytest.raises(ValueError, match="two runs would share the run directory"):
        make_runs([NANO], [], seeds=[1, 1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cluster.account=null"], "cluster.account: not set; give the project"),
        (["cluster.nodes=9"], "train.global_batch_size: found 16, but the job has 18 ranks"),
        (["cluster.gpu_memory_gib=0.001"], "cluster.gpu_memory_gib: found 0.001, but weights"),
        (["cluster.tasks_per_node=3"], "tasks_per_node: found 3: at most one rank per GPU"),
        (["cluster.executor=local", "cluster.nodes=2"], "the local executor has one node"),
        (["cluster.node=2"], "node: found 2: unknown key (did you mean 'nodes'?)"),
        (["--seeds", "1,x"], "--seeds: found '1,x': give integers"),
        (["--stage", "stage3"], "--stage stage3: the config has no such stage"),
        (["run.seed=-1"], "run.seed: found -1: must be at least 0"),
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        (["data.shards=/nowhere"], "data.shards: shard folder /nowhere: no such folder"),
        (["model.base=internvl2-4b"], "model.base is 'internvl2-4b', a name that only `plan`"),
        (["run.run_dir=/proc/x"], "run.run_dir: cannot write to /proc on "),
        ([], "sbatch is not on PATH: call `emoverse launch` on a login node"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_queued(
    words: list[str],
    message: str,
    shards: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SBATCH_ACCOUNT", raising=False)
    where = ROOT / "configs/cluster/rtx3090.yaml"
    code, out, err = call(capsys, "launch", where, NANO, *shards, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "run").exists()


def test_all_problems_are_told_at_once(
    shards: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(
        capsys,
        *("launch", ROOT / "configs/cluster/a100.yaml", NANO, *shards, "cluster.nodes=3"),
        *("data.shards=/nowhere", "evaluation.shards=/elsewhere"),
    )
    assert code == 2
    lines = err.splitlines()
    assert lines[0] == "emoverse launch: preflight found 4 problems:"
    for number, word in enumerate(["account", "24 ranks", "/nowhere", "/elsewhere"], 1):
        assert word in lines[number]


@pytest.mark.parametrize(("gib", "ending"), [(24, "optimiser states"), (1, "would fit")])
def test_memory_is_compared_with_the_plan_s_estimate(gib: int, ending: str) -> None:
    config = load_config([NANO])
    cluster = load_cluster(ROOT / "configs/cluster/rtx3090.yaml", [f"gpu_memory_gib={gib}"])
    (note,) = check_memory(config, cluster)
    assert note.startswith("memory per GPU, estimated: ") and f" of {gib} GiB, " in note
    assert note.endswith(ending)


def test_an_account_from_the_environment_counts(
    shards: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")
    monkeypatch.setenv("PATH", "")
    _, _, err = call(capsys, "launch", ROOT / "configs/cluster/a100.yaml", NANO, *shards)
    assert "account" not in err and "sbatch is not on PATH" in err


def test_a_run_directory_of_another_config_is_refused(
    shards: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless the changes are accepted, which the jobs are told, too."""
    done = tmp_path / "run/stage1/DONE"
    done.parent.mkdir(parents=True)
    done.write_text('{"step": 1, "knobs": {"run.seed": 99}}')
    words = ["launch", ROOT / "configs/cluster/local.yaml", NANO, *shards]
    code, _, err = call(capsys, *words)
    assert code == 2
    assert f"{done} belongs to another run" in err and "run.seed: saved 99, now 1" in err
    assert not (tmp_path / "run/jobs").exists()
    chains: list[submit.Chain] = []
    monkeypatch.setattr(submit, "submit", lambda chain: chains.append(chain) or [])
    assert call(capsys, *words, "--accept-changes")[0] == 0
    (chain,) = chains
    assert "--accept-changes" in submit.job_of(chain, chain.runs[0], chain.steps[0]).words


def test_a_job_that_resumes_needs_no_room_for_what_it_has_saved(
    shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It began with just enough, and its checkpoints lie there now; stage 2 is done."""
    config = load_config([NANO], shards)
    whole = preflight.checkpoint_bytes(config)
    free = whole + preflight.OTHER_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert preflight.check_disk(config, ["stage1"]) == []
    kept = config.run.run_dir / "stage1/checkpoints/step_000007/optimizer.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"x" * 1000)
    done = config.run.run_dir / "stage2/DONE"
    done.parent.mkdir()
    done.touch()
    free -= 1000
    assert preflight.check_disk(config, ["stage1", "stage2"]) == []
    free -= 1
    with pytest.raises(ValueError, match="make room, lower"):
        preflight.check_disk(config, ["stage1", "stage2"])


def test_a_finished_stage_is_queued_again_only_behind_an_unfinished_one(
    shards: list[str], tmp_path: Path
) -> None:
    """Stage 1 was removed to be trained otherwise: stage 2 is that of the old one."""
    runs = make_runs([NANO], shards)
    cluster = load_cluster(ROOT / "configs/cluster/a100.yaml")
    steps = submit.steps_of(cluster, ["stage1", "stage2"], evaluate=True)
    chain = submit.Chain(cluster=cluster, cluster_file=Path("a100.yaml"), runs=runs, steps=steps)

    def left() -> list[str]:
        return [step.name for step in submit.unfinished(chain).steps]

    assert left() == ["stage1", "stage2", "eval"]
    for stage in ("stage2", "stage1"):
        (tmp_path / "run" / stage).mkdir(parents=True)
        (tmp_path / "run" / stage / "DONE").touch()
        assert left() == (["eval"] if stage == "stage1" else ["stage1", "stage2", "eval"])


def test_a_run_directory_inside_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = load_config([NANO], [f"run.run_dir={tmp_path / 'file/run'}"])
    with pytest.raises(ValueError, match=r"cannot write to .*/file on .*Not a directory"):
        preflight.check_disk(config, [])


def test_accepted_changes_pass_the_checks_of_a_job(
    shards: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`sbatch slurm/stage1.sh CONFIG --accept-changes`: the script's check, then rank 0's."""
    done = tmp_path / "run/stage1/DONE"
    done.parent.mkdir(parents=True)
    done.write_text('{"step": 1, "knobs": {"run.seed": 99}}')
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert job_log.main(["stage1", str(NANO), *shards, "--accept-changes"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run/stage1/logs/7'}\n"
    context = RankContext(launcher="slurm", job="7", address="n1", world_size=1)
    refused = Job(
        config=load_config([NANO], shards),
        parts=("stage1",),
        context=context,
        max_requeues=3,
        logs="L",
    )
    assert refused.start() == 2 and "give --accept-changes" in capsys.readouterr().err
    assert dataclasses.replace(refused, accept_changes=True).start() == 0


@pytest.mark.parametrize("suffix", ["idx", "keys"])
def test_damaged_index_files_are_found(
    suffix: str, shards: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    damaged = tmp_path / f"shards/shard-000001.{suffix}"
    damaged.write_bytes(bytes(len(damaged.read_bytes())))
    code, _, err = call(capsys, "launch", ROOT / "configs/cluster/local.yaml", NANO, *shards)
    assert code == 2
    assert "data.shards: " in err and f"shard-000001.{suffix}" in err


@pytest.mark.parametrize("num_runs", [1, 2])
def test_a_chain_is_queued_as_a_whole_or_not_at_all(
    num_runs: int,
    shards: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scheduler takes two steps and refuses the third: the two must not run."""
    runs = make_runs([NANO], shards, seeds=list(range(num_runs)))
    cluster = load_cluster(ROOT / "configs/cluster/a100.yaml")
    steps = submit.steps_of(cluster, ["stage1", "stage2"], evaluate=True)
    chain = submit.Chain(cluster=cluster, cluster_file=Path("a100.yaml"), runs=runs, steps=steps)
    queued: list[str] = []
    asked: list[str | None] = []

    def accept(chain: submit.Chain, step: submit.Step, code: Path, dependency: str | None) -> Any:
        asked.append(dependency)
        if step.scores:
            raise submit.FailedJobError("sbatch: error: Batch job submission failed")
        found = [f"{len(asked)}_{task}" for task in range(num_runs)]
        queued.extend(found)
        return [SimpleNamespace(job_id=job) for job in found]

    cancelled: list[list[str]] = []
    monkeypatch.setattr(submit, "_submit_step", accept)
    monkeypatch.setattr(subprocess, "run", lambda words, **_: cancelled.append(words))
    with pytest.raises(ValueError, match="refused a job, so none is queued: sbatch: error"):
        submit.submit(chain)
    assert cancelled == [["scancel", *queued]] and len(queued) == 2 * num_runs
    after = "afterok" if num_runs == 1 else "aftercorr"
    assert asked == [None, f"{after}:1", f"{after}:2"]


def test_a_frozen_config_is_never_written_over(tmp_path: Path) -> None:
    """A job that waits reads its own, also when another one is queued for the same run."""
    configs = [
        load_config([NANO], [f"run.run_dir={tmp_path / 'run'}", f"train.keep_checkpoints={kept}"])
        for kept in (2, 3)
    ]
    files = [freeze_config(config, tmp_path) for config in configs]
    assert [load_frozen(file) for file in files] == configs


def test_the_variables_of_a_surrounding_job_are_not_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/x")
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")
    monkeypatch.setenv("RANK", "1")
    with submit._outside_of_jobs({"MORE": "x"}):
        found = dict(os.environ)
    assert "SLURM_JOB_ID" not in found and "RANK" not in found
    assert (found["SLURM_CONF"], found["SBATCH_ACCOUNT"], found["MORE"]) == ("/etc/x", "lab", "x")


def test_the_frozen_code_runs_and_does_not_follow_edits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    for package in snapshot.PACKAGES:
        (source / package).mkdir(parents=True)
        (source / package / "__init__.py").write_text("VALUE = 1\n")
    monkeypatch.setattr(snapshot, "source_root", lambda: source)
    folder = snapshot.freeze_code(tmp_path / "run")
    assert snapshot.freeze_code(tmp_path / "run") == folder
    (source / "launch/__init__.py").write_text("VALUE = 2\n")
    assert snapshot.freeze_code(tmp_path / "run") != folder
    done = subprocess.run(
        [sys.executable, "-c", "import launch; print(launch.VALUE, launch.__file__)"],
        cwd=source,
        env={"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["1", str(folder / "launch/__init__.py")]


def test_two_launches_freeze_the_same_at_the_same_time(tmp_path: Path) -> None:
    config = load_config([NANO], [f"run.run_dir={tmp_path / 'run'}"])
    context = multiprocessing.get_context("fork")
    begin = context.Barrier(2)

    def freeze() -> None:
        begin.wait(60)
        snapshot.freeze_code(config.run.run_dir)
        for _ in range(100):
            assert load_frozen(freeze_config(config, tmp_path / "run/jobs")) == config

    both = [context.Process(target=freeze) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list((tmp_path / "run/jobs").iterdir())) == 2


def test_overrides_are_sorted_by_what_they_are_for() -> None:
    mine, others = split_overrides(["cluster.nodes=2", "run.seed=1", "cluster.account=a"])
    assert (mine, others) == (["nodes=2", "account=a"], ["run.seed=1"])


def test_a_checkpoint_of_a_job_is_the_job() -> None:
    job = submit.TrainJob(["a", "b"])
    again = job.checkpoint()
    assert isinstance(again.function, submit.TrainJob) and again.function.words == ["a", "b"]
