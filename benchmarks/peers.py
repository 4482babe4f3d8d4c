"""The other libraries, in an environment of their own, and how everything is measured.

`reexecute()` makes the environment on the first call (`--env`, by default .bench-venv beside this
folder's parent), installs each peer by itself so that one that cannot be had does not stop the
others, and runs the calling script again with its Python. Measured is CPU time (user and system,
children included), because wall time on a shared machine says little: medians of interleaved
rounds.
"""

import importlib
import os
import platform
import resource
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
# What both sides stand on, then the peers. torch and torchvision come as a pair (streaming loads
# torchvision), and on x86_64 as builds for CUDA, which bring the libraries that torchcodec loads.
BASE = (
    "torch==2.14.1",
    "torchvision==0.29.1",
    "av==18.1.0",
    "pillow==13.0.0",
    "simplejpeg==1.9.0",
    "isal==1.9.1",
    "fsspec==2026.9.0",
)
PEERS = {
    "webdataset": "webdataset==1.0.2",
    "cv2": "opencv-python-headless",
    "decord": "decord",
    "torchcodec": "torchcodec",
    "streaming": "mosaicml-streaming",
    "megatron.energon": "megatron-energon",
}


def reexecute(environment: Path) -> None:
    """Run the script in the peers' environment; returns there, never here."""
    python = environment / "bin" / "python"
    if Path(sys.prefix).resolve() == environment.resolve():
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        return
    if not (environment / ".installed").exists():
        if not python.exists():
            venv.create(environment, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "-q"]
        subprocess.run([*pip, *BASE], check=True)
        for package in PEERS.values():
            if subprocess.run([*pip, package, *BASE], check=False).returncode:
                print(f"cannot be installed here: {package}", file=sys.stderr)
        (environment / ".installed").touch()
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": paths.rstrip(os.pathsep), "OMP_NUM_THREADS": "1"}
    os.execve(python, [str(python), *sys.argv], variables)


def load(name: str, problems: dict[str, str]) -> ModuleType | None:
    """A peer, or None and the reason in `problems`."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a foreign import raises is the finding
        problems[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        return None


def machine() -> str:
    """Processor, cores, Python and date."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return (
        f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"{time.strftime('%Y-%m-%d')}"
    )


def cpu_s() -> float:
    """CPU seconds of this process and of its children that ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@dataclass
class Row:
    """One line of a table: CPU milliseconds per unit, one number per round."""

    name: str
    rounds: list[float]

    @property
    def ms(self) -> float:
        return median(self.rounds)


def measure(cases: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, Row]:
    """Each case does its work and returns the number of units; rounds are interleaved.

    A case that raises is dropped with its reason: a peer that fails is a finding, not an end.
    """
    rows = {name: Row(name, []) for name in cases}
    failed: dict[str, str] = {}
    for number in range(rounds + 1):  # the first one warms up
        for name, case in cases.items():
            if name in failed:
                continue
            begun = cpu_s()
            try:
                units = case()
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {str(error)[:150]}"
                print(f"{name} failed: {failed[name]}", file=sys.stderr)
                continue
            if number:
                rows[name].rounds.append(1e3 * (cpu_s() - begun) / units)
    return {name: row for name, row in rows.items() if row.rounds}


def table(rows: Mapping[str, Row], unit: str, against: str | None = None) -> str:
    """Markdown; `against` names the row that the ratios refer to."""
    lines = [f"| | CPU ms per {unit} |" + (f" against {against} |" if against else "")]
    lines.append("|---|---|" + ("---|" if against else ""))
    base = rows[against].ms if against and against in rows else None
    for row in rows.values():
        ratio = f" {row.ms / base:.2f} |" if base else (" |" if against else "")
        lines.append(f"| {row.name} | {row.ms:.3g} |{ratio}")
    return "\n".join(lines)


def goal(text: str, value: float | None, most: float) -> str:
    """A line for one goal: met, not met, or not measured."""
    if value is None:
        return f"| {text} | {most:g} | not measured | |"
    return f"| {text} | {most:g} | {value:.3g} | {'met' if value <= most else 'not met'} |"


GOALS_HEAD = "| goal, at most | | measured | |\n|---|---|---|---|"


def ratio(rows: Mapping[str, Row], top: str, bottom: str) -> float | None:
    """ms of one row over another, None if either is missing."""
    return rows[top].ms / rows[bottom].ms if top in rows and bottom in rows else None
