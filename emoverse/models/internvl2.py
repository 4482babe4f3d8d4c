"""Released InternVL2 checkpoints <-> transformers' own classes, exact in both directions.

In:  a folder in the released layout (config.json, one safetensors file or shards + index).
Out: InternVLForConditionalGeneration with a Phi-3 or a Llama backbone; and the same folder again.
No remote code: the released modelling files give NaN under transformers 5.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    Phi3Config,
)

from emoverse.models.architecture import Architecture, read_config_json
from emoverse.models.internvl2_keys import BLOCKS, GROUPS, Link, links

__all__ = [
    "build_native",
    "export_checkpoint",
    "import_checkpoint",
    "native_config",
]

IMG_CONTEXT = "<IMG_CONTEXT>"
SHARD_BYTES = 5 * 10**9


def native_config(config_json: Mapping[str, Any], image_token_id: int) -> InternVLConfig:
    """Translate a released config.json. Every field that a default would get wrong is set here."""
    architecture = Architecture.from_config_json(config_json)
    vision, llm = config_json["vision_config"], config_json["llm_config"]
    vision_config = InternVLVisionConfig(
        hidden_size=architecture.vision.hidden,
        num_hidden_layers=architecture.vision.layers,
        num_attention_heads=architecture.vision.heads,
        intermediate_size=architecture.vision.mlp,
        image_size=architecture.vision.image_size,
        patch_size=architecture.vision.patch_size,
        hidden_act=vision["hidden_act"],
        norm_type=vision["norm_type"],
        layer_norm_eps=vision["layer_norm_eps"],
        layer_scale_init_value=float(vision.get("initializer_factor", 1.0)),
        attention_bias=True,
        use_qk_norm=False,
        use_mean_pooling=True,  # False would add a final LayerNorm that the checkpoints lack
    )
    shared: dict[str, Any] = {
        "hidden_size": architecture.llm.hidden,
        "num_hidden_layers": architecture.llm.layers,
        "num_attention_heads": architecture.llm.heads,
        "num_key_value_heads": architecture.llm.kv_heads,
        "intermediate_size": architecture.llm.mlp,
        "vocab_size": architecture.llm.vocab,
        "rms_norm_eps": llm["rms_norm_eps"],
        "max_position_embeddings": llm["max_position_embeddings"],
        "rope_parameters": _rope_parameters(llm),
        "bos_token_id": llm["bos_token_id"],
        "eos_token_id": llm["eos_token_id"],
        "pad_token_id": llm["pad_token_id"],
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        # A default cache switches off the packing of sequences; generate() turns it on by itself.
        "use_cache": False,
    }
    if architecture.llm.family == "phi3":
        original = llm.get("original_max_position_embeddings", llm["max_position_embeddings"])
        text_config: Phi3Config | LlamaConfig = Phi3Config(
            **shared,
            original_max_position_embeddings=original,
            sliding_window=llm.get("sliding_window"),
            resid_pdrop=0.0,
            embd_pdrop=0.0,
        )
    else:
        text_config = LlamaConfig(**shared, attention_bias=False, mlp_bias=False)
    return InternVLConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=image_token_id,
        image_seq_length=architecture.visual_tokens_per_frame,
        downsample_ratio=float(config_json["downsample_ratio"]),
        vision_feature_layer=int(config_json["select_layer"]),
        vision_feature_select_strategy="default",  # drops the class token
        tie_word_embeddings=False,  # the class default True would tie the head to the embedding
    )


def _rope_parameters(llm: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling of the released layout as transformers' rope_parameters."""
    scaling = llm.get("rope_scaling")
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": float(llm["rope_theta"])}
    if not scaling:
        return parameters
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind in ("su", "longrope"):
        return parameters | {
            "rope_type": "longrope",
            "short_factor": list(scaling["short_factor"]),
            "long_factor": list(scaling["long_factor"]),
            "original_max_position_embeddings": llm["original_max_position_embeddings"],
        }
    if kind == "dynamic":
        return parameters | {"rope_type": "dynamic", "factor": float(scaling["factor"])}
    raise ValueError(
        f"llm_config.rope_scaling.type must be su, longrope or dynamic, found {kind!r}; "
        "use the config.json of the released model"
    )


