"""`emoverse launch` on a real SLURM: the chain, an array, and what is refused before the queue."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

CLUSTER = """\
executor: slurm
account: none
nodes: 2
tasks_per_node: 1
gpus_per_node: 4
cpus_per_task: 1
minutes: 30
environment: {EMOVERSE_SAID: "two words"}
"""


@pytest.fixture
def launch(cluster: Any, tmp_path: Path) -> Callable[..., Any]:
    """`launch(run, words...)`: the parsed report, or the text of the refusal."""
    (tmp_path / "cluster.yaml").write_text(CLUSTER)

    def call(run: Any, *words: str, ok: bool = True) -> Any:
        import sys

        command = [sys.executable, "-m", "launch.cli", "launch", str(tmp_path / "cluster.yaml")]
        said = cluster.run(*command, *run.words, *words, *(["--json"] if ok else []), check=ok)
        return json.loads(said) if ok else said

    return call


def status(cluster: Any, run_dir: Path) -> Any:
    import sys

    command = [sys.executable, "-m", "launch.cli", "status", str(run_dir), "--json"]
    return json.loads(cluster.run(*command))


def logs_of(job: dict[str, Any]) -> str:
    pattern = Path(job["logs"])
    return "\n".join(path.read_text() for path in sorted(pattern.parent.glob(pattern.name)))


def test_the_chain_trains_scores_and_tells(
    cluster: Any, nano_run: Any, launch: Any, tmp_path: Path
) -> None:
    run = nano_run("stages.stage1.epochs=2", "stages.stage2.epochs=1")
    expected = launch(run, "--dry-run")["scripts"]
    one, two, three = launch(run)["jobs"]
    assert [job["parts"] for job in (one, two, three)] == [["stage1"], ["stage2"], ["eval"]]
    assert two["waits_for"] == f"afterok:{one['job']}"
    # What --dry-run printed is what SLURM got, but for the ids that nobody knew yet.
    for job, dry in zip((one, two, three), expected, strict=True):
        text = cluster.run("scontrol", "write", "batch_script", job["job"], "-")
        for name, before in (("stage1", one), ("stage2", two)):
            text = text.replace(f"afterok:{before['job']}", f"'afterok:<id of {name}>'")
        assert text.strip() == dry["script"].strip()
    told = status(cluster, run.run_dir)
    assert told["scheduler"] == "answers"
    assert {job["state"] for job in told["runs"][0]["jobs"]} <= {"running", "pending", "done"}
    for job in (one, two, three):
        assert cluster.wait(job["job"]) == "COMPLETED", logs_of(job)
    assert (run.run_dir / "report.html").is_file()
    # From files alone.
    cluster.environ["SLURM_CONF"], conf = "/nowhere", cluster.environ["SLURM_CONF"]
    try:
        told = status(cluster, run.run_dir)
    finally:
        cluster.environ["SLURM_CONF"] = conf
    assert "from files alone" in told["scheduler"]
    assert [job["state"] for job in told["runs"][0]["jobs"]] == ["done"] * 3
    assert told["runs"][0]["stages"]["stage2"]["state"] == "done"
    assert told["runs"][0]["next"] == f"open {run.run_dir}/report.html"
    again = launch(run, "--no-evaluate")
    assert again["jobs"] == []


def test_an_array_of_two_variants_and_a_stopped_task(
    cluster: Any, nano_run: Any, launch: Any, tmp_path: Path
) -> None:
    run = nano_run("stages.stage1.epochs=2")
    variants = [
        *("--variant", "stages.stage1.optim.lr_lora=1e-3"),
        *("--variant", "stages.stage1.optim.lr_lora=2e-3"),
        *("--stage", "stage1", "cluster.nodes=1"),
    ]
    jobs = launch(run, *variants)["jobs"]
    array = jobs[0]["job"].split("_")[0]
    assert [job["job"] for job in jobs] == [f"{array}_0", f"{array}_1"]
    folders = [run.run_dir / f"optim.lr_lora_{number}e_3" for number in (1, 2)]
    # One of them is stopped at once, while it starts: it comes back alone.
    cluster.wait(jobs[1]["job"], state="RUNNING")
    events = folders[1] / "jobs" / f"{array}_1.jsonl"
    deadline = 600
    while not events.exists():
        deadline -= 1
        assert deadline, "the task has not begun"
        cluster.run("sleep", "0.1")
    cluster.run("scancel", "--signal=USR2", jobs[1]["job"])
    for job in jobs:
        assert cluster.wait(job["job"]) == "COMPLETED", logs_of(job)
    assert [cluster.job(job["job"])["Restarts"] for job in jobs] == ["0", "1"]
    weights = [
        next((folder / "stage1/checkpoints").glob("*12/trained.safetensors"), None)
        or next((folder / "stage1/checkpoints").glob("*06/trained.safetensors"))
        for folder in folders
    ]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    told = status(cluster, run.run_dir)
    assert [one["stages"]["stage1"]["state"] for one in told["runs"]] == ["done", "done"]


def test_mistakes_are_told_before_anything_is_queued(
    cluster: Any, nano_run: Any, launch: Any, tmp_path: Path
) -> None:
    run = nano_run()

    def queued() -> str:
        return str(cluster.run("squeue", "--noheader", "--states=all"))

    before = queued()
    assert "nowhere" in launch(run, "cluster.partition=nowhere", ok=False)
    assert "nvalid partition name" in launch(run, "cluster.partition=nowhere", ok=False)
    assert "cluster.account: not set" in launch(run, "cluster.account=null", ok=False)
    assert "no such file" in launch(run, str(tmp_path / "missing.yaml"), ok=False)
    assert "the job has 16 ranks" in launch(
        run, "cluster.tasks_per_node=8", "cluster.gpus_per_node=8", ok=False
    )
    assert "sbatch would refuse" in launch(run, "cluster.nodes=5", ok=False)
    assert "no such folder" in launch(run, "data.shards=/nowhere", ok=False)
    other = run.stage() / "DONE"
    other.parent.mkdir(parents=True)
    other.write_text(json.dumps({"step": 1, "knobs": {"run.seed": 99}}))
    assert "run.seed: saved 99, now 1" in launch(run, ok=False)
    assert queued() == before
