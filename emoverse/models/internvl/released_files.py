"""The safetensors files of a checkpoint folder: checked by their headers, read tensor by tensor.

In:  a folder with model.safetensors, or shards and model.safetensors.index.json.
Out: `WeightFiles`, which knows every name, shape and type before any value is read, and streams
     the values with one file open at a time; `ShardWriter` writes such a folder, shard by shard.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16")
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """Shape and type of one tensor, from the header of its file."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFiles:
    """The weights of one folder; `files` maps a file to the tensors it holds, both in order."""

    folder: Path
    files: Mapping[str, Mapping[str, Header]]

    @property
    def headers(self) -> dict[str, Header]:
        """Every tensor of the folder."""
        return {name: header for held in self.files.values() for name, header in held.items()}

    def tensors(self, files: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, as a view of the mapped file; it is valid until the next one is read."""
        for file in self.files if files is None else files:
            with _opened(self.folder / file) as reader:
                for name in self.files[file]:
                    yield name, reader.get_tensor(name)


def open_weights(folder: Path) -> WeightFiles:
    """Read the headers of all weight files.

    Raises:
        FileNotFoundError: no weights, or a shard that the index lists is missing.
        ValueError: pickled weights; a torn file; an index that lists other tensors than the shards
            hold; numbers that are not floating point.
    """
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        if single.is_file():
            raise ValueError(
                f"{folder} holds both {SINGLE} and {INDEX}, so it is not clear which weights "
                "count; remove the one that does not belong to the checkpoint"
            )
        files = _sharded(folder, _read_index(index))
    elif single.is_file():
        files = {SINGLE: _headers(single)}
    else:
        raise _no_weights(folder)
    weights = WeightFiles(folder=folder, files=files)
    headers = weights.headers
    unsupported = [name for name, header in headers.items() if header.dtype not in FLOATS]
    if unsupported:
        raise ValueError(
            f"{folder}: {unsupported[0]} is stored as {headers[unsupported[0]].dtype}, but "
            f"weights must be one of {', '.join(FLOATS)}; quantised checkpoints cannot be trained, "
            "download the original one"
        )
    return weights


def _no_weights(folder: Path) -> Exception:
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        return ValueError(
            f"{folder} holds pickled weights ({pickled[0]}), which can run code when loaded; "
            "only safetensors are read: download the safetensors files of the same model"
        )
    return FileNotFoundError(
        f"{folder} has neither {SINGLE} nor {INDEX}; point to the folder of a complete checkpoint"
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not the index of a sharded checkpoint ({error!r}); download it again"
        ) from error
    outside = sorted({file for file in files.values() if Path(file).name != file})
    if outside or not files:
        raise ValueError(
            f"{path}: weight_map must name files beside it, found {outside[:1] or 'none'}; "
            "download it again"
        )
    return files


def _sharded(folder: Path, weight_map: Mapping[str, str]) -> dict[str, dict[str, Header]]:
    listed: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        listed.setdefault(file, set()).add(name)
    files = {}
    for file in sorted(listed):
        files[file] = held = _headers(folder / file)
        if held.keys() != listed[file]:
            raise ValueError(
                f"{folder / file} does not hold what {INDEX} lists: "
                f"{len(listed[file] - held.keys())} missing, "
                f"{len(held.keys() - listed[file])} unlisted; download the file again"
            )
    return files


def _headers(path: Path) -> dict[str, Header]:
    headers = {}
    with _opened(path) as reader:
        for name in sorted(reader.keys()):
            tensor = reader.get_slice(name)
            headers[name] = Header(shape=tuple(tensor.get_shape()), dtype=tensor.get_dtype())
    return headers


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is listed in the index but missing; download it again")
    try:
        reader = safe_open(path, framework="pt")
    except Exception as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); get it again"
        ) from error
    with reader as opened:
        yield opened


class ShardWriter:
    """Writes tensors in the given order; holds one shard in memory at a time.

    A single shard becomes model.safetensors; several are numbered by `close`, with an index.
    """

    def __init__(self, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._limit = folder, shard_bytes
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
            stale.unlink()
        self._shard: dict[str, Tensor] = {}
        self._filled = 0
        self._written: list[tuple[Path, list[str], int]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes one tensor; it must not change afterwards."""
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._filled + size > self._limit:
            self._flush()
        self._shard[name] = tensor
        self._filled += size

    def _flush(self) -> None:
        path = self._folder / f"writing-{len(self._written) + 1:05d}.safetensors"
        save_file(self._shard, path, metadata={"format": "pt"})
        self._written.append((path, list(self._shard), self._filled))
        self._shard, self._filled = {}, 0

    def close(self) -> list[str]:
        """Writes the last shard, renames the files and returns their names."""
        self._flush()
        if len(self._written) == 1:
            self._written[0][0].rename(self._folder / SINGLE)
            return [SINGLE]
        weight_map: dict[str, str] = {}
        for index, (path, names, _) in enumerate(self._written, start=1):
            file = f"model-{index:05d}-of-{len(self._written):05d}.safetensors"
            path.rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index_json = {
            "metadata": {"total_size": sum(size for _, _, size in self._written)},
            "weight_map": weight_map,
        }
        (self._folder / INDEX).write_text(json.dumps(index_json, indent=2) + "\n", encoding="utf-8")
        return sorted(set(weight_map.values()))
