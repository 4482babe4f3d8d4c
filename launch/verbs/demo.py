"""The verb `demo`: the whole method on synthetic clips, from an empty folder to a report.

Builds the corpus, trains both stages with two processes and, at the same time, the text-only
baseline (the same plan with blanked frames), evaluates base, stage 1 and stage 2, and writes
report.html and summary.json. Every step is an `emoverse` command, printed when it starts.
"""

import argparse
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from launch.exit_codes import DONE
from launch.subcommands import SubcommandError, run_subcommand

# What decides a demo's figures; noted in its folder.
_SETTINGS = ("config", "out", "clips", "test_clips", "seed", "workers", "overrides")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The corpus, the config and the folder."""
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


def run(args: argparse.Namespace) -> int:
    """Run all steps and print the summary. Raises SubcommandError when one fails."""
    began = time.monotonic()
    watch = MemoryWatch()
    watch.start()
    run_dir, text_only = args.out, args.out / "text_only"
    _prepare_folder(args)
    spent: dict[str, float] = {}
    with _timed(spent, "build"):
        _build(args)
    with _timed(spent, "train"):
        _train(args, run_dir, text_only)
    with _timed(spent, "evaluate"):
        _evaluate(run_dir, text_only)
    seconds, peak = time.monotonic() - began, watch.stop()
    # Slow to import, and only now needed.
    from emoverse.report.report import write_report
    from emoverse.report.summary import summary_text

    page = write_report(run_dir, text_only_run=text_only, seconds=seconds, peak_memory_bytes=peak)
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    print(summary_text(summary), flush=True)
    steps = ", ".join(f"{name} {used / 60:.1f}" for name, used in spent.items())
    memory = "" if peak is None else f", peak memory {peak / 2**30:.1f} GiB"
    print(f"demo: {seconds / 60:.1f} min ({steps}){memory}; open {page}", flush=True)
    return DONE


class MemoryWatch(threading.Thread):
    """Samples the memory of this process and all its descendants every `every_s` seconds.

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
            # The command name may hold spaces and brackets: fields are counted after its end.
            stat = (folder / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:  # ended between the listing and the reading
            continue
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    tree = {root} & set(parents)
    while children := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= children
    return tree


def pss_bytes(pid: int) -> int:
    """Memory of one process, shared pages divided among their users; 0 if it cannot be read."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def _side_by_side(steps: Sequence[tuple[Sequence[str], Path | None]]) -> None:
    """Run commands, two at a time; the first error is raised when all have ended."""
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run_subcommand, words, log_file=log) for words, log in steps]
    for future in futures:
        future.result()


@contextmanager
def _timed(spent: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    spent[name] = time.monotonic() - began


def _prepare_folder(args: argparse.Namespace) -> None:
    """An empty folder with a marker file, which allows the next demo to remove the folder."""
    run_dir: Path = args.out
    marker = run_dir / "demo.json"
    if run_dir.exists():
        if not marker.is_file():
            raise SubcommandError(
                f"{run_dir} exists and is not a demo's folder; remove it or name another with --out"
            )
        shutil.rmtree(run_dir)  # a demo starts from scratch, so that its figures are one run's
    run_dir.mkdir(parents=True)
    settings = {name: getattr(args, name) for name in _SETTINGS}
    marker.write_text(json.dumps(settings, default=str) + "\n", encoding="utf-8")


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
        run_subcommand(["build", "synthetic", *words])


def _train(args: argparse.Namespace, run_dir: Path, text_only: Path) -> None:
    """Both stages with frames and, at the same time, the text-only baseline."""
    shards = args.out / "shards"
    config = [
        str(args.config),
        f"data.shards={shards / 'train'}",
        f"evaluation.shards={shards / 'test'}",
        *args.overrides,
    ]
    with_frames = [*config, f"run.run_dir={run_dir}"]
    without_frames = [
        *config,
        f"run.run_dir={text_only}",
        "run.name=text-only",
        "model.blank_frames=true",
        "train.processes=1",
    ]
    run_subcommand(["plan", *with_frames])
    _side_by_side(
        [
            (["train", *with_frames], None),
            (["train", *without_frames], text_only / "train.log"),
        ]
    )


def _evaluate(run_dir: Path, text_only: Path) -> None:
    """Long evaluations first, so that both cores stay busy to the end."""
    states = [
        (run_dir, "stage2"),
        (run_dir, "stage1"),
        (text_only, "stage2"),
        (text_only, "stage1"),
        (run_dir, "base"),
    ]
    _side_by_side(
        [
            (["evaluate", str(folder), "--which", state], folder / "eval" / f"{state}.log")
            for folder, state in states
        ]
    )
