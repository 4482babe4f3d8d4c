"""Lean decoder layers: those of Phi-3 and Llama with another forward for packed training.

In:  the native language model with its adapters (adapters.py). Out: the same layers, parameters and
names. The forward of a packed batch reads frozen weights and LoRA parameters by
`adapters.read_linear` and computes with kernels/layer.py, which uses kernels/lora.py; it keeps
about 0.4 of the activations of transformers + PEFT. Anything else (generation, padded batches)
takes transformers' own forward.
The parameters are read without calling the submodules: ZeRO-3 gathers them when they are first
read, and from then on together with the layer.
Legend: T packed tokens, D hidden size, N heads, H head dim.
"""

from typing import Any, cast

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from emoverse.kernels.adapter_types import Linears
from emoverse.kernels.attention import check_window, varlen_attention
from emoverse.kernels.dropout import draw_seed
from emoverse.kernels.layer import LayerSettings, Rotary, after_attention, before_attention
from emoverse.models.adapters import LinearParameters, read_linear

SETTINGS = ("auto", "on", "off")


DecoderLayer = Phi3DecoderLayer | LlamaDecoderLayer


class _LeanForward(nn.Module):
    """The first base class of a lean layer; the second one's forward is transformers' own."""

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
        layer = cast(DecoderLayer, self)
        attention = layer.self_attn
        config: Any = attention.config
        check_window(max_length_q, getattr(config, "sliding_window", None))
        groups = [read_group(modules, self.training) for modules in _groups_of(layer)]
        settings = LayerSettings(
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            eps=layer.input_layernorm.variance_epsilon,
            scale=max(adapter.scale for _, adapter in groups),
            p=max(adapter.p for _, adapter in groups),
            seed=0,
        )
        if settings.p > 0:
            settings = settings._replace(seed=draw_seed())
        qkv, output, gate_up, down = (linears for linears, _ in groups)
        cos_1TH, sin_1TH = position_embeddings
        q, k, v, residual_TD = before_attention(
            hidden_states.squeeze(0),
            layer.input_layernorm.weight,
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
            layer.post_attention_layernorm.weight,
            (output, gate_up, down),
            settings,
        )
        return result_TD.unsqueeze(0)


class LeanPhi3Layer(_LeanForward, Phi3DecoderLayer):
    """Phi-3: fused qkv and gate_up."""


class LeanLlamaLayer(_LeanForward, LlamaDecoderLayer):
    """Llama, which InternLM2.5 runs as: separate q, k, v and gate, up."""


KINDS: dict[type, type[_LeanForward]] = {
    Phi3DecoderLayer: LeanPhi3Layer,
    LlamaDecoderLayer: LeanLlamaLayer,
}


def make_lean(language_model: nn.Module, setting: str) -> bool:
    """Replace the decoder layers by lean ones, in place; auto does so wherever it is possible.

    Returns:
        True if the layers are lean now.
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
    layers = _layers(language_model)
    for index, layer in enumerate(layers):
        layers[index] = _lean_copy(layer)
    return True


def is_lean(language_model: nn.Module) -> bool:
    """Does the model have lean layers?"""
    return any(isinstance(layer, _LeanForward) for layer in _layers(language_model))


def _layers(language_model: nn.Module) -> nn.ModuleList:
    layers = language_model.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def _lean_copy(layer: nn.Module) -> nn.Module:
    """A lean layer around the same submodules; the old one is no longer used."""
    kind = KINDS[type(layer)]
    lean: nn.Module = object.__new__(kind)
    nn.Module.__init__(lean)
    lean.__dict__.update(layer.__dict__)
    return lean


def _groups_of(layer: DecoderLayer) -> list[list[nn.Module]]:
    """The linears, grouped by the input that they share: qkv, output, gate and up, down."""
    if isinstance(layer, Phi3DecoderLayer):
        fused = layer.self_attn
        return [
            [fused.qkv_proj],
            [fused.o_proj],
            [layer.mlp.gate_up_proj],
            [layer.mlp.down_proj],
        ]
    attention, mlp = layer.self_attn, layer.mlp
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]


def read_group(modules: list[nn.Module], training: bool) -> tuple[Linears, LinearParameters]:
    """The parameters of linears that share an input, and the one of them that has an adapter."""
    read = [read_linear(module, training) for module in modules]
    linears = Linears(
        tuple(linear.weight for linear in read),
        tuple(linear.a for linear in read),
        tuple(linear.b for linear in read),
    )
    return linears, max(read, key=lambda linear: linear.scale)


def _unsupported(language_model: nn.Module) -> str:
    """Why lean layers cannot train this model; empty if they can."""
    config: Any = language_model.config
    for layer in _layers(language_model):
        if type(layer) not in KINDS:
            return f"the layers are of type {type(layer).__name__}"
        assert isinstance(layer, DecoderLayer)
        linears = [read_linear(module, True) for group in _groups_of(layer) for module in group]
        for name, value in layer.named_parameters():
            if value.requires_grad and ".lora_" not in name:
                return f"the base weight {name} is trained"
            if name.endswith("bias"):
                return f"the linears have biases ({name})"
        adapted = {(linear.scale, linear.p) for linear in linears if linear.a is not None}
        if len(adapted) > 1:
            return "adapters of one layer differ in scale or dropout"
        if not all(linear.plain for linear in linears):
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
