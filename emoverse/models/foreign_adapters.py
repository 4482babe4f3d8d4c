"""Adapter folders of PEFT, ms-swift and InternVL, read as changes to the native model.

In:  adapter_config.json and adapter_model.safetensors, with the names of either layout.
Out: an Adapter by native names. A fused wqkv adapter becomes three exact ones: A is copied to q, k
     and v, and B's rows are split like those of wqkv. The reverse is impossible at the same rank.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from emoverse.models.architecture import Architecture
from emoverse.models.internvl.checkpoint import native_shapes, split_rows
from emoverse.models.internvl.tensor_names import TensorNames, tensor_names
from emoverse.models.merge import LORA_A, LORA_B, Adapter, check_adapters

SETTINGS_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Settings that change the mathematics of an adapter; only plain LoRA is understood.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_rslora": (None, False),
    "use_dora": (None, False),
    "bias": (None, "none"),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "fan_in_fan_out": (None, False),
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    # These act on some tokens only (after certain words; where a router sends them).
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    # The others (pissa, olora, corda, loftq) changed the base when the adapter began.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}


def read_adapter(folder: str | Path, architecture: Architecture) -> tuple[Adapter, dict[str, Any]]:
    """The adapter and its settings.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: pickled weights, another kind of adapter, names or shapes that are not this
            architecture's.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = sorted(item.name for item in folder.glob("*.bin"))
        if pickled:
            raise ValueError(
                f"{folder} holds pickled weights ({pickled[0]}), which can run code when loaded; "
                f"save the adapter as {WEIGHTS_FILE}"
            )
        raise FileNotFoundError(f"{path} does not exist; point to a folder with a saved adapter")
    entries = tensor_names(architecture)
    by_released = {entry.released: entry for entry in entries}
    natives = {name for entry in entries for name in entry.native}
    tensors: dict[str, Tensor] = {}
    for key, value in _read_tensors(path).items():
        name = plain_name(key)
        base, end = _base_of(name)
        if base in natives:
            tensors[base if end is None else base.removesuffix(".weight") + end] = value
        elif base in by_released:
            tensors |= _native_parts(by_released[base], end, value, architecture)
        else:
            raise ValueError(
                f"{path}: {key} belongs to {base}, which this base does not have; the adapter is "
                "another model's"
            )
    _check_rank(path, tensors, settings["r"])
    scale = settings["lora_alpha"] / settings["r"]
    adapter = Adapter(tensors=tensors, scale=scale, origin=str(folder))
    check_adapters([adapter], native_shapes(architecture))
    return adapter, settings


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); copy it again"
        ) from error


def _check_rank(path: Path, tensors: Mapping[str, Tensor], r: int) -> None:
    """The scale is alpha / r of the settings: with another rank in the file it would be wrong."""
    for name, value in tensors.items():
        if name.endswith(LORA_A) and value.shape[0] != r:
            raise ValueError(
                f"{path}: {name} has rank {value.shape[0]}, but {SETTINGS_FILE} has r {r}; "
                "the two files belong to different adapters"
            )
    if not tensors:
        raise ValueError(f"{path} holds no tensors; copy it again")


def plain_name(key: str) -> str:
    """A tensor's name without what PEFT, ms-swift and InternVL wrap around it.

    >>> plain_name("base_model.model.mlp1.1.lora_A.default.weight")
    'mlp1.1.lora_A.weight'
    >>> plain_name("language_model.base_model.model.model.layers.0.attention.wo.lora_B.weight")
    'language_model.model.layers.0.attention.wo.lora_B.weight'
    """
    for wrapping in ("base_model.model.", "modules_to_save.", "base_layer."):
        key = key.replace(wrapping, "", 1)
    return key.replace(".default.", ".")


def _base_of(name: str) -> tuple[str, str | None]:
    """The base tensor that this one changes, and which half of an adapter it is."""
    for short, end in ((".lora_A.weight", LORA_A), (".lora_B.weight", LORA_B)):
        if name.endswith(short):
            return name.removesuffix(short) + ".weight", end
    return name, None


def _native_parts(
    entry: TensorNames, end: str | None, value: Tensor, architecture: Architecture
) -> dict[str, Tensor]:
    # The input is the same for all parts.
    shared = end == LORA_A
    parts = (value,) * len(entry.native) if shared else split_rows(value, entry, architecture)
    ends = ((name if end is None else name.removesuffix(".weight") + end) for name in entry.native)
    # Copies: tensors that share memory cannot be saved.
    return {
        name: part.clone(memory_format=torch.contiguous_format)
        for name, part in zip(ends, parts, strict=True)
    }


def read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json of plain LoRA. Raises FileNotFoundError, ValueError."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; point to a folder with a saved adapter")
    try:
        settings = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not JSON: {error}; copy the file again") from error
    problems = [
        f"{key} must be {' or '.join(map(repr, allowed))}, found {settings.get(key)!r}"
        for key, allowed in PLAIN.items()
        if settings.get(key) not in allowed
    ]
    problems += [
        f"{key} must be a positive integer, found {settings.get(key)!r}"
        for key in ("r", "lora_alpha")
        if not isinstance(settings.get(key), int) or settings[key] < 1
    ]
    if problems:
        raise ValueError(
            f"{path}: only plain LoRA can be read exactly:\n  "
            + "\n  ".join(problems)
            + "\nMerge the adapter with the tool that made it, and use the merged model."
        )
    return settings
