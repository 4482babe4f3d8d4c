"""The duration that an mp4 file states of itself; plain byte reading, nothing is decoded."""

import struct
from typing import Final

_BOX_HEADER: Final = 8  # size and type


def mp4_seconds(mp4: bytes) -> float | None:
    """Duration that the file's movie header states (ISO 14496-12, box moov/mvhd); None without."""
    movie = _box(mp4, b"moov")
    header = None if movie is None else _box(movie, b"mvhd")
    if header is None or len(header) < 32:
        return None
    # version 1 has 64-bit times; both versions hold creation, modification, time scale, duration
    layout, start = (">IQ", 20) if header[0] == 1 else (">II", 12)
    scale, duration = struct.unpack_from(layout, header, start)
    return float(duration / scale) if scale else None


def _box(content: bytes, name: bytes) -> bytes | None:
    """The content of the first box with this name, one level deep."""
    at = 0
    while at + _BOX_HEADER <= len(content):
        size, kind = struct.unpack_from(">I4s", content, at)
        head = _BOX_HEADER
        if size == 1 and at + 16 <= len(content):
            (size,) = struct.unpack_from(">Q", content, at + _BOX_HEADER)
            head = 16
        end = len(content) if size == 0 else at + size
        if kind == name:
            return content[at + head : end]
        if end <= at:
            return None
        at = end
    return None
