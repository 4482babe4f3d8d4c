"""`make demo`: the whole method on synthetic clips, from an empty folder to a report, on two cores.

Builds the corpus, trains both stages with two processes and, beside them, the text-only twin (the
same plan with blanked frames), evaluates base, stage 1 and stage 2, and writes report.html and
summary.json. Every step is a command of the `emoverse` front door, printed as it is run.
"""

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from launch.cli import DONE, FAULT
from launch.subcommands import StepError, run_step


class MemoryWatch(threading.Thread):
    """Samples the memory of this process and all its descendants, once a second if not told else.

    `peak_bytes` is the largest sum of proportional set sizes (shared pages counted once), or None
    where there is no /proc to read it from.
    """

    def __init__(self, *, every_s: float = 1.0) -> None:
        super().__init__(daemon=True)
        self._every_s = every_s
        self._done = threading.Event()
        self.peak_bytes: int | None = None

    def run(self) -> None:
        while not self._done.wait(self._every_s):
            used = sum(pss_bytes(pid) for pid in descendants(os.getpid()))
            if used:
                self.peak_bytes = max(self.peak_bytes or 0, used)

    def stop(self) -> int | None:
        """Ends the sampling and returns the peak."""
        self._done.set()
        self.join()
        return self.peak_bytes


def descendants(root: int) -> set[int]:
    """`root` and all processes below it; empty where /proc does not exist."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The command name may hold spaces and brackets: fields are counted behind its end.
            stat = (folder / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:  # ended between the listing and the reading
            continue
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    found = {root} & set(parents)
    while True:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        if not more:
            return found
        found |= more


def pss_bytes(pid: int) -> int:
    """Memory of one process, shared pages divided among their users; 0 if it cannot be read."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def _side_by_side(steps: Sequence[tuple[Sequence[str], Path | None]]) -> None:
    """Run steps, two of them at a time; the first error is raised when all have ended."""
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run_step, arguments, quiet_log=log) for arguments, log in steps]
    for future in futures:
        future.result()


def demo(args: argparse.Namespace) -> None:
    """Run all steps; see the head of this file."""
    began = time.monotonic()
    watch = MemoryWatch()
    watch.start()
    run, twin = args.out, args.out / "text_only"
    _begin(args)
    spent: dict[str, float] = {}
    with _timed(spent, "build"):
        _build(args)
    with _timed(spent, "train"):
        _train(args, run, twin)
    with _timed(spent, "evaluate"):
        _evaluate(run, twin)
    seconds, peak = time.monotonic() - began, watch.stop()
    # Heavy, and only now needed.
    from emoverse.report.report import write_report
    from emoverse.report.summary import summary_text

    page = write_report(run, text_only_run=twin, seconds=seconds, peak_memory_bytes=peak)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    print(summary_text(summary), flush=True)
    parts = ", ".join(f"{name} {used / 60:.1f}" for name, used in spent.items())
    memory = "" if peak is None else f", peak memory {peak / 2**30:.1f} GiB"
    print(f"demo: {seconds / 60:.1f} min ({parts}){memory}; open {page}", flush=True)


@contextmanager
def _timed(spent: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    spent[name] = time.monotonic() - began


def _begin(args: argparse.Namespace) -> None:
    """An empty folder with a mark, by which the next demo knows that it may be removed."""
    run: Path = args.out
    mark = run / "demo.json"
    if run.exists():
        if not mark.is_file():
            raise StepError(
                f"{run} exists and is not a demo's folder; remove it or name another with --out"
            )
        shutil.rmtree(run)  # a demo always starts anew, so that its figures are one run's
    run.mkdir(parents=True)
    mark.write_text(json.dumps(vars(args), default=str) + "\n", encoding="utf-8")


def _build(args: argparse.Namespace) -> None:
    for split, clips, identities in (
        ("train", args.clips, max(2, args.clips // 10)),
        ("test", args.test_clips, max(2, args.test_clips // 5)),
    ):
        options = {
            "out": args.out / "shards" / split,
            "split": split,
            "clips": clips,
            "identities": identities,
            "seed": args.seed,
            "workers": args.workers,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        run_step(["build", "synthetic", *words])


def _train(args: argparse.Namespace, run: Path, twin: Path) -> None:
    """Both stages with frames and, at the same time, the text-only twin."""
    shards = args.out / "shards"
    config = [
        str(args.config),
        f"data.shards={shards / 'train'}",
        f"evaluation.shards={shards / 'test'}",
        *args.overrides,
    ]
    with_frames = [*config, f"run.run_dir={run}"]
    without_frames = [
        *config,
        f"run.run_dir={twin}",
        "run.name=text-only",
        "model.blank_frames=true",
        "train.processes=1",
    ]
    run_step(["plan", *with_frames])
    _side_by_side(
        [
            (["train", *with_frames], None),
            (["train", *without_frames], twin / "train.log"),
        ]
    )


def _evaluate(run: Path, twin: Path) -> None:
    """Long evaluations first, so that both cores stay busy to the end."""
    states = [(run, "stage2"), (run, "stage1"), (twin, "stage2"), (twin, "stage1"), (run, "base")]
    _side_by_side(
        [
            (["evaluate", str(where), "--which", which], where / "eval" / f"{which}.log")
            for where, which in states
        ]
    )


def build_parser() -> argparse.ArgumentParser:
    """The arguments of the demo; the defaults are what `make demo` runs."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.verbs.demo", description="The whole method on synthetic clips."
    )
    for name, kind, default, text in (
        ("--config", Path, Path("configs/nano.yaml"), "experiment"),
        ("--out", Path, Path("runs/demo"), "run directory"),
        ("--clips", int, 4500, "training clips"),
        ("--test-clips", int, 800, "held-out clips"),
        ("--seed", int, 1, "seed of the corpus"),
        ("--workers", int, 2, "processes that make clips"),
    ):
        parser.add_argument(name, type=kind, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the config")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and run the demo; exit code 0 or 1."""
    args = build_parser().parse_args(argv)
    try:
        demo(args)
    except StepError as error:
        print(f"demo: {error}", file=sys.stderr)
        return FAULT
    return DONE


if __name__ == "__main__":
    sys.exit(main())
