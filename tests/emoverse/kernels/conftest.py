"""Both backends of the memory-bound operations, float64 references, and bounds for each type.

On a GPU the compiled kernels are tested, elsewhere Triton's interpreter runs them (see the top
conftest).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from emoverse.kernels.backend import configure_kernels, has_triton
from emoverse.kernels.dropout import Dropout, keep_mask

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Relative to the norm of the reference. Half precision: inputs are exact, results and intermediate
# values that are stored (normed values, S) are rounded; the interpreter truncates to bf16.
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = sorted(BOUNDS, key=str)


@pytest.fixture(params=["eager", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "triton" and not has_triton():
        pytest.skip("triton is not installed")
    configure_kernels(request.param)
    yield request.param
    configure_kernels("auto")


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=[0.0, 0.05])
def dropout(request: pytest.FixtureRequest) -> Dropout | None:
    return Dropout(request.param, 987654321098765, 2) if request.param else None


class Values:
    """Random tensors that the type can hold, each with its float64 copy."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def make(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> tuple[Tensor, Tensor]:
        values = torch.randn(shape, generator=self.generator) * scale + offset
        values = values.to(DEVICE, self.dtype)
        return values, values.double().requires_grad_()

    def gapped(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Not contiguous: every second column of a wider tensor."""
        wide, _ = self.make(*shape[:-1], 2 * shape[-1])
        values = wide[..., ::2]
        assert not values.is_contiguous()
        return values, values.double().requires_grad_()


@pytest.fixture
def values(dtype: torch.dtype) -> Values:
    return Values(dtype)


def close(found: Tensor, wanted: Tensor, times: float = 1.0) -> None:
    """Within the bound of found's type; `times` it in half precision, where roundings add up."""
    assert found.shape == wanted.shape
    wanted = wanted.detach()
    error = float((found.detach().double() - wanted).norm() / wanted.norm().clamp_min(1e-30))
    half = found.dtype != torch.float32
    assert error <= (times if half else 1.0) * BOUNDS[found.dtype], error


@pytest.fixture
def assert_close() -> Callable[..., None]:
    return close


@pytest.fixture
def keep_factors() -> Callable[[Dropout | None, int, int], Tensor]:
    """0 or 1 / (1 - p), float64."""

    def make(dropout: Dropout | None, rows: int, columns: int) -> Tensor:
        if dropout is None:
            return torch.ones(rows, columns, dtype=torch.float64, device=DEVICE)
        mask = keep_mask(dropout, rows, columns, DEVICE)
        return mask.double() * dropout.scale

    return make


@pytest.fixture
def borders() -> Callable[[Sequence[int]], Tensor]:
    return lambda lengths: torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
