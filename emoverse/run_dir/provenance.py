"""Provenance of a run: code, versions, host and base model, so that it can be repeated.

In: this process and the base folder. Out: RUN/provenance.json (one entry per launch), uncommitted
changes as a diff, and the fingerprint of a base, which is part of every checkpoint.
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
WHOLE_BYTES = 64 * 2**20  # smaller files are hashed completely, larger ones at both ends


def describe_launch(**facts: Any) -> dict[str, Any]:
    """One launch as JSON values, with `facts` added."""
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
    """Installed versions of the packages that decide the numbers; missing ones are left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and number of changed files; None outside a git checkout or without git."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed_files": len(changes.splitlines())}


def uncommitted_changes(folder: Path) -> str:
    """Changes of tracked files since the commit, as input of `git apply`.

    Invalid UTF-8 is replaced. Empty without changes, outside a git checkout, or without git.
    """
    try:
        return _git(folder, "diff", "--no-color", "--no-ext-diff", "HEAD", "--", ":/")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, check=True, timeout=10)
    # Changed files may have any encoding. Blanks stay: a patch may end with an empty line.
    return result.stdout.decode(errors="replace").rstrip("\n")


def append_launch(run_dir: Path, launch: dict[str, Any], *, work: Path) -> None:
    """Add a launch to RUN/provenance.json, a JSON list; published from `work`.

    Uncommitted changes are saved as RUN/code-HASH.diff, and named in the entry.
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

    Of weight files above 64 MiB only the size and both ends are hashed. This takes milliseconds
    for a released 8B model, and includes the header with name and offset of every tensor.
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
