"""The damage corpus: every way to spoil a shard folder that we could think of, generated.

A kind changes a copy of a whole folder of six clips (`spoil`). `sealed` kinds also write matching
checksums, as a wrong or malicious builder would, so that only the deeper checks can find them.
"""

import hashlib
import io
import json
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np

from data_shards.media.video import encode_mp4
from data_shards.shards.index import ENTRY_DTYPE, ShardIndex
from data_shards.shards.reader import untar
from tests.builders import tar_blocks

KEY = "clip_1"  # the victim: record (0, 1), between two others
TAR, IDX = "shard-000000.tar", "shard-000000.idx"
REGULAR = tarfile.REGTYPE


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One kind of damage, and what must be said about it."""

    name: str
    spoil: Callable[[Path], None]
    found: Literal["load", "read", "decode"]  # when it must be noticed at the latest
    says: str  # regular expression for the cause
    lost: int = 1  # records that cannot be used


def members_of(folder: Path) -> dict[str, bytes]:
    """The victim's members, extension -> content."""
    entry = ShardIndex.load(folder).entries(0)[1]
    tar = (folder / TAR).read_bytes()
    start = int(entry["offset"])
    return untar(KEY, tar[start : start + int(entry["size"])])


def seal(folder: Path, blocks: bytes, **fields: int) -> None:
    """Put other blocks in the victim's place, with an index that fits them."""
    index = ShardIndex.load(folder)
    entries = np.array(index.entries(0))
    tar = (folder / TAR).read_bytes()
    start, size = int(entries[1]["offset"]), int(entries[1]["size"])
    tar = tar[:start] + blocks + tar[start + size :]
    entries[1]["size"], entries[1]["crc32"] = len(blocks), zlib.crc32(blocks)
    entries["offset"][2:] = entries["offset"][2:].astype(np.int64) + len(blocks) - size
    for name, value in fields.items():
        entries[1][name] = value
    (folder / TAR).write_bytes(tar)
    write_idx(folder, entries)


def write_idx(folder: Path, entries: np.ndarray) -> None:
    """Entries of shard 0, and an index.json that fits them and the tar."""
    (folder / "shard-000000.idx").write_bytes(entries.tobytes())
    document = json.loads((folder / "index.json").read_text())
    document["shards"][0]["idx_sha256"] = hashlib.sha256(entries.tobytes()).hexdigest()
    document["shards"][0]["bytes"] = (folder / TAR).stat().st_size
    (folder / "index.json").write_text(json.dumps(document))


def sealed(*extra: tuple[str, bytes, bytes], **changes: bytes | None) -> Callable[[Path], None]:
    """Other members for the victim (None removes one), then `extra` ones."""

    def spoil(folder: Path) -> None:
        members: dict[str, bytes | None] = {**members_of(folder), **changes}
        kept = [(f"{KEY}.{name}", c, REGULAR) for name, c in members.items() if c is not None]
        seal(folder, tar_blocks(*kept, *extra, tar_format=tarfile.PAX_FORMAT))

    return spoil


def fields(**changes: Any) -> Callable[[Path], None]:
    """Other values in the victim's json."""

    def spoil(folder: Path) -> None:
        document = {**json.loads(members_of(folder)["json"]), **changes}
        sealed(json=json.dumps(document).encode())(folder)

    return spoil


