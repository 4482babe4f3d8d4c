"""The mask is the function it says: Philox bits, the asked rate, the same from every side."""

import pytest
import torch

from emoverse.kernels import dropout, reference
from emoverse.kernels.adapter_types import LoraInput
from emoverse.kernels.dropout import Dropout, _random_16_bits, draw_seed, keep_mask

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", [0, 1, 123456789012345, 2**62 - 1])
@pytest.mark.parametrize("stream", [0, 3])
def test_bits_are_those_of_philox(seed: int, stream: int) -> None:
    found = _random_16_bits(Dropout(0.5, seed, stream), 2, 3, 3, CPU).flatten(1).tolist()
    for row in range(3):
        expected = [reference.philox_16_bits(seed, stream, row + 2, column) for column in range(24)]
        assert found[row] == expected


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU draws a large mask block by block; columns need not come in eights."""
    mask = Dropout(0.4, 2**61 + 7, 1)
    whole = keep_mask(mask, 23, 21, CPU)
    assert whole.shape == (23, 21)
    for counters in (1, 7, 9):
        monkeypatch.setattr(dropout, "CPU_COUNTERS", counters)
        assert torch.equal(keep_mask(mask, 23, 21, CPU), whole)
    assert keep_mask(mask, 0, 21, CPU).shape == (0, 21)


def test_known_answer() -> None:
    """The published test vector of Philox 4x32 with 10 rounds, counter and key 0."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    halves = [reference.philox_16_bits(0, 0, 0, column, rounds=10) for column in range(8)]
    assert [low | high << 16 for low, high in zip(halves[::2], halves[1::2], strict=True)] == words


def test_rate_and_scale() -> None:
    mask = Dropout(0.05, 5, 0)
    keep = keep_mask(mask, 1000, 100, CPU)
    assert float(keep.float().mean()) == pytest.approx(0.95, abs=3e-3)
    assert mask.scale * (1 - mask.threshold / 65536) == pytest.approx(1.0, rel=1e-12)
    x = torch.randn(1000, 100)
    lora = LoraInput(x[:8], 2.0, mask)
    dropped = lora.drop(x)
    assert torch.equal(dropped != 0, keep) and torch.equal(dropped[keep], x[keep])
    assert lora.kept_scale == pytest.approx(2 / 0.95, rel=1e-4)


def test_masks_are_independent() -> None:
    """Neighbouring rows, columns, streams and seeds agree as often as chance says."""
    base = keep_mask(Dropout(0.5, 7, 0), 256, 256, CPU)
    others = [
        keep_mask(Dropout(0.5, 7, 1), 256, 256, CPU),
        keep_mask(Dropout(0.5, 8, 0), 256, 256, CPU),
        base.roll(1, 0),
        base.roll(1, 1),
    ]
    for other in others:
        assert float((base == other).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_no_dropout_is_no_copy() -> None:
    x = torch.randn(3, 4)
    assert all(LoraInput(x, 1.0, mask).drop(x) is x for mask in (None, Dropout(0.0, 1, 0)))


def test_seeds_follow_the_default_generator() -> None:
    torch.manual_seed(3)
    first = [draw_seed(), draw_seed()]
    torch.manual_seed(3)
    assert [draw_seed(), draw_seed()] == first
    assert first[0] != first[1]
