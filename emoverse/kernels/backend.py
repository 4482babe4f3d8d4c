"""Which implementation the memory-bound operations run on: Triton kernels or plain torch.

In:  a setting for the process, and the tensors of a call. Out: triton or eager.
Both give the same numbers; plain torch runs on CPUs and on GPUs without Triton.
"""

import functools
import importlib.util
import os

from torch import Tensor

SETTINGS = ("auto", "eager", "triton")

_setting = "auto"


def configure_kernels(setting: str) -> None:
    """Choose for this process: auto (Triton on CUDA where installed), eager, or triton.

    Raises:
        ValueError: unknown setting; triton without the package.
    """
    global _setting
    if setting not in SETTINGS:
        raise ValueError(f"kernels must be one of {', '.join(SETTINGS)}, found {setting!r}")
    if setting == "triton" and not has_triton():
        raise ValueError("kernels are set to triton but it is not installed; pip install triton")
    _setting = setting


def use_triton(x: Tensor) -> bool:
    """Does this tensor's operation run as a Triton kernel?

    Callers import their module of `triton_ops` after this check: machines without a GPU may have no
    Triton.
    On a CPU only if set by name, and then TRITON_INTERPRET=1 must have been set before the first
    import.
    """
    if _setting == "auto":
        return x.is_cuda and has_triton()
    return _setting == "triton"


def kernel_backend(device_type: str) -> str:
    """For logs: triton, triton (interpreter) or eager."""
    chosen = _setting
    if chosen == "auto":
        chosen = "triton" if device_type == "cuda" and has_triton() else "eager"
    return "triton (interpreter)" if chosen == "triton" and is_interpreted() else chosen


def is_interpreted() -> bool:
    """Do Triton kernels run in its interpreter, on the CPU?"""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def has_triton() -> bool:
    """Is the package installed?"""
    return importlib.util.find_spec("triton") is not None
