"""The names of every tensor in the released layout and in the native classes. Torch-free.

Each entry maps one released tensor to the native tensor(s) that hold the same values: a renaming,
and for fused q/k/v a split of rows, so import and export are exact inverses of each other.
"""

from dataclasses import dataclass

from emoverse.models.architecture import Architecture

WHOLE, BLOCKS, GROUPS = "whole", "blocks", "groups"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorNames:
    """One released tensor and the native tensors with the same values.

    `split` is how the rows are divided among the native tensors: whole (a single one), blocks
    (equal blocks q | k | v) or groups (per key/value head: its query heads, its key head, its value
    head).
    """

    released: str
    shape: tuple[int, ...]
    native: tuple[str, ...]
    split: str = WHOLE


def tensor_names(architecture: Architecture) -> tuple[TensorNames, ...]:
    """Every tensor of the model, in the order in which the released file lists the parts."""
    return (*_vision(architecture), *_projector(architecture), *_llm(architecture))


def _vision(architecture: Architecture) -> list[TensorNames]:
    sizes = architecture.vision
    width, patch = sizes.hidden, sizes.patch_size
    released, native = "vision_model.embeddings", "model.vision_tower.embeddings"
    entries: list[TensorNames] = [
        _single(f"{released}.class_embedding", f"{native}.cls_token", 1, 1, width),
        _single(
            f"{released}.position_embedding",
            f"{native}.position_embeddings",
            *(1, sizes.patches + 1, width),
        ),
        _single(
            f"{released}.patch_embedding.weight",
            f"{native}.patch_embeddings.projection.weight",
            *(width, 3, patch, patch),
        ),
        _single(
            f"{released}.patch_embedding.bias",
            f"{native}.patch_embeddings.projection.bias",
            width,
        ),
    ]
    for layer in range(sizes.layers):
        released = f"vision_model.encoder.layers.{layer}"
        native = f"model.vision_tower.encoder.layer.{layer}"
        for old, new in (("norm1", "layernorm_before"), ("norm2", "layernorm_after")):
            for leaf in ("weight", "bias"):
                entries.append(_single(f"{released}.{old}.{leaf}", f"{native}.{new}.{leaf}", width))
        entries.append(_single(f"{released}.ls1", f"{native}.lambda_1", width))
        entries.append(_single(f"{released}.ls2", f"{native}.lambda_2", width))
        for leaf, columns in (("weight", (width,)), ("bias", ())):
            projections = tuple(f"{native}.attention.{name}_proj.{leaf}" for name in "qkv")
            entries.append(
                TensorNames(
                    released=f"{released}.attn.qkv.{leaf}",
                    shape=(3 * width, *columns),
                    native=projections,
                    split=BLOCKS,
                )
            )
        for old, new, inputs, outputs in (
            ("attn.proj", "attention.projection_layer", width, width),
            ("mlp.fc1", "mlp.fc1", width, sizes.mlp),
            ("mlp.fc2", "mlp.fc2", sizes.mlp, width),
        ):
            entries += _linear(f"{released}.{old}", f"{native}.{new}", inputs, outputs)
    return entries


def _projector(architecture: Architecture) -> list[TensorNames]:
    channels = architecture.feature_channels
    native = "model.multi_modal_projector"
    entries = [
        _single(f"mlp1.0.{leaf}", f"{native}.layer_norm.{leaf}", channels)
        for leaf in ("weight", "bias")
    ]
    for old, (new, (inputs, outputs)) in zip(
        ("mlp1.1", "mlp1.3"), architecture.projector_linears().items(), strict=True
    ):
        entries += _linear(old, f"{native}.{new}", inputs, outputs)
    return entries


def _llm(architecture: Architecture) -> list[TensorNames]:
    sizes = architecture.llm
    phi3 = sizes.family == "phi3"
    released, native = "language_model.model", "model.language_model"
    embedding = "embed_tokens" if phi3 else "tok_embeddings"
    head = "language_model.lm_head" if phi3 else "language_model.output"
    shape = (sizes.vocab, sizes.hidden)
    entries = [
        _single(f"{released}.{embedding}.weight", f"{native}.embed_tokens.weight", *shape),
        _single(f"{released}.norm.weight", f"{native}.norm.weight", sizes.hidden),
        _single(f"{head}.weight", "lm_head.weight", *shape),
    ]
    for layer in range(sizes.layers):
        old, new = f"{released}.layers.{layer}", f"{native}.layers.{layer}"
        entries += (
            _phi3_layer(architecture, old, new)
            if phi3
            else _internlm2_layer(architecture, old, new)
        )
    return entries


def _phi3_layer(architecture: Architecture, old: str, new: str) -> list[TensorNames]:
    """Phi-3: the same names on both sides."""
    sizes = architecture.llm
    entries = [
        _single(f"{old}.{norm}.weight", f"{new}.{norm}.weight", sizes.hidden)
        for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    for name, (inputs, outputs) in sizes.linears().items():
        block = "self_attn" if name in ("qkv_proj", "o_proj") else "mlp"
        leaf = f"{block}.{name}.weight"
        entries.append(_single(f"{old}.{leaf}", f"{new}.{leaf}", outputs, inputs))
    return entries


def _internlm2_layer(architecture: Architecture, old: str, new: str) -> list[TensorNames]:
    """InternLM2 as Llama: wqkv holds, per key/value head, its queries, then its key and value."""
    sizes = architecture.llm
    linears = sizes.linears()
    entries = [
        _single(f"{old}.attention_norm.weight", f"{new}.input_layernorm.weight", sizes.hidden),
        _single(f"{old}.ffn_norm.weight", f"{new}.post_attention_layernorm.weight", sizes.hidden),
        TensorNames(
            released=f"{old}.attention.wqkv.weight",
            shape=((sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim, sizes.hidden),
            native=tuple(f"{new}.self_attn.{name}_proj.weight" for name in "qkv"),
            split=GROUPS,
        ),
    ]
    for released, native in (
        ("attention.wo", "self_attn.o_proj"),
        ("feed_forward.w1", "mlp.gate_proj"),
        ("feed_forward.w3", "mlp.up_proj"),
        ("feed_forward.w2", "mlp.down_proj"),
    ):
        inputs, outputs = linears[native.rpartition(".")[2]]
        entries.append(
            _single(f"{old}.{released}.weight", f"{new}.{native}.weight", outputs, inputs)
        )
    return entries


def _single(released: str, native: str, *shape: int) -> TensorNames:
    return TensorNames(released=released, shape=shape, native=(native,))


def _linear(released: str, native: str, inputs: int, outputs: int) -> list[TensorNames]:
    """A linear layer with bias."""
    return [
        _single(f"{released}.weight", f"{native}.weight", outputs, inputs),
        _single(f"{released}.bias", f"{native}.bias", outputs),
    ]
