"""Small files that are written whole or not at all, and JSON lines that survive a crash.

Every file that another process may read, or that a kill may interrupt, is written through here.
"""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file: readers see the old or the whole new content, also after a power failure.

    The parent folder is created. The temporary file lies beside `path` under a name that no other
    process uses at the same time, on any host that shares the file system.

    Raises:
        OSError: the disk is full or not writable; the old file is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.uname().nodename}-{os.getpid()}")
    data = content.encode() if isinstance(content, str) else content
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Force a file, or the names in a folder, onto the disk.

    Raises:
        OSError: the disk failed. File systems that cannot sync folders are accepted.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and user-space file systems have no such call for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def read_complete_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file that a crash may have cut off; damaged lines are left out.

    For logs and journals of our own, which are appended to and never repaired. Input of users is
    read by `jsonl.read_rows`, which refuses damage.
    """
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value
