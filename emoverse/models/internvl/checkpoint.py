"""Released InternVL2 checkpoints <-> transformers' own classes, exact in both directions.

In:  a folder in the released layout (config.json, one safetensors file or shards + index).
Out: InternVLForConditionalGeneration with a Phi-3 or a Llama backbone; and the same folder again.
No remote code: the released modelling files give NaN under transformers 5.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLForConditionalGeneration

from emoverse.models.architecture import Architecture, read_config_json
from emoverse.models.internvl.native_config import image_token_id, native_config
from emoverse.models.internvl.released_files import (
    SHARD_BYTES,
    ShardWriter,
    WeightFiles,
    open_weights,
)
from emoverse.models.internvl.tensor_names import BLOCKS, GROUPS, TensorNames, tensor_names
from emoverse.models.merge import Adapter, check_adapters, merged

PROJECTOR = "model.multi_modal_projector."


def build_native(
    config_json: Mapping[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> InternVLForConditionalGeneration:
    """A randomly initialised model; the same seed gives the same weights."""
    config = native_config(config_json, image_token_id(config_json, None))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: InternVLForConditionalGeneration = InternVLForConditionalGeneration(config)
        model.to(dtype)  # type: ignore[arg-type]  # transformers types its wrapper as unbound
    _reset_rotary(model)
    model.eval()
    return model


@dataclass(frozen=True, kw_only=True, slots=True)
class Released:
    """A released folder whose names, shapes and settings have been checked; no values are read."""

    folder: Path
    config_json: dict[str, Any]
    architecture: Architecture
    config: InternVLConfig
    weights: WeightFiles
    names: Mapping[str, TensorNames]  # by released name

    def tensors(
        self,
        dtype: torch.dtype | None = None,
        *,
        adapters: Sequence[Adapter] = (),
        only: Callable[[str], bool] = lambda name: True,
    ) -> Iterator[tuple[str, Tensor]]:
        """Native (name, tensor) pairs in the order of the files, one at a time in memory.

        Args:
            dtype: type to convert to, after merging; None keeps the stored one.
            adapters: adapters to merge, in fp32.
            only: selects the native names to read.
        """
        for released, tensor in self.weights.tensors():
            entry = self.names[released]
            if not any(only(name) for name in entry.native):
                continue
            for name, part in zip(
                entry.native, split_rows(tensor, entry, self.architecture), strict=True
            ):
                if only(name):
                    value = merged(name, part, adapters)
                    # A copy of its own: slices of a mapped file must not outlive it.
                    yield name, value.to(dtype or part.dtype, copy=True).contiguous()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every native tensor."""
        return native_shapes(self.architecture)


def native_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the native model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in tensor_names(architecture):
        parts = split_rows(torch.empty(entry.shape, device="meta"), entry, architecture)
        shapes |= {n: tuple(p.shape) for n, p in zip(entry.native, parts, strict=True)}
    return shapes


def open_checkpoint(folder: str | Path) -> Released:
    """Check a released folder by its config.json and the headers of its weights; reads no values.

    Raises:
        FileNotFoundError: no config.json or no safetensors.
        ValueError: wrong architecture; pickled weights; missing, unexpected or misshapen tensors.
    """
    folder = Path(folder)
    config_json = read_config_json(folder)
    architecture = Architecture.from_config_json(config_json, origin=str(folder / "config.json"))
    config = native_config(config_json, image_token_id(config_json, folder))
    weights = open_weights(folder)
    expected = {entry.released: entry for entry in tensor_names(architecture)}
    problems: list[str] = []
    headers = weights.headers
    for name, header in headers.items():
        entry = expected.get(name)
        if entry is None:
            problems.append(f"unexpected tensor {name} {header.shape}")
        elif header.shape != entry.shape:
            problems.append(f"{name} must have shape {entry.shape}, found {header.shape}")
    problems += [f"missing tensor {name}" for name in expected if name not in headers]
    if problems:
        shown = "\n  ".join(problems[:20])
        rest = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(
            f"{folder}: the weights do not fit its config.json:\n  {shown}{rest}\n"
            "Download or export the checkpoint again; config.json and weights must belong together."
        )
    return Released(
        folder=folder,
        config_json=config_json,
        architecture=architecture,
        config=config,
        weights=weights,
        names=expected,
    )


