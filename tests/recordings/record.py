"""Record what a refactoring must not change, and compare two recordings.

    python tests/recordings/record.py CHECKOUT OUT.json      # 5 to 10 minutes on two cores
    python tests/recordings/record.py --compare OLD.json NEW.json

A recording is made through the command line only, so that it works for any layout of the packages:
loss trace and trained weights of a short two-stage run (1 and 2 ranks, ZeRO 0, 2 and 3), the order
and fingerprint of the plan, the bytes of a build, scores and answers, the job scripts' commands and
exit codes. Losses and weights are compared bit for bit: make both recordings on one machine.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RUNS = [(1, 0), (1, 2), (1, 3), (2, 0), (2, 2), (2, 3)]  # processes, ZeRO stage
VERBS = ["build", "annotate", "convert", "lint", "preview", "stats", "pretrain", "plan", "train"]
VERBS += ["launch", "status", "evaluate", "ablate", "export", "report"]
SHORT = [
    "stages.stage1.pool={take: 40}",
    "stages.stage2.pool={take: 40}",
    "train.offload=off",
    "train.save_every=3",
    "run.seed=5",
]
# Facts of the machine, the moment and the wording, not of the result.
VARIABLE_KEYS = {"provenance", "seconds", "versions", "host", "time", "created", "code", "notes"}


class Checkout:
    """A source tree whose commands are run by this interpreter."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def run(self, *words: str, module: str = "launch.cli") -> subprocess.CompletedProcess[str]:
        """`python -m MODULE WORDS...` in the tree; nothing is checked."""
        environ = {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-m", module, *words],
            cwd=self.root,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )

    def must(self, *words: str) -> str:
        """Standard output of a command that has to succeed."""
        done = self.run(*words)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}\n{done.stderr}")
        return done.stdout


def record(root: Path) -> dict[str, Any]:
    """The recording of one checkout."""
    tree = Checkout(root)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        shards = work / "shards"
        clips = ["--clips", "120", "--identities", "12", "--seed", "1"]
        tree.must("build", "synthetic", "--out", str(shards), *clips)
        result: dict[str, Any] = {
            "build": {path.name: sha256(path) for path in sorted(shards.glob("shard-*"))},
            "exit_codes": exit_codes(tree),
            "job_scripts": job_scripts(tree),
            "plan": plan(tree, shards, work / "order.jsonl"),
        }
        for processes, zero in RUNS:
            label = f"{processes}_ranks_zero_{zero}"
            print(f"{label} ...", file=sys.stderr, flush=True)
            result[label] = train(tree, shards, work / label, processes, zero)
    return result


def plan(tree: Checkout, shards: Path, order: Path) -> dict[str, Any]:
    """Fingerprint and complete order of the nano config's plan over the recorded shards."""
    words = ["plan", "configs/nano.yaml", f"data.shards={shards}", "stages.stage1.pool={take: 60}"]
    report = json.loads(tree.must(*words, "--json", "--order", str(order)))
    return {"fingerprints": fingerprints(report), "order": sha256(order)}


def train(tree: Checkout, shards: Path, run: Path, processes: int, zero: int) -> dict[str, Any]:
    """Both stages of debug_cpu.yaml, shortened; with one rank and ZeRO-2 also the evaluation."""
    config = ["configs/debug_cpu.yaml", f"data.shards={shards}", f"run.run_dir={run}", *SHORT]
    config += [f"evaluation.shards={shards}", "evaluation.max_records=16"]
    tree.must("train", *config, f"train.processes={processes}", f"train.zero_stage={zero}")
    found: dict[str, Any] = {}
    for stage in ("stage1", "stage2"):
        lines = (run / stage / "metrics.jsonl").read_text().splitlines()
        steps = [row for row in map(json.loads, lines) if "loss" in row]
        found[stage] = {
            "losses": [[row.get("step"), row["loss"]] for row in steps],
            "weights": {
                str(path.relative_to(run)): sha256(path)
                for path in sorted((run / stage / "checkpoints").rglob("*.safetensors"))
            },
        }
    found["plan"] = fingerprints(json.loads((run / "plan" / "plan.json").read_text()))
    if (processes, zero) == (1, 2):
        tree.must("evaluate", str(run), "--json")
        for path in sorted((run / "eval").rglob("metrics.json")):
            found[str(path.relative_to(run))] = stable(json.loads(path.read_text()))
        for path in sorted((run / "eval").rglob("predictions.jsonl")):
            rows = [stable(json.loads(line)) for line in path.read_text().splitlines()]
            found[str(path.relative_to(run))] = rows
    return found


def exit_codes(tree: Checkout) -> dict[str, int]:
    """Of every verb's help, and of some mistakes."""
    calls = {f"{verb} --help": [verb, "--help"] for verb in VERBS}
    calls["no verb"] = []
    calls["unknown verb"] = ["fly"]
    calls["missing config"] = ["plan", "missing.yaml"]
    calls["unknown key"] = ["plan", "configs/nano.yaml", "train.zero_stag=2"]
    calls["missing run"] = ["status", "no/such/run"]
    calls["missing shards"] = ["lint", "no/such/folder"]
    calls["unknown option"] = ["train", "configs/nano.yaml", "--fast"]
    return {name: tree.run(*words).returncode for name, words in calls.items()}


def job_scripts(tree: Checkout) -> dict[str, list[str]]:
    """Commands of slurm/*.sh without comments; what SLURM reads (#SBATCH) stays."""
    scripts = {}
    for path in sorted((tree.root / "slurm").glob("*.sh")):
        lines = path.read_text().splitlines()
        kept = [line for line in lines if not re.match(r"\s*#(?!SBATCH)|\s*$", line)]
        scripts[path.name] = kept
    return scripts


def fingerprints(value: Any, path: str = "") -> dict[str, str]:
    """Every value of a JSON tree whose key speaks of a fingerprint, by its path."""
    found: dict[str, str] = {}
    if isinstance(value, dict):
        for key, inner in value.items():
            if "fingerprint" in key and isinstance(inner, str):
                found[f"{path}{key}"] = inner
            found.update(fingerprints(inner, f"{path}{key}."))
    return found


def stable(value: Any) -> Any:
    """A JSON tree without what differs between two equal runs."""
    if isinstance(value, dict):
        return {key: stable(inner) for key, inner in value.items() if key not in VARIABLE_KEYS}
    if isinstance(value, list):
        return [stable(inner) for inner in value]
    return value


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """One line per leaf that differs between two recordings."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted({*old, *new}):
            where = f"{path}/{key}"
            if key not in old or key not in new:
                lines.append(f"{where}: only in the {'new' if key in new else 'old'} recording")
            else:
                lines += differences(old[key], new[key], where)
        return lines
    return [] if old == new else [f"{path}: {str(old)[:200]} -> {str(new)[:200]}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--compare", action="store_true", help="compare two recordings")
    parser.add_argument("first", type=Path, metavar="CHECKOUT|OLD.json")
    parser.add_argument("second", type=Path, metavar="OUT.json|NEW.json")
    args = parser.parse_args()
    if not args.compare:
        args.second.write_text(json.dumps(record(args.first), indent=1, sort_keys=True) + "\n")
        return 0
    lines = differences(json.loads(args.first.read_text()), json.loads(args.second.read_text()))
    print("\n".join(lines) or "equal")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
