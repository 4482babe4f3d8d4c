"""A real SLURM on this machine: munged, slurmctld and slurmds, each node in its own namespaces.

Everything lives in one temporary folder and one network bridge. A node has its own host name,
address, processes and /dev/shm, so host lists, a lost node and a cut cable are what they are on a
cluster. Hardware is pretended. Needs root; without it, or without the packages, tests skip.
"""

import contextlib
import json
import os
import pwd
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from emoverse.run_dir.checkpoint import find_checkpoint
from launch import cli
from launch.slurm.job_log import read_job

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "unshare", "nsenter", "ip")
CONFIG = """\
ClusterName=test
FirstJobId={first_job}
SlurmctldHost=ctl({subnet}.1)
SlurmctldPort={port}
SlurmdPort={next_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# Also how long a requeued job waits; less than 5 is refused and means two minutes.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
GresTypes=gpu
AccountingStorageType=accounting_storage/none
MinJobAge=3600
MailProg=/bin/true
ReturnToService=2
PropagateResourceLimits=NONE
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
KillWait=2
CompleteWait=0
InactiveLimit=0
SlurmdTimeout=10
# Daemons run before everything else here, or a busy machine looks like one whose nodes are gone.
PropagatePrioProcess=1
MessageTimeout=5
BatchStartTimeout=10
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
CommunicationParameters=NoCtldInAddrAny
{nodes}
PartitionName=main Nodes=n[1-{count}] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 \
GraceTime=60
PartitionName=high Nodes=n[1-{count}] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
# The first process of a node; when it dies, the kernel ends everything in the node.
NODE = """\
hostname "$2"; mount --bind "$1/etc/hosts" /etc/hosts
mount -t tmpfs tmpfs /dev/shm
until [ -e "$1/net-$2" ]; do sleep 0.02; done
slurmd -D -N "$2" -f "$1/etc/slurm.conf"
"""
CONTROLLER = """\
hostname ctl; mount --bind "$1/etc/hosts" /etc/hosts
exec slurmctld -D -f "$1/etc/slurm.conf"
"""


class Cluster:
    """A running SLURM; `run` and `sbatch` talk to it."""

    def __init__(self, folder: Path, *, nodes: int, tracking: str = "linuxproc") -> None:
        self.folder, self.nodes = folder, nodes
        # Several clusters may run at once: other workers of pytest, other people.
        taken = {path.name for path in Path("/sys/class/net").iterdir()}
        self._tag = next(
            tag for tag in iter(lambda: secrets.randbelow(200) + 20, 0) if f"emo{tag}" not in taken
        )
        self._subnet, self._port = f"198.18.{self._tag}", 20000 + 10 * self._tag
        self._bridge = f"emo{self._tag}"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environ = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM_")},
            "SLURM_CONF": str(folder / "etc/slurm.conf"),
            "EMOVERSE_PYTHON": sys.executable,
            "EMOVERSE_CPU": "1",  # the GPUs of these nodes are pretended
            "PYTHONPATH": str(ROOT),
        }
        for name in ("etc", "munge", "state", "spool", "log", "dev"):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)
        (folder / "munge").chmod(0o711)
        self._write_files(tracking)

    def _write_files(self, tracking: str) -> None:
        key = self.folder / "munge/key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        names = [f"n{number}" for number in range(1, self.nodes + 1)]
        hosts = ["127.0.0.1 localhost", f"{self._subnet}.1 ctl"]
        hosts += [f"{self._subnet}.{10 + i} n{i}" for i in range(1, self.nodes + 1)]
        (self.folder / "etc/hosts").write_text("\n".join(hosts) + "\n")
        lines = [
            f"NodeName={name} NodeAddr={self._subnet}.{10 + i} CPUs=64 Sockets=2 CoresPerSocket=32 "
            "ThreadsPerCore=1 RealMemory=500000 Gres=gpu:a100:8 Feature=a100"
            for i, name in enumerate(names, 1)
        ]
        text = CONFIG.format(
            folder=self.folder,
            subnet=self._subnet,
            port=self._port,
            next_port=self._port + 1,
            # Ids must not come again: files of an earlier cluster would count as this one's.
            first_job=int(time.time()) % 500_000 * 100 + 1,
            user=pwd.getpwuid(os.geteuid()).pw_name,
            tracking=tracking,
            nodes="\n".join(lines),
            count=self.nodes,
        )
        (self.folder / "etc/slurm.conf").write_text(text)
        if tracking == "cgroup":
            (self.folder / "etc/cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for number in range(8):  # a device per pretended GPU: clones of /dev/null
            os.mknod(self.folder / f"dev/nvidia{number}", 0o20666, os.makedev(1, 3))
        (self.folder / "etc/gres.conf").write_text(
            f"NodeName=n[1-{self.nodes}] Name=gpu Type=a100 File={self.folder}/dev/nvidia[0-7]\n"
        )

    def start(self) -> None:
        """Daemons up and all nodes idle, or RuntimeError."""
        munge = self.folder / "munge"
        self._daemon(
            "munged",
            *("munged", "-F", "-S", str(munge / "socket"), "--key-file", str(munge / "key")),
            *("--pid-file", str(munge / "pid"), "--log-file", str(munge / "log")),
            *("--seed-file", str(munge / "seed")),
        )
        wait_until(lambda: (munge / "socket").exists(), 10, "munged")
        self._ip("link", "add", self._bridge, "type", "bridge")
        self._ip("addr", "add", f"{self._subnet}.1/24", "dev", self._bridge)
        self._ip("link", "set", self._bridge, "up")
        self._daemon("ctl", "unshare", "-m", "-u", "--", "bash", "-c", CONTROLLER, "_", self.folder)
        wait_until(lambda: "is UP" in self.run("scontrol", "ping", check=False), 15, "slurmctld")
        for number in range(1, self.nodes + 1):
            self.start_node(number)
        self.wait_for_idle()

    def stop(self) -> None:
        """Everything ends; the bridge goes."""
        subprocess.run(["scancel", "--quiet", "--user", str(os.geteuid())], env=self.environ)
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()
        subprocess.run(["ip", "link", "del", self._bridge], check=False)

    def _daemon(self, name: str, *command: str | Path) -> subprocess.Popen[bytes]:
        with (self.folder / f"log/{name}.out").open("ab") as log:
            daemon = subprocess.Popen(
                ["nice", "-n", "-15", *(str(word) for word in command)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environ,
                start_new_session=True,
            )
        self._daemons[name] = daemon
        return daemon

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    def start_node(self, number: int) -> None:
        """Switches a node on."""
        name, net = f"n{number}", self.folder / f"net-n{number}"
        net.unlink(missing_ok=True)
        daemon = self._daemon(
            name,
            *("unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--kill-child=KILL"),
            *("--mount-proc", "--", "bash", "-c", NODE, "_", self.folder, name),
        )
        children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children")
        wait_until(lambda: children.read_text().split(), 10, name)
        child, link = children.read_text().split()[0], f"emo{self._tag}-{number}"
        self._ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", child)
        self._ip("link", "set", link, "master", self._bridge, "up")
        inside = f"ip link set lo up; ip addr add {self._subnet}.{10 + number}/24 dev eth0"
        command = ["nsenter", "-t", child, "-n", "sh", "-c", f"{inside}; ip link set eth0 up"]
        subprocess.run(command, check=True)
        net.touch()

    def kill_node(self, number: int) -> None:
        """A power cut: every process of the node is gone at once."""
        daemon = self._daemons[f"n{number}"]
        daemon.kill()
        daemon.wait()

    def cut_cable(self, number: int, *, cut: bool = True) -> None:
        """Takes the node off the network, or brings it back; its processes go on."""
        self._ip("link", "set", f"emo{self._tag}-{number}", "down" if cut else "up")

    def wait_for_idle(self) -> None:
        """All nodes are up and without a job."""

        def idle() -> bool:
            return self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split() == (
                ["idle"] * self.nodes
            )

        wait_until(idle, 90, "idle nodes")

    def run(self, *command: str | Path, check: bool = True, cwd: Path = ROOT, **more: str) -> str:
        """Runs a command as a user of the cluster would; its stdout (and stderr if not `check`)."""
        done = subprocess.run(
            [str(word) for word in command],
            env={**self.environ, **more},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if check and done.returncode:
            raise RuntimeError(f"{command}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout if check else done.stdout + done.stderr

    def sbatch(self, *words: str | Path, **more: str) -> str:
        """Submits and returns the job's id."""
        return self.run("sbatch", "--parsable", *words, **more).strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, by field."""
        text = self.run("scontrol", "show", "job", "--oneliner", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, job: str, limit_s: float = 300, *, state: str = "") -> str:
        """Waits until the job has ended, or is in `state`; returns its state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE")

        def reached() -> bool:
            found = self.job(job)["JobState"]
            return found == state if state else found in over

        wait_until(reached, limit_s, f"job {job}: {state or 'its end'}", lambda: str(self.job(job)))
        return self.job(job)["JobState"]