def import_checkpoint(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | str = "cpu",
    adapters: Sequence[Adapter] = (),
) -> tuple[InternVLForConditionalGeneration, dict[str, Any]]:
    """Load a released folder tensor by tensor; `dtype` None keeps what the file holds.

    Memory: the model itself and one tensor; everything is checked before the first one is read.

    Returns:
        The native model (eval, all parameters requiring gradients) and its config.json.
    Raises:
        FileNotFoundError, ValueError: see open_checkpoint and check_adapters.
    """
    released = open_checkpoint(folder)
    check_adapters(adapters, released.shapes)
    model = _empty_model(released)
    for name, value in released.tensors(dtype, adapters=adapters):
        _place(model, name, value.to(device))
    _reset_rotary(model)
    model.model.language_model.rotary_emb.to(device)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model.eval(), released.config_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Deferred:
    """Frozen parameters that take no memory yet, and their values to be read later.

    Under ZeRO-3 every rank keeps its share of each tensor only; the whole model never exists.
    """

    released: Released
    dtype: torch.dtype
    adapters: Sequence[Adapter]
    parameters: Mapping[str, nn.Parameter]

    def values(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each placeholder with its value on the CPU, in the same order on every rank."""
        only = self.parameters.__contains__
        for name, value in self.released.tensors(self.dtype, adapters=self.adapters, only=only):
            yield self.parameters[name], value


def import_deferred(
    folder: str | Path,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    adapters: Sequence[Adapter] = (),
) -> tuple[InternVLForConditionalGeneration, dict[str, Any], Deferred]:
    """As import_checkpoint, but only the projector is read; the third value reads the rest.

    A placeholder has the right shape, type and device, and the memory of a single element.
    """
    released = open_checkpoint(folder)
    check_adapters(adapters, released.shapes)
    model = _empty_model(released)
    frozen = {name for name in released.shapes if not name.startswith(PROJECTOR)}
    trained = released.shapes.keys() - frozen
    for name, value in released.tensors(dtype, adapters=adapters, only=trained.__contains__):
        _place(model, name, value.to(device))
    for name in frozen:
        blank = torch.zeros((), dtype=dtype, device=device)
        _place(model, name, blank.expand(released.shapes[name]))
    _reset_rotary(model)
    model.model.language_model.rotary_emb.to(device)
    parameters = dict(model.named_parameters())
    deferred = Deferred(
        released=released,
        dtype=dtype,
        adapters=adapters,
        parameters={name: parameters[name] for name in frozen},
    )
    return model.eval(), released.config_json, deferred


def _empty_model(released: Released) -> InternVLForConditionalGeneration:
    """The model on the meta device; its names are exactly the native tensor names."""
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(released.config)
    assert set(model.state_dict()) == set(released.shapes)
    return model


def _place(model: nn.Module, name: str, value: Tensor) -> None:
    """Replaces a parameter on the meta device by a value."""
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    assert tuple(owner.get_parameter(leaf).shape) == tuple(value.shape), name
    owner.register_parameter(leaf, nn.Parameter(value))


def _reset_rotary(model: InternVLForConditionalGeneration) -> None:
    """Recompute the rotary frequencies in fp32.

    No checkpoint holds them, and in bf16 they are wrong by more than the distance between
    neighbouring positions.
    """
    language_model = model.model.language_model
    language_model.rotary_emb = type(language_model.rotary_emb)(model.config.text_config)


def export_checkpoint(
    model: InternVLForConditionalGeneration,
    config_json: Mapping[str, Any],
    folder: str | Path,
    dtype: torch.dtype | None = torch.bfloat16,
    *,
    copy_from: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model` in the released layout; import_checkpoint of the result is bit-identical.

    Args:
        dtype: stored type; None keeps the model's.
        copy_from: a folder whose tokenizer and other small files are copied along.
        shard_bytes: above this size the weights go to several files with an index.
    Raises:
        ValueError: the model has tensors that the layout does not know (unmerged adapters).
    """
    folder = Path(folder)
    architecture = Architecture.from_config_json(config_json)
    state = dict(model.state_dict())
    entries = tensor_names(architecture)
    expected = {name for entry in entries for name in entry.native}
    if set(state) != expected:
        extra, lost = sorted(set(state) - expected), sorted(expected - set(state))
        raise ValueError(
            f"cannot export to {folder}: the model has {len(extra)} tensors that the released "
            f"layout lacks (first: {extra[:1]}) and lacks {len(lost)} (first: {lost[:1]}); "
            "merge the adapters first"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if copy_from is not None:
        copy_small_files(Path(copy_from), folder)
    (folder / "config.json").write_text(
        json.dumps(config_json, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    writer = ShardWriter(folder, shard_bytes=shard_bytes)
    for entry in entries:
        tensor = join_rows([state[name] for name in entry.native], entry, architecture)
        writer.add(entry.released, tensor.detach().to("cpu", dtype or tensor.dtype).contiguous())
    writer.close()


def copy_small_files(source: Path, folder: Path) -> None:
    """Everything of a released folder but its weights: config, tokenizer, code, licence."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        weights = path.suffix in (".safetensors", ".bin") or path.name.endswith(".index.json")
        if path.is_file() and not weights:
            shutil.copyfile(path, folder / path.name)


def split_rows(
    tensor: Tensor, entry: TensorNames, architecture: Architecture
) -> tuple[Tensor, ...]:
    """Released tensor -> native parts (views)."""
    if entry.split == BLOCKS:
        return tensor.chunk(3)
    if entry.split == GROUPS:
        llm = architecture.llm
        queries = llm.heads // llm.kv_heads
        grouped = tensor.view(llm.kv_heads, queries + 2, llm.head_dim, -1)
        parts = grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1]
        return tuple(part.reshape(-1, tensor.shape[-1]) for part in parts)
    return (tensor,)


def join_rows(parts: list[Tensor], entry: TensorNames, architecture: Architecture) -> Tensor:
    """Native parts -> released tensor; the inverse of split_rows."""
    if entry.split == BLOCKS:
        return torch.cat(parts)
    if entry.split == GROUPS:
        llm = architecture.llm
        columns = parts[0].shape[-1]
        shaped = [part.view(llm.kv_heads, -1, llm.head_dim, columns) for part in parts]
        return torch.cat(shaped, dim=1).reshape(-1, columns)
    return parts[0]
