"""SwiGLU and the input side of the adapter of the down projection; backward recomputes.

In:  gate and up side by side, as the fused projection makes them. Out: silu(gate) * up and
S = scale * drop(silu(gate) * up) A^T. Nothing but gate and up is kept for backward.
Legend: T tokens, F MLP width, R ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from emoverse.kernels.adapter_types import LoraInput, wide
from emoverse.kernels.backend import use_triton
from emoverse.kernels.lora import input_gradient, lora_input, weight_gradient


def swiglu_lora(gate_up_TF2: Tensor, lora: LoraInput | None) -> tuple[Tensor, Tensor | None]:
    """Activations T, F and S (None without an adapter)."""
    if use_triton(gate_up_TF2):
        from emoverse.kernels.triton_ops import swiglu as triton_swiglu

        return triton_swiglu.swiglu_lora(gate_up_TF2, lora)
    act_TF = _activate(gate_up_TF2)
    return act_TF, None if lora is None else lora_input(act_TF, lora)


def swiglu_lora_backward(
    grad_act_TF: Tensor, gate_up_TF2: Tensor, lora: LoraInput | None, grad_s_TR: Tensor | None
) -> Tensor:
    """Gradient of gate and up, side by side. `grad_act_TF` may be overwritten."""
    if use_triton(grad_act_TF):
        from emoverse.kernels.triton_ops import swiglu as triton_swiglu

        return triton_swiglu.swiglu_lora_backward(grad_act_TF, gate_up_TF2, lora, grad_s_TR)
    if lora is not None and grad_s_TR is not None:
        grad_act_TF = input_gradient(grad_act_TF, lora, grad_s_TR)
    gate, up = wide(gate_up_TF2).chunk(2, dim=-1)
    grad = wide(grad_act_TF)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    return torch.cat((grad_gate, grad * silu), dim=-1).to(gate_up_TF2.dtype)


def swiglu_lora_grad_a(gate_up_TF2: Tensor, lora: LoraInput, grad_s_TR: Tensor) -> Tensor:
    """Gradient of the adapter's A: R, F."""
    if use_triton(gate_up_TF2):
        from emoverse.kernels.triton_ops import swiglu as triton_swiglu

        return triton_swiglu.swiglu_lora_grad_a(gate_up_TF2, lora, grad_s_TR)
    return weight_gradient(_activate(gate_up_TF2), lora, grad_s_TR)


def _activate(gate_up_TF2: Tensor) -> Tensor:
    gate, up = wide(gate_up_TF2).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up_TF2.dtype)