def wait_until(
    condition: Callable[[], object],
    limit_s: float,
    what: str,
    more: Callable[[], str] = lambda: "",
) -> None:
    """Polls until the condition is true; RuntimeError after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {limit_s} s for {what} in vain {more()}")
        time.sleep(0.05)


def why_no_slurm() -> str | None:
    """The reason why SLURM cannot be started here, None if it can be tried."""
    if os.geteuid() != 0:
        return "starting SLURM nodes in namespaces needs root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge)"
    probe = ["unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--", "true"]
    if subprocess.run(probe, capture_output=True).returncode:
        return "the kernel allows no namespaces here"
    return None


def started(*, nodes: int, tracking: str = "linuxproc") -> Iterator[Cluster]:
    """Starts a cluster, or skips with the reason; ends it whatever happens."""
    reason = why_no_slurm()
    if reason is not None:
        pytest.skip(reason)
    # Not below pytest's own folder: munge wants a way to its socket that everybody may go.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = Cluster(Path(folder), nodes=nodes, tracking=tracking)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes for all tests of the session."""
    yield from started(nodes=4)


@pytest.fixture
def task_only_cluster() -> Iterator[Cluster]:
    """A cluster that signals the tasks of a step and not their children."""
    if not Path("/sys/fs/cgroup/freezer").is_dir():
        pytest.skip("needs the freezer of cgroup v1")
    yield from started(nodes=2, tracking="cgroup")
    for folder in Path("/sys/fs/cgroup").glob("*/slurm_n[12]"):
        subprocess.run(["find", folder, "-depth", "-type", "d", "-exec", "rmdir", "{}", "+"])


