"""Adapters are merged in fp32; what does not fit the base is refused."""

import pytest
import torch

from emoverse.models.merge import Adapter, check_adapters, merged


def test_sums_are_fp32_arithmetic() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, generator=generator).bfloat16()
    a, b = torch.randn(2, 4, generator=generator), torch.randn(6, 2, generator=generator)
    tensors = {"x.lora_A.default.weight": a, "x.lora_B.default.weight": b}
    adapter = Adapter(tensors=tensors, scale=4.0, origin="stage1")
    assert merged("y.weight", weight, [adapter]) is weight
    twice = merged("x.weight", weight, [adapter, adapter])
    torch.testing.assert_close(twice, weight.float() + 8 * b @ a)
    whole = Adapter(tensors={"x.weight": torch.ones(6, 4)}, scale=4.0, origin="stage2")
    torch.testing.assert_close(merged("x.weight", weight, [whole, adapter]), 1 + 4 * b @ a)
    check_adapters([adapter, whole], {"x.weight": (6, 4)})
    for shapes in ({}, {"x.weight": (6, 5)}, {"x.weight": (5, 4)}):
        with pytest.raises(ValueError, match=r"stage1: x.lora_A.* must belong together"):
            check_adapters([adapter], shapes)
    alone = Adapter(tensors={"x.lora_A.default.weight": a}, scale=1.0, origin="torn")
    with pytest.raises(ValueError, match=r"torn: x.lora_A"):
        check_adapters([alone], {"x.weight": (6, 4)})
