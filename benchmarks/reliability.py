"""What reliability costs: checkpoints, restarts, and goodput by time between failures.

    python benchmarks/reliability.py [--json] [--steps 300] [--between 30 60] [--processes 2]

Trains nano with `emoverse train` on a small synthetic corpus that it builds. Figures: seconds and
size of a checkpoint and its share of the time at the default interval; seconds from the start of a
resumed launch to its first step; goodput = saved steps x seconds per step / all seconds, with
SIGKILL of the whole job at random moments. Every goodput is compared with the same run without
kills, measured in the same call.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from data_shards.files import read_complete_lines

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_INTERVAL = 500  # steps, train.save_every
CLIPS, TRAINED = 96, 80  # the second stage is not trained, but its pool needs records


def emoverse(*arguments: str) -> list[str]:
    """The command line of a verb."""
    return [sys.executable, "-m", "launch.cli", *arguments]


def overrides(args: argparse.Namespace, run: Path, save_every: int) -> list[str]:
    """Arguments that train the first stage of nano on the small corpus."""
    epochs = -(-args.steps * 16 // TRAINED)
    return [
        str(ROOT / "configs" / "nano.yaml"),
        f"run.run_dir={run}",
        f"data.shards={args.work / 'shards'}",
        f"evaluation.shards={args.work / 'shards'}",
        f"stages.stage1.pool.take={TRAINED}",
        f"stages.stage1.epochs={epochs}",
        f"train.processes={args.processes}",
        f"train.save_every={save_every}",
        "train.log_every=5",
        "train.tensorboard=false",
        "stages.stage2.epochs=1",
    ]


@contextlib.contextmanager
def training(args: argparse.Namespace, run: Path, save_every: int) -> Iterator[subprocess.Popen]:
    """`emoverse train` in its own session; killed at the end of the block."""
    command = emoverse("train", *overrides(args, run, save_every), "--stage", "stage1")
    with (args.work / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Records of one kind in the metrics of the stage, without an incomplete last line."""
    lines = read_complete_lines(run / "stage1" / "metrics.jsonl")
    return [record for record in lines if record["kind"] == kind]


def train_to_end(args: argparse.Namespace, run: Path, save_every: int) -> float:
    """Seconds of a whole run, from launch to exit."""
    begin = time.monotonic()
    with training(args, run, save_every) as process:
        code = process.wait(args.limit)
    if code != 0:
        log = (args.work / "log.txt").read_text(errors="replace")[-2000:]
        raise SystemExit(f"{log}\nemoverse train ended with {code}")
    return time.monotonic() - begin


def checkpoint_cost(args: argparse.Namespace) -> dict[str, float]:
    """A run that saves often, for many measurements of a save, and of a step without one."""
    run = args.work / "often"
    seconds = train_to_end(args, run, 10)
    saves = [record["seconds"] for record in records(run, "save")]
    sizes = [record["bytes"] for record in records(run, "save")]
    pure = [
        16 / record["samples_per_s"] * (1 - record["checkpoint_wait"])
        for record in records(run, "interval")[2:]
    ]
    trainable = records(run, "start")[0]["trainable"]
    save_s, step_s = median(saves), median(pure)
    return {
        "run_s": seconds,
        "saves": len(saves),
        "save_s": save_s,
        "step_s": step_s,
        "bytes": median(sizes),
        "bytes_per_trainable_state": median(sizes) / (12 * trainable),
        "overhead_at_default": save_s / (DEFAULT_INTERVAL * step_s + save_s),
    }


def restart(args: argparse.Namespace) -> float:
    """Seconds from a launch that resumes to its first finished step."""
    run = args.work / "restart"
    seconds = []
    for _ in range(3):
        before = len(records(run, "start"))
        begin = time.monotonic()
        with training(args, run, 5):
            while len(records(run, "start")) <= before:
                time.sleep(0.02)
            first = records(run, "start")[-1]["step"]
            while not any(record["step"] > first for record in records(run, "step")):
                time.sleep(0.02)
            seconds.append(time.monotonic() - begin)
            while not any(record["step"] >= first + 5 for record in records(run, "save")):
                time.sleep(0.05)
    return median(seconds[1:])  # the first launch did not resume


