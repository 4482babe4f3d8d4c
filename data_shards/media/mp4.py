"""The boxes of an mp4, read from its bytes: its stated duration, and how much its headers claim.

A few bytes of an mp4 can claim billions of frames: a table with one common size, a run length, a
fragment without a size per frame, an edit list that repeats all frames. Parsers allocate memory for
what is claimed before they read it, so claims are checked before a parser sees the file.
In: the bytes of the file. Nothing is decoded. Layout of the boxes: ISO/IEC 14496-12.
Flow: reader (bytes) -> here -> video.
"""

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

MAX_CLAIMS: Final = 2**22
"""Most frames and audio packets of a file; about 40 bytes each in the parser's memory."""

_MEDIA_BOXES: Final = (b"mdat", b"free", b"skip", b"wide")
# Tag -> bytes from the end of the tag to a 32-bit count.
_COUNT_OFFSETS: Final = {b"stsz": 8, b"stz2": 8, b"trun": 4}
_RUN_TABLES: Final = (b"stts", b"ctts")  # a count of entries, then (run length, value) each


class _Box(NamedTuple):
    """A box of the outermost level, as byte offsets into the file."""

    tag: bytes  # empty: the size is impossible, the box reaches to the end of the file
    start: int
    content: int
    end: int  # may lie behind the end of a file that is cut short


def mp4_seconds(mp4: bytes) -> float | None:
    """Duration in seconds that the movie header states (box moov/mvhd); None without one."""
    movie = _content(mp4, b"moov")
    header = None if movie is None else _content(movie, b"mvhd")
    if header is None or len(header) < 32:
        return None
    # version 1 has 64-bit times; both versions hold creation, modification, time scale, duration
    layout, start = (">IQ", 20) if header[0] == 1 else (">II", 12)
    scale, duration = struct.unpack_from(layout, header, start)
    return float(duration / scale) if scale else None


def require_modest_claims(mp4: bytes) -> None:
    """Refuse a file whose headers would make a parser allocate too much memory.

    Tags are searched as bytes in everything but the media data, so that no disagreement about the
    nesting of boxes hides one.

    Raises:
        ValueError: the headers claim more than MAX_CLAIMS frames, or are compressed.
    """
    claims = dict.fromkeys((*_COUNT_OFFSETS, *_RUN_TABLES), 0)
    edits = 0
    for box in _boxes(mp4):
        if box.tag in _MEDIA_BOXES:
            continue
        header = mp4[box.start : box.end]
        if b"cmov" in header:
            raise ValueError("the headers of the video are compressed, which is not supported")
        for tag, distance in _COUNT_OFFSETS.items():
            claims[tag] += sum(_uint32(header, at + distance) for at in _find(header, tag))
        for tag in _RUN_TABLES:
            claims[tag] += sum(_run_lengths(header, at) for at in _find(header, tag))
        edits += sum(_uint32(header, at + 4) for at in _find(header, b"elst"))
    claimed = max(claims.values()) * max(edits, 1)  # every edit may list all frames again
    if claimed > MAX_CLAIMS:
        raise ValueError(
            f"the headers of the video claim {claimed} frames; at most {MAX_CLAIMS} are accepted"
        )


def _boxes(data: bytes) -> Iterator[_Box]:
    """The boxes of one level, in order; one with an impossible size is the last."""
    start = 0
    while start + 8 <= len(data):
        size, tag = struct.unpack_from(">I4s", data, start)
        content = start + 8
        if size == 1 and start + 16 <= len(data):  # a 64-bit size follows the tag
            (size,) = struct.unpack_from(">Q", data, content)
            content += 8
        elif size == 0:  # up to the end of the file
            size = len(data) - start
        if size < 8:
            yield _Box(b"", start, content, len(data))
            return
        yield _Box(tag, start, content, start + size)
        start += size


def _content(data: bytes, tag: bytes) -> bytes | None:
    """The content of the first box with this tag, one level deep."""
    return next((data[box.content : box.end] for box in _boxes(data) if box.tag == tag), None)


def _find(header: bytes, tag: bytes) -> Iterator[int]:
    """Offsets at which the content of each box with this tag begins."""
    at = header.find(tag)
    while at >= 0:
        yield at + len(tag)
        at = header.find(tag, at + 1)


def _uint32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")


def _run_lengths(header: bytes, at: int) -> int:
    """Sum of the run lengths of a table, as far as the table is complete."""
    entries = min(_uint32(header, at + 4), (len(header) - at - 8) // 8)
    if entries <= 0:
        return 0
    table = np.frombuffer(header, dtype=">u4", count=2 * entries, offset=at + 8)
    return int(table[::2].sum(dtype=np.uint64))