def video(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Another video for the victim, made from its own."""
    return lambda folder: sealed(mp4=change(members_of(folder)["mp4"]))(folder)


def edited(name: str, edit: Callable[[bytearray, int, int], object]) -> Callable[[Path], None]:
    """Change the bytes of a file, given the victim's first byte and size; nothing else fits."""

    def spoil(folder: Path) -> None:
        entry = ShardIndex.load(folder).entries(0)[1]
        path = folder / name
        content = bytearray(path.read_bytes())
        edit(content, int(entry["offset"]), int(entry["size"]))
        path.write_bytes(content)

    return spoil


def flip(content: bytearray, at: int) -> None:
    content[at] ^= 16


def cut(content: bytearray, at: int) -> None:
    del content[at:]


def same_size(content: bytearray, at: int, other: bytes) -> None:
    content[at : at + len(other)] = other


def document(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change index.json."""

    def spoil(folder: Path) -> None:
        path = folder / "index.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    return spoil


# --------------------------------------------------------------------------------- hostile videos


def claim(mp4: bytes, number: int) -> bytes:
    """A table that claims `number` frames of one byte each."""
    spoiled = bytearray(mp4)
    struct.pack_into(">II", spoiled, mp4.index(b"stsz") + 8, 1, number)
    struct.pack_into(">I", spoiled, mp4.index(b"stsc") + 16, number)
    struct.pack_into(">I", spoiled, mp4.index(b"stts") + 12, number)
    return bytes(spoiled)


def bigger_picture(mp4: bytes) -> bytes:
    """A few hundred bytes that want a picture of 16,384 x 16,384."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuvj420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        for _ in range(12):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    content = bytearray(buffer.getvalue())
    at = content.index(b"\xff\xc0")  # start of frame: height and width
    struct.pack_into(">HH", content, at + 5, 16_384, 16_384)
    at = content.index(b"mjpg") if b"mjpg" in content else content.index(b"mp4v")
    struct.pack_into(">HH", content, at + 28, 16_384, 16_384)
    return bytes(content)


def other_clip(num_frames: int) -> bytes:
    return encode_mp4(np.zeros((num_frames, 32, 32, 3), np.uint8), 25)


def with_picture_bytes_flipped(mp4: bytes) -> bytes:
    spoiled = bytearray(mp4)
    start = mp4.index(b"mdat") + 700  # past the parameter sets
    for at in range(start, len(mp4) - 900, 60):
        spoiled[at] ^= 0xFF
    return bytes(spoiled)


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


HEADER = 148  # place of the checksum in a tar header
DEEP = b"[" * 100_000 + b"]" * 100_000
WIDE = b"[" + b"[]," * 400_000 + b"[]]"
HUGE = b'{"version": ' + b"9" * 5_000 + b"}"


def kinds(outside: Path) -> list[Kind]:
    """All kinds; `outside` is a path that none of them may create or read."""
    return [*folder_kinds(outside), *tar_kinds(outside), *content_kinds(outside)]


def kind(name: str, spoil: Any, found: Any, says: str, lost: int = 1) -> Kind:
    return Kind(name=name, spoil=spoil, found=found, says=says, lost=lost)


def folder_kinds(outside: Path) -> list[Kind]:
    """The files of the folder."""
    return [
        kind("tar cut", edited(TAR, lambda c, o, s: cut(c, o + s // 2)), "load", "cut short"),
        kind("tar cut between", edited(TAR, lambda c, o, s: cut(c, o)), "load", "cut short"),
        kind("tar empty", edited(TAR, lambda c, o, s: c.clear()), "load", "cut short"),
        kind("tar gone", lambda f: (f / TAR).unlink(), "load", "missing, but index.json lists"),
        kind("tar is a folder", _folder, "load", "missing, but"),
        kind("tar longer", edited(TAR, lambda c, o, s: c.extend(b"x" * 512)), "load", "must have"),
        kind("idx cut", edited(IDX, lambda c, o, s: cut(c, 30)), "load", "cut short"),
        kind("idx changed", edited("shard-000000.idx", lambda c, o, s: flip(c, 25)), "read",
             "does not fit idx_sha256", 3),
        kind("keys changed", edited("shard-000000.keys", lambda c, o, s: flip(c, 5)), "read",
             "does not fit keys_sha256", 3),
        kind("idx points outside", _outside, "read", "does not fit classes and bytes", 3),
        kind("idx overlaps", _overlap, "read", "does not fit classes and bytes", 3),
        kind("idx wraps around", _wrap, "read", "does not fit classes and bytes", 3),
        kind("index.json cut", edited("index.json", lambda c, o, s: cut(c, 99)), "load", "be JSON"),
        kind("index.json deep", edited("index.json", lambda c, o, s: same_size(c, 0, DEEP)), "load",
             "must be JSON"),
        kind("index.json leaves the folder",
             document(lambda d: d["shards"][0].update(name="../x.tar")), "load", "plain file name"),
        kind("index.json runs a program",
             document(lambda d: d["shards"][0].update(name=f"pipe:touch {outside}")), "load",
             "plain file name"),
        kind("index.json of the future", document(lambda d: d.update(schema_version=99)), "load",
             "reads version"),
        kind("index.json counts wrong", document(lambda d: d["shards"][0].update(records=9)),
             "load", "classes must sum to records"),
    ]  # fmt: skip


def tar_kinds(outside: Path) -> list[Kind]:
    """Bytes that changed after they were written; then structure, with checksums that fit."""
    crc, r, says_type = "checksum must be", REGULAR, "must be a regular file"
    return [
        kind("flipped bit in a header", edited(TAR, lambda c, o, s: flip(c, o + 3)), "read", crc),
        kind("flipped bit in the json", edited(TAR, lambda c, o, s: flip(c, o + 520)), "read", crc),
        kind("flipped bit in the video", edited(TAR, lambda c, o, s: flip(c, o + s // 2)), "read",
             crc),
        kind("flipped bit in the padding", edited(TAR, lambda c, o, s: flip(c, o + s - 1)), "read",
             crc),
        kind("4 KiB of zeros", edited(TAR, lambda c, o, s: same_size(c, o + 600, bytes(4096))),
             "read", crc),
        kind("another record's bytes", edited(TAR, lambda c, o, s: same_size(c, o, c[:s])), "read",
             crc),
        kind("missing video", sealed(mp4=None), "read", "members: must be json, mp4"),
        kind("missing json", sealed(json=None), "read", "json: must be among the members"),
        kind("duplicate member", sealed((f"{KEY}.mp4", b"x", r)), "read", "comes twice"),
        kind("another key", sealed(("clip_0.mp4", b"x", r)), "read", "does not belong"),
        kind("path traversal", sealed((f"../{KEY}.mp4", b"x", r)), "read", "does not belong"),
        kind("absolute path", sealed((f"{outside}", b"x", r)), "read", "does not belong"),
        kind("traversal after the key", sealed((f"{KEY}./../../x", b"x", r)), "read", "not belong"),
        kind("pickle member", sealed((f"{KEY}.pickle", pickle.dumps(Bomb(str(outside))), r)),
             "read", "does not belong"),
        kind("pyd member", sealed((f"{KEY}.pyd", pickle.dumps(Bomb(str(outside))), r)), "read",
             "does not belong"),
        kind("compressed member", sealed((f"{KEY}.json.gz", b"x", r)), "read", "does not belong"),
        kind("symlink", sealed((f"{KEY}.f0.jpg", b"", tarfile.SYMTYPE)), "read", says_type),
        kind("hard link", sealed((f"{KEY}.f0.jpg", b"", tarfile.LNKTYPE)), "read", says_type),
        kind("char device", sealed((f"{KEY}.f0.jpg", b"", tarfile.CHRTYPE)), "read", says_type),
        kind("block device", sealed((f"{KEY}.f0.jpg", b"", tarfile.BLKTYPE)), "read", says_type),
        kind("fifo", sealed((f"{KEY}.f0.jpg", b"", tarfile.FIFOTYPE)), "read", says_type),
        kind("folder", sealed((f"{KEY}.f0.jpg", b"", tarfile.DIRTYPE)), "read", says_type),
        kind("sparse file", sealed((f"{KEY}.f0.jpg", b"", tarfile.GNUTYPE_SPARSE)), "read",
             says_type),
        kind("long name", sealed((f"{KEY}.{'x' * 300}", b"", r)), "read", "may not set b'path'"),
        kind("size beyond the record", _claims_more, "read", "claims 99999 bytes"),
        kind("no tar at all", lambda f: seal(f, b"garbage!" * 64), "read", "no tar header"),
        kind("only zeros", lambda f: seal(f, bytes(1024)), "read", "no tar header"),
    ]  # fmt: skip


def content_kinds(outside: Path) -> list[Kind]:
    """What stands in the members, with checksums that fit."""
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{outside}\n#EXT-X-ENDLIST\n"
    concat = f"ffconcat version 1.0\nfile '{outside}'\n"
    return [
        kind("json bomb, deep", sealed(json=DEEP), "read", "cannot be read"),
        kind("json bomb, wide", sealed(json=WIDE), "read", "may have 1048576 bytes"),
        kind("json bomb, number", sealed(json=HUGE), "read", "cannot be read"),
        kind("json no object", sealed(json=b"[]"), "read", "must be an object"),
        kind("json not finite", sealed(json=b'{"sentiment": NaN}'), "read", "not a JSON number"),
        kind("json not text", sealed(json=b"\xff\xfe\xfd"), "read", "cannot be read"),
        kind("json of another record", fields(key="clip_0"), "read", "must equal the name"),
        kind("label not in its list", fields(emotion="glee"), "read", "emotion: must be one"),
        kind("absurd number of frames", fields(num_frames=10**300), "read", "num_frames"),
        kind("absurd sentiment", fields(sentiment=10**400), "read", "sentiment"),
        kind("promised frames", fields(num_frames=999), "decode", "must have 999 frames"),
        kind("video cut", video(lambda mp4: mp4[: len(mp4) // 2]), "decode", "mp4: "),
        kind("video empty", sealed(mp4=b""), "read", "non-empty mp4"),
        kind("video of garbage", sealed(mp4=b"garbage!" * 999), "decode", "mp4: cannot decode"),
        kind("video of other length", sealed(mp4=other_clip(3)), "decode", "frame|promised"),
        kind("video with flipped bytes", video(with_picture_bytes_flipped), "decode", "mp4: "),
        kind("video that claims a billion frames", video(lambda mp4: claim(mp4, 10**9)), "decode",
             "claim \\d+ frames"),
        kind("video with a huge picture", sealed(mp4=bigger_picture(b"")), "decode",
             "16384x16384 pixels|cannot decode"),
        kind("video with compressed headers", video(lambda mp4: mp4.replace(b"mvhd", b"cmov")),
             "decode", "compressed"),
        kind("video of no codec", video(lambda mp4: mp4.replace(b"avc1", b"zzz1")), "decode",
             "knows the codec"),
        kind("playlist of other files", sealed(mp4=playlist.encode()), "decode", "cannot decode"),
        kind("list of other files", sealed(mp4=concat.encode()), "decode", "cannot decode"),
    ]  # fmt: skip


def _folder(folder: Path) -> None:
    (folder / TAR).unlink()
    (folder / TAR).mkdir()


def _with_entries(folder: Path, change: Callable[[np.ndarray], None]) -> None:
    entries = np.array(ShardIndex.load(folder).entries(0), dtype=ENTRY_DTYPE)
    change(entries)
    write_idx(folder, entries)


def _outside(folder: Path) -> None:
    _with_entries(folder, lambda e: e["size"].__setitem__(2, 2**31))


def _overlap(folder: Path) -> None:
    _with_entries(folder, lambda e: e["offset"].__setitem__(1, 512))


def _wrap(folder: Path) -> None:
    _with_entries(folder, lambda e: e["offset"].__setitem__(2, 2**64 - 512))


def _claims_more(folder: Path) -> None:
    members = members_of(folder)
    info = tarfile.TarInfo(f"{KEY}.mp4")
    info.size = 99_999
    blocks = (
        tar_blocks((f"{KEY}.json", members["json"]), tar_format=tarfile.PAX_FORMAT)
        + info.tobuf()
        + bytes(1024)
    )
    seal(folder, blocks)