def build_native(
    config_json: Mapping[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> InternVLForConditionalGeneration:
    """A randomly initialised model; the same seed gives the same weights."""
    config = native_config(config_json, _image_token_id(config_json, None))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config).to(dtype)
    _reset_rotary(model)
    return model.eval()


def import_checkpoint(
    folder: str | Path, dtype: torch.dtype | None = None
) -> tuple[InternVLForConditionalGeneration, dict[str, Any]]:
    """Load a released folder; `dtype` None keeps what the file holds.

    Returns:
        The native model (eval, all parameters requiring gradients) and its config.json.
    Raises:
        FileNotFoundError: no config.json or no safetensors.
        ValueError: wrong architecture; pickled weights; missing, unexpected or misshapen tensors.
    """
    folder = Path(folder)
    config_json = read_config_json(folder)
    architecture = Architecture.from_config_json(config_json, origin=str(folder / "config.json"))
    config = native_config(config_json, _image_token_id(config_json, folder))
    expected = {link.released: link for link in links(architecture)}
    state: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, tensor in _released_tensors(folder):
        link = expected.pop(name, None)
        if link is None:
            problems.append(f"unexpected tensor {name} {tuple(tensor.shape)}")
        elif tuple(tensor.shape) != link.shape:
            problems.append(f"{name} must have shape {link.shape}, found {tuple(tensor.shape)}")
        else:
            parts = split_rows(tensor, link, architecture)
            for native, part in zip(link.native, parts, strict=True):
                # A copy of its own: slices of a memory-mapped file must not outlive it.
                state[native] = part.to(dtype or part.dtype, copy=True).contiguous()
    problems += [f"missing tensor {name}" for name in expected]
    if problems:
        shown = "\n  ".join(problems[:20])
        rest = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(
            f"{folder}: the weights do not fit its config.json:\n  {shown}{rest}\n"
            "Download or export the checkpoint again; config.json and weights must belong together."
        )
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    model.load_state_dict(state, strict=True, assign=True)
    _reset_rotary(model)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model.eval(), config_json


def _reset_rotary(model: InternVLForConditionalGeneration) -> None:
    """Compute the rotary frequencies anew, in fp32: no checkpoint holds them, and in bf16 they are
    wrong by more than the distance between neighbouring positions."""
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
    table = links(architecture)
    wanted = {name for link in table for name in link.native}
    if set(state) != wanted:
        extra, lost = sorted(set(state) - wanted), sorted(wanted - set(state))
        raise ValueError(
            f"cannot export to {folder}: the model has {len(extra)} tensors that the released "
            f"layout lacks (first: {extra[:1]}) and lacks {len(lost)} (first: {lost[:1]}); "
            "merge the adapters first"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if copy_from is not None:
        for path in sorted(Path(copy_from).iterdir()):
            weights = path.suffix in (".safetensors", ".bin") or path.name.endswith(".index.json")
            if path.is_file() and not weights:
                shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(
        json.dumps(config_json, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for link in table:
        tensor = join_rows([state[name] for name in link.native], link, architecture)
        tensor = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][link.released] = tensor
        filled += size
    _write_shards(shards, folder)


def _write_shards(shards: list[dict[str, Tensor]], folder: Path) -> None:
    """One model.safetensors, or numbered files and model.safetensors.index.json."""
    for stale in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
        stale.unlink()
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=2) + "\n", encoding="utf-8"
    )


def split_rows(tensor: Tensor, link: Link, architecture: Architecture) -> tuple[Tensor, ...]:
    """Released tensor -> native parts (views)."""
    if link.split == BLOCKS:
        return tensor.chunk(3)
    if link.split == GROUPS:
        llm = architecture.llm
        queries = llm.heads // llm.kv_heads
        grouped = tensor.view(llm.kv_heads, queries + 2, llm.head_dim, -1)
        parts = grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1]
        return tuple(part.reshape(-1, tensor.shape[-1]) for part in parts)
    return (tensor,)


def join_rows(parts: list[Tensor], link: Link, architecture: Architecture) -> Tensor:
    """Native parts -> released tensor; the inverse of split_rows."""
    if link.split == BLOCKS:
        return torch.cat(parts)
    if link.split == GROUPS:
        llm = architecture.llm
        columns = parts[0].shape[-1]
        shaped = [part.view(llm.kv_heads, -1, llm.head_dim, columns) for part in parts]
        return torch.cat(shaped, dim=1).reshape(-1, columns)
    return parts[0]


def _released_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the folder, one file open at a time."""
    index_path = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index_path.is_file():
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        for name in sorted(set(weight_map.values())):
            listed = {key for key, file in weight_map.items() if file == name}
            with _opened(folder / name) as reader:
                held = set(reader.keys())
                if held != listed:
                    raise ValueError(
                        f"{folder / name} does not hold what {index_path.name} lists: "
                        f"{len(listed - held)} missing, {len(held - listed)} unlisted; "
                        "download the file again"
                    )
                for key in sorted(held):
                    yield key, reader.get_tensor(key)
    elif single.is_file():
        with _opened(single) as reader:
            for key in reader.keys():  # noqa: SIM118 - not a dict
                yield key, reader.get_tensor(key)
    else:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        if pickled:
            raise ValueError(
                f"{folder} holds pickled weights ({pickled[0]}), which can run code when loaded; "
                "only safetensors are read: download the safetensors files of the same model"
            )
        raise FileNotFoundError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json; "
            "point to the folder of a complete checkpoint"
        )


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


def _image_token_id(config_json: Mapping[str, Any], folder: Path | None) -> int:
    """Id of <IMG_CONTEXT>: config.json's img_context_token_id, else the tokenizer's files."""
    value = config_json.get("img_context_token_id")
    if isinstance(value, int):
        return value
    if folder is not None:
        path = folder / "tokenizer_config.json"
        if path.is_file():
            table = json.loads(path.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
            for number, token in table.items():
                if token.get("content") == IMG_CONTEXT:
                    return int(number)
        path = folder / "added_tokens.json"
        if path.is_file():
            table = json.loads(path.read_text(encoding="utf-8"))
            if IMG_CONTEXT in table:
                return int(table[IMG_CONTEXT])
    raise ValueError(
        f"the id of {IMG_CONTEXT} is in neither config.json (img_context_token_id) nor "
        f"tokenizer_config.json nor added_tokens.json of {folder}; copy the tokenizer files "
        "next to the weights"
    )
