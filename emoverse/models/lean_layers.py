"""Lean decoder layers: Phi-3's and Llama's own, with another forward for packed training.

In:  the native language model with its adapters. Out: the same layers, parameters and names; the
forward of a packed batch runs through emoverse.kernels.layer and keeps about 0.4 of the activations
of transformers + PEFT. Anything else (generation, padded batches) takes transformers' own forward.
The submodules' parameters are read without calling these: ZeRO-3 gathers them when they are first
read, and from then on together with the layer.
"""

from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from emoverse.kernels.attention import check_window, varlen_attention
from emoverse.kernels.dropout import draw_seed
from emoverse.kernels.layer import LayerSettings, Rotary, after_attention, before_attention
from emoverse.kernels.types import Linears
from emoverse.models.adapters import AdapterParts, read_linear

SETTINGS = ("auto", "on", "off")


class _LeanForward(nn.Module):
    """Put before a transformers layer in the order of resolution: its forward is the plain path."""

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """1, T, D in and out."""
        if cu_seq_lens_q is None or past_key_values is not None:
            out: Tensor = super().forward(
                hidden_states,
                *args,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                cu_seq_lens_q=cu_seq_lens_q,
                max_length_q=max_length_q,
                **kwargs,
            )
            return out
        assert position_embeddings is not None and max_length_q is not None
        assert hidden_states.shape[0] == 1, "packed batches have one row"
        attention = self.self_attn
        check_window(max_length_q, getattr(attention.config, "sliding_window", None))
        groups = [read_group(modules, self.training) for modules in _groups_of(self)]
        settings = LayerSettings(
            heads=attention.config.num_attention_heads,
            kv_heads=attention.config.num_key_value_heads,
            eps=self.input_layernorm.variance_epsilon,
            scale=max(parts.scale for _, parts in groups),
            p=max(parts.p for _, parts in groups),
            seed=0,
        )
        if settings.p > 0:
            settings = settings._replace(seed=draw_seed())
        (qkv, _), *rest = groups
        cos_1TH, sin_1TH = position_embeddings
        q, k, v, residual_TD = before_attention(
            hidden_states.squeeze(0),
            self.input_layernorm.weight,
            Rotary(cos_1TH.squeeze(0), sin_1TH.squeeze(0)),
            qkv,
            settings,
        )
        attended_TNH = varlen_attention(
            *(q, k, v, cu_seq_lens_q, max_length_q), causal=True, scale=attention.scaling
        )
        result_TD = after_attention(
            attended_TNH.flatten(1),
            residual_TD,
            self.post_attention_layernorm.weight,
            (rest[0][0], rest[1][0], rest[2][0]),
            settings,
        )
        return result_TD.unsqueeze(0)


class LeanPhi3Layer(_LeanForward, Phi3DecoderLayer):
    """Phi-3: fused qkv and gate_up."""


class LeanLlamaLayer(_LeanForward, LlamaDecoderLayer):
    """Llama, which InternLM2.5 runs as: separate q, k, v and gate, up."""


KINDS = {Phi3DecoderLayer: LeanPhi3Layer, LlamaDecoderLayer: LeanLlamaLayer}


def make_lean(language_model: nn.Module, setting: str) -> bool:
    """Replace the decoder layers by lean ones, in place; auto does so wherever it is possible.

    Returns:
        Are they lean now?
    Raises:
        ValueError: unknown setting; `on` for a model that lean layers cannot train.
    """
    if setting not in SETTINGS:
        raise ValueError(f"model.lean must be one of {', '.join(SETTINGS)}, found {setting!r}")
    if setting == "off":
        return False
    reason = _unsupported(language_model)
    if reason:
        if setting == "on":
            raise ValueError(
                f"model.lean is on, but {reason}; set model.lean to auto, which then trains "
                "through transformers' own layers"
            )
        return False
    layers = language_model.layers
    for number, layer in enumerate(layers):
        layers[number] = _adopt(layer)
    return True


def is_lean(language_model: nn.Module) -> bool:
    """Does the model have lean layers?"""
    return any(isinstance(layer, _LeanForward) for layer in language_model.layers)


def _adopt(layer: nn.Module) -> nn.Module:
    """A lean layer around the same submodules; the old one is not used any more."""
    kind = KINDS[type(layer)]
    lean = kind.__new__(kind)
    nn.Module.__init__(lean)
    lean.__dict__.update(layer.__dict__)
    return lean


def _groups_of(layer: nn.Module) -> list[list[nn.Module]]:
    """The linears by the input that they share: qkv, output, gate and up, down."""
    attention, mlp = layer.self_attn, layer.mlp
    if isinstance(layer, Phi3DecoderLayer):
        return [
            [attention.qkv_proj],
            [attention.o_proj],
            [mlp.gate_up_proj],
            [mlp.down_proj],
        ]
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]


def read_group(modules: list[nn.Module], training: bool) -> tuple[Linears, AdapterParts]:
    """The parameters of linears that share an input; scale and dropout of their adapters."""
    parts = [read_linear(module, training) for module in modules]
    linears = Linears(
        tuple(part.weight for part in parts),
        tuple(part.a for part in parts),
        tuple(part.b for part in parts),
    )
    return linears, max(parts, key=lambda part: part.scale)


def _unsupported(language_model: nn.Module) -> str:
    """Why lean layers cannot train this model; empty if they can."""
    config = language_model.config
    for layer in language_model.layers:
        if type(layer) not in KINDS:
            return f"the layers are of type {type(layer).__name__}"
        parts = [read_linear(module, True) for group in _groups_of(layer) for module in group]
        for name, value in layer.named_parameters():
            if value.requires_grad and ".lora_" not in name:
                return f"the base weight {name} is trained"
            if name.endswith("bias"):
                return f"the linears have biases ({name})"
        adapted = {(part.scale, part.p) for part in parts if part.a is not None}
        if len(adapted) > 1:
            return "adapters of one layer differ in scale or dropout"
        if not all(part.plain for part in parts):
            return "adapters are not plain LoRA"
        if (
            layer.input_layernorm.variance_epsilon
            != layer.post_attention_layernorm.variance_epsilon
        ):
            return "the two norms of a layer differ in eps"
    if config.hidden_act != "silu":
        return f"the activation is {config.hidden_act}"
    dropouts = [getattr(config, key, 0.0) for key in ("attention_dropout", "resid_pdrop")]
    if any(dropouts):
        return f"the model has dropout of its own ({dropouts})"
    if float(config.rope_parameters.get("partial_rotary_factor", 1.0)) != 1.0:
        return "only a part of each head is rotated"
    return ""
