"""Residual add + RMSNorm, with the input side of the adapters that read the normed values.

In:  the residual stream, optionally an update to add to it, the norm's weight, adapters' A.
Out: the new residual, the normed values y, 1/rms per token and S = scale * drop(y) A^T.
Backward recomputes y from the residual, so nobody stores it. Rounding as in transformers: the
normalised value is cast to the storage type before it is multiplied by the weight.
Legend: T tokens, D hidden, R ranks of all adapters on this input.
"""

from torch import Tensor

from emoverse.kernels.adapter_types import LoraInput, NormOutput, wide
from emoverse.kernels.backend import use_triton
from emoverse.kernels.lora import input_gradient, lora_input, weight_gradient


def add_norm_lora(
    x_TD: Tensor, update_TD: Tensor | None, weight_D: Tensor, eps: float, lora: LoraInput | None
) -> NormOutput:
    """residual = x + update; y = weight * residual / rms; S of y. `update` may be overwritten."""
    if use_triton(x_TD):
        from emoverse.kernels.triton_ops import norm as triton_norm

        return triton_norm.add_norm_lora(x_TD, update_TD, weight_D, eps, lora)
    residual_TD = x_TD if update_TD is None else update_TD.add_(x_TD)
    values = wide(residual_TD)
    rstd_T = values.square().mean(-1).add_(eps).rsqrt_()
    y_TD = _scale(residual_TD, rstd_T, weight_D)
    s_TR = None if lora is None else lora_input(y_TD, lora)
    return NormOutput(residual_TD, y_TD, rstd_T, s_TR)


def add_norm_lora_backward(
    grad_y_TD: Tensor,
    grad_residual_TD: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    lora: LoraInput | None,
    grad_s_TR: Tensor | None,
) -> Tensor:
    """Gradient of x (and of the update): through the norm, the adapters' A, and the residual.

    Args:
        saved: residual_TD, rstd_T and weight_D of the forward. `grad_y_TD` may be overwritten.
    """
    residual_TD, rstd_T, weight_D = saved
    if use_triton(grad_y_TD):
        from emoverse.kernels.triton_ops import norm as triton_norm

        return triton_norm.add_norm_lora_backward(
            grad_y_TD, grad_residual_TD, saved, lora, grad_s_TR
        )
    if lora is not None and grad_s_TR is not None:
        grad_y_TD = input_gradient(grad_y_TD, lora, grad_s_TR)
    normed = wide(residual_TD) * rstd_T[:, None]
    grad = wide(grad_y_TD) * wide(weight_D)
    along = (grad * normed).mean(-1, keepdim=True)
    grad = (grad - normed * along) * rstd_T[:, None] + wide(grad_residual_TD)
    return grad.to(residual_TD.dtype)


def norm_lora_grad_a(
    saved: tuple[Tensor, Tensor, Tensor], lora: LoraInput, grad_s_TR: Tensor
) -> Tensor:
    """Gradient of the adapters' A: R, D. `saved` as in the backward."""
    residual_TD, rstd_T, weight_D = saved
    if use_triton(residual_TD):
        from emoverse.kernels.triton_ops import norm as triton_norm

        return triton_norm.norm_lora_grad_a(saved, lora, grad_s_TR)
    return weight_gradient(_scale(residual_TD, rstd_T, weight_D), lora, grad_s_TR)


def _scale(residual_TD: Tensor, rstd_T: Tensor, weight_D: Tensor) -> Tensor:
    normed = (wide(residual_TD) * rstd_T[:, None]).to(residual_TD.dtype)
    return normed.mul_(weight_D)