@dataclass(frozen=True)
class NanoRun:
    """A short run of the nano base: words for the command line, and its folder."""

    run_dir: Path
    words: tuple[str, ...]

    def stage(self, stage: str = "stage1") -> Path:
        return self.run_dir / stage

    def steps(self, stage: str = "stage1") -> list[int]:
        """Finished steps as metrics.jsonl tells them, in the order of its lines."""
        return [line["step"] for line in self.lines(stage) if line["kind"] == "step"]

    def lines(self, stage: str = "stage1") -> list[dict[str, Any]]:
        path = self.stage(stage) / "metrics.jsonl"
        if not path.exists():
            return []
        found = []
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def weights(self, stage: str = "stage1") -> bytes:
        """The last checkpoint's trained weights, verified against its manifest."""
        folder = self.stage(stage) / "checkpoints"
        newest = find_checkpoint(folder, lambda text: pytest.fail(text))
        assert newest is not None, f"{folder} holds no checkpoint"
        return (newest / "trained.safetensors").read_bytes()

    def events(self, job: str) -> list[dict[str, Any]]:
        return read_job(self.run_dir, job).events


@pytest.fixture(scope="session")
def nano_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few dozen synthetic clips that offer every task."""
    folder = tmp_path_factory.mktemp("nano") / "shards"
    words = ["build", "synthetic", "--out", str(folder), "--clips", "60", "--identities", "12"]
    assert cli.main([*words, "--seed", "1"]) == 0
    return folder


@pytest.fixture
def nano_run(nano_shards: Path, tmp_path: Path) -> Callable[..., NanoRun]:
    """`nano_run("train.save_every=1", name="other")`: words of a run of 12 steps per stage."""

    def make(*overrides: str, name: str = "run") -> NanoRun:
        run_dir = tmp_path / name
        words = (
            str(ROOT / "configs/nano.yaml"),
            f"run.run_dir={run_dir}",
            *(f"{key}.shards={nano_shards}" for key in ("data", "evaluation")),
            *("stages.stage1.pool.take=24", "stages.stage1.epochs=4"),
            *(
                "stages.stage2.pool.rest_of=null",
                "stages.stage2.pool.take=24",
                "stages.stage2.epochs=2",
            ),
            *("train.global_batch_size=8", "train.log_every=1", "train.save_every=4"),
            *("train.tensorboard=false", "model.cache_features=false"),
            *("evaluation.max_records=4", "evaluation.when=[base,stage1,stage2]"),
            *overrides,
        )
        return NanoRun(run_dir, words)

    return make
