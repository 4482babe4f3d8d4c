"""Where a run comes from: code, versions, host, base model; enough to repeat it or to see why not.

In: this process and the base folder. Out: RUN/provenance.json (one entry per launch), the changes
since the commit beside it, and the fingerprint of a base, which every checkpoint carries.
"""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from emoverse.run_dir import storage

PACKAGES = (
    *("emoverse", "torch", "deepspeed", "transformers", "peft"),
    *("numpy", "safetensors", "av", "sentencepiece"),
)
WHOLE_BYTES = 64 * 2**20  # files up to this size are hashed whole, longer ones by both ends


def describe_launch(**facts: Any) -> dict[str, Any]:
    """One launch as JSON values; `facts` are added as given."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "git": git_state(Path(__file__).parent),
        "versions": package_versions(),
        **facts,
    }


def package_versions() -> dict[str, str]:
    """Installed versions of what computes the numbers; missing ones are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, and whether files differ from it; None outside a git checkout or without git."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed_files": len(changes.splitlines())}


def uncommitted_changes(folder: Path) -> str:
    """The changes of tracked files since the commit, as git apply takes them; empty for none.

    Bytes that are no UTF-8 are replaced. Empty outside a git checkout or without git as well.
    """
    try:
        return _git(folder, "diff", "--no-color", "--no-ext-diff", "HEAD", "--", ":/")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, check=True, timeout=10)
    # Whatever encoding a changed file has. Blanks stay: a patch may end with an empty line.
    return done.stdout.decode(errors="replace").rstrip("\n")


def append_launch(run_dir: Path, launch: dict[str, Any], *, work: Path) -> None:
    """Adds a launch to RUN/provenance.json, a JSON list; made in `work` and renamed.

    Code that differs from its commit is kept as RUN/code-HASH.diff, and named in the entry.
    """
    changes = uncommitted_changes(Path(__file__).parent)
    if changes:
        name = f"code-{hashlib.sha256(changes.encode()).hexdigest()[:12]}.diff"
        storage.publish_text(run_dir / name, changes + "\n", work=work)
        launch = {**launch, "changes": name}
    path = run_dir / "provenance.json"
    launches = json.loads(path.read_text()) if path.exists() else []
    text = json.dumps([*launches, launch], indent=1)
    storage.publish_text(path, text + "\n", work=work)


def base_fingerprint(folder: Path) -> str:
    """sha256 over config, tokenizer and weights of a base model folder.

    Weight files above 64 MiB enter with their size and both ends: a released 8B model in
    milliseconds, and its header with every tensor's name and place is at the front.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in {".json", ".model", ".safetensors"} or path.name == "provenance.json":
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as stream:
            if size <= WHOLE_BYTES:
                digest.update(stream.read())
            else:
                digest.update(stream.read(WHOLE_BYTES // 2))
                stream.seek(size - WHOLE_BYTES // 2)
                digest.update(stream.read())
    return digest.hexdigest()
