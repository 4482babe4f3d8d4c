"""Download of one file over http(s), or over any scheme that fsspec opens (s3, gs, ...).

In: an address, and the size that the index states. Out: the complete file, or an error. A transfer
that fails or ends early resumes at its last byte. http uses the standard library only; fsspec and
the driver of another scheme are imported on first use. Bounded: one chunk of memory, a timeout for
every response, a number of attempts.
"""

import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

CHUNK: Final = 2**20
ATTEMPTS: Final = 5  # in a row without a single new byte
TIMEOUT_S: Final = 30.0  # for one response
_PAUSE_S: Final = 0.2  # before the second attempt, doubled before each further one

_RETRIED_CODES: Final = (408, 425, 429, 500, 502, 503, 504)


def is_remote(source: str | Path) -> bool:
    """Whether this is an address rather than a folder."""
    return isinstance(source, str) and "://" in source


def download(url: str, target: Path, size: int | None) -> int:
    """Fetch a file to `target`, which is created; returns its size in bytes.

    Args:
        size: its exact size in bytes; None accepts the size that the server states.

    Raises:
        FileNotFoundError: the server has no such file.
        ValueError: the file on the server has another size.
        OSError: the transfer failed ATTEMPTS times in a row; the last reason is in the message.
    """
    failures = most = 0
    with target.open("wb") as file:
        while True:
            begun = file.tell()
            try:
                for chunk in _open(url, begun, size):
                    if size is not None and file.tell() + len(chunk) > size:
                        raise ValueError(
                            f"{url}: must have {size} bytes according to the index, the server "
                            "sends more; copy the shard folder there again"
                        )
                    file.write(chunk)
                if size is None or file.tell() == size:
                    return file.tell()
                cause: object = f"the response ended after {file.tell()} of {size} bytes"
            except _NoRange:
                file.seek(0)
                file.truncate()
                cause = "the server does not support byte ranges"
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, FileNotFoundError):
                    raise
                cause = error
            failures = 1 if file.tell() > most else failures + 1
            most = max(most, file.tell())
            if failures >= ATTEMPTS:
                raise OSError(
                    f"{url}: {ATTEMPTS} attempts in a row failed, the last one because: {cause}; "
                    "check the server and the network, then start again: cached files are kept"
                )
            time.sleep(_PAUSE_S * 2 ** (failures - 1))


class _NoRange(Exception):
    """The server sends the whole file although a byte range was requested."""


def _open(url: str, start: int, size: int | None) -> Iterator[bytes]:
    """The bytes of a file from `start` on, in chunks, as far as one response contains them."""
    if size is not None and start >= size:
        return
    scheme = url.partition("://")[0].lower()
    yield from (_http if scheme in ("http", "https") else _fsspec)(url, start, size)


def _http(url: str, start: int, size: int | None) -> Iterator[bytes]:
    headers = {"Range": f"bytes={start}-"} if start else {}
    request = urllib.request.Request(url, headers={**headers, "Accept-Encoding": "identity"})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            if error.code in _RETRIED_CODES:
                raise OSError(f"the server responds {error.code} {error.reason}") from error
            raise FileNotFoundError(
                f"{url}: the server responds {error.code} {error.reason}; check the address and "
                "the right to read it"
            ) from error
    with closing(response):
        if start and response.status != http.client.PARTIAL_CONTENT:
            raise _NoRange
        stated = response.headers.get("Content-Length")
        received = 0
        while chunk := response.read(CHUNK):
            received += len(chunk)
            yield chunk
        if size is None and stated is not None and received != int(stated):
            raise OSError(f"the response ended after {received} of {stated} bytes")


def _fsspec(url: str, start: int, size: int | None) -> Iterator[bytes]:
    system, path = _file_system(url)
    try:
        with system.open(path, "rb", cache_type="none") as file:
            file.seek(start)
            while chunk := file.read(CHUNK):
                yield chunk
    except (FileNotFoundError, PermissionError) as error:
        raise FileNotFoundError(
            f"{url}: {error}; check the address and the right to read it"
        ) from error
    except OSError:
        raise
    except Exception as error:
        # Drivers define their own errors for a failing network or missing credentials.
        raise OSError(f"{type(error).__name__}: {error}") from error


_systems: dict[tuple[int, str], Any] = {}


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of this process; asynchronous ones do not survive a fork."""
    # Imported here because local shards do not use fsspec and its drivers.
    import fsspec
    from fsspec.core import split_protocol

    protocol = str(split_protocol(url)[0])
    key = os.getpid(), protocol
    try:
        if key not in _systems:
            _systems.clear()
            _systems[key] = fsspec.filesystem(protocol, skip_instance_cache=True)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{url}: no driver opens {protocol}:// ({error}); install fsspec's driver for it, "
            "for s3: pip install -e .[s3]"
        ) from error
    return _systems[key], str(_systems[key]._strip_protocol(url))
