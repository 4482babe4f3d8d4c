"""Is it safe to give these bytes to an mp4 parser? Looks at what the headers claim, parses nothing.

A few bytes of an mp4 can claim billions of frames: a table with one common size, a run length, a
fragment without a size per frame, an edit list that repeats all frames. Parsers make room for what
is claimed before they read it. In: the file's bytes. Out: nothing, or ValueError.
Layout of the boxes: ISO/IEC 14496-12. Flow: reader (bytes) -> here -> video.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np

MAX_CLAIMS: Final = 2**22
"""Most frames and audio packets of a file; about 40 bytes each in the parser's memory."""

_MEDIA: Final = (b"mdat", b"free", b"skip", b"wide")
# Tag -> bytes from the end of the tag to a 32-bit count.
_COUNTS: Final = {b"stsz": 8, b"stz2": 8, b"trun": 4}
_RUNS: Final = (b"stts", b"ctts")  # a count of entries, then (run length, value) each


def require_modest_claims(mp4: bytes) -> None:
    """Raises ValueError if the headers claim more than MAX_CLAIMS, or are compressed.

    Tags are searched as bytes in everything but the media data, so that no disagreement about the
    nesting of boxes hides one.
    """
    claims = dict.fromkeys((*_COUNTS, *_RUNS), 0)
    edits = 0
    for start, end in _headers(mp4):
        header = mp4[start:end]
        if b"cmov" in header:
            raise ValueError("the headers of the video are compressed, which is not read")
        for tag, distance in _COUNTS.items():
            claims[tag] += sum(_number(header, at + distance) for at in _find(header, tag))
        for tag in _RUNS:
            claims[tag] += sum(_run_lengths(header, at) for at in _find(header, tag))
        edits += sum(_number(header, at + 4) for at in _find(header, b"elst"))
    claimed = max(claims.values()) * max(edits, 1)  # every edit may list all frames again
    if claimed > MAX_CLAIMS:
        raise ValueError(
            f"the headers of the video claim {claimed} frames, of which a file has at most "
            f"{MAX_CLAIMS}"
        )


def _headers(mp4: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of the boxes of the outermost level, except media data; the rest if torn."""
    at = 0
    while at + 8 <= len(mp4):
        size = _number(mp4, at)
        if size == 1 and at + 16 <= len(mp4):
            size = int.from_bytes(mp4[at + 8 : at + 16], "big")
        elif size == 0:  # up to the end of the file
            size = len(mp4) - at
        if size < 8:
            yield at, len(mp4)
            return
        if mp4[at + 4 : at + 8] not in _MEDIA:
            yield at, min(at + size, len(mp4))
        at += size


def _find(header: bytes, tag: bytes) -> Iterator[int]:
    """Where the content of each box with this tag begins."""
    at = header.find(tag)
    while at >= 0:
        yield at + len(tag)
        at = header.find(tag, at + 1)


def _number(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")


def _run_lengths(header: bytes, at: int) -> int:
    """Sum of the run lengths of a table, as far as its bytes are there."""
    entries = min(_number(header, at + 4), (len(header) - at - 8) // 8)
    if entries <= 0:
        return 0
    table = np.frombuffer(header, dtype=">u4", count=2 * entries, offset=at + 8)
    return int(table[::2].sum(dtype=np.uint64))