def goodput(args: argparse.Namespace, between_s: float, step_s: float) -> dict[str, float]:
    """A run whose processes all die at random, on average every `between_s` seconds."""
    rng, run = random.Random(5), args.work / f"kills-{between_s:g}"
    begin, kills = time.monotonic(), 0
    while not (run / "stage1" / "DONE").exists():
        with training(args, run, 10) as process:
            try:
                process.wait(max(1.0, rng.expovariate(1 / between_s)))
            except subprocess.TimeoutExpired:
                kills += 1
        if time.monotonic() - begin > args.limit:
            break
    seconds = time.monotonic() - begin
    steps = max((record["step"] for record in records(run, "save")), default=0)
    return {
        "between_s": between_s,
        "kills": kills,
        "steps": steps,
        "seconds": seconds,
        "goodput": steps * step_s / seconds,
    }


def log_figure(name: str, figure: Any) -> None:
    """Log a figure as soon as it is measured: an interrupted call loses the later ones only."""
    print(f"{time.strftime('%H:%M:%S')} {name}: {json.dumps(figure)}", file=sys.stderr, flush=True)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures as JSON values."""
    build = ("build", "synthetic", "--out", str(args.work / "shards"), "--clips", str(CLIPS))
    subprocess.run(
        emoverse(*build, "--identities", "12", "--seed", "1"),
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    load = [os.getloadavg()[0]]
    cost = checkpoint_cost(args)
    log_figure("checkpoint", cost)
    steps = records(args.work / "often", "save")[-1]["step"]
    restart_s = restart(args)
    log_figure("restart_s", restart_s)
    rows = []
    for between_s in args.between:
        load.append(os.getloadavg()[0])
        rows.append(goodput(args, between_s, cost["step_s"]))
        log_figure("goodput", rows[-1])
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
        # Before anything runs, then by the time the kills begin: more than the processes means
        # that others computed here too.
        "load": [*load, os.getloadavg()[0]],
        "processes": args.processes,
        "steps": steps,
        "checkpoint": cost,
        "restart_s": restart_s,
        "goodput_without_kills": steps * cost["step_s"] / cost["run_s"],
        "goodput": rows,
    }


def text(result: dict[str, Any]) -> str:
    """The figures for people."""
    cost = result["checkpoint"]
    lines = [
        f"{result['machine']}; nano, {result['processes']} processes, {result['steps']} steps",
        f"load         {', '.join(f'{load:.1f}' for load in result['load'])} (of the machine, at "
        "the beginning, before each row of kills, at the end)",
        f"checkpoint   {cost['save_s']:.3f} s median of {cost['saves']}, {cost['bytes']:,.0f} "
        f"bytes = {cost['bytes_per_trainable_state']:.2f} of the trainable state",
        f"overhead     {cost['overhead_at_default']:.2%} at save_every {DEFAULT_INTERVAL}, with "
        f"{cost['step_s']:.3f} s a step",
        f"restart      {result['restart_s']:.1f} s from launch to the first step",
        f"goodput      {result['goodput_without_kills']:.2f} without kills (start-up included)",
    ]
    base = result["goodput_without_kills"]
    for row in result["goodput"]:
        lines.append(
            f"             {row['goodput']:.2f} = {row['goodput'] / base:.2f} of that with a kill "
            f"every {row['between_s']:g} s on average ({row['kills']} kills in "
            f"{row['seconds']:.0f} s)"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--steps", type=int, default=300, help="length of a run")
    parser.add_argument("--between", type=float, nargs="*", default=[30.0, 60.0], metavar="SECONDS")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", type=float, default=900.0, help="most seconds of one run")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the training that runs as well
    with tempfile.TemporaryDirectory() as folder:
        args.work = Path(folder)
        result = measure(args)
    print(json.dumps(result, indent=1) if args.json else text(result))


if __name__ == "__main__":
    main()
