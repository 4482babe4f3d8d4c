"""The mask is the function it says: Philox bits, the asked rate, the same from every side."""

import pytest
import torch

from emoverse.kernels import reference
from emoverse.kernels.dropout import Dropout, _random_16_bits, draw_seed, drop, keep_mask

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", [0, 1, 123456789012345, 2**62 - 1])
@pytest.mark.parametrize("stream", [0, 3])
def test_bits_are_those_of_philox(seed: int, stream: int) -> None:
    found = _random_16_bits(Dropout(0.5, seed, stream), 3, 21, CPU).tolist()
    for row in range(3):
        expected = [reference.philox_16_bits(seed, stream, row, column) for column in range(21)]
        assert found[row] == expected


def test_known_answer() -> None:
    """The published test vector of Philox 4x32 with 10 rounds, counter and key 0."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    halves = [reference.philox_16_bits(0, 0, 0, column, rounds=10) for column in range(8)]
    assert [low | high << 16 for low, high in zip(halves[::2], halves[1::2], strict=True)] == words


def test_rate_and_scale() -> None:
    dropout = Dropout(0.05, 5, 0)
    keep = keep_mask(dropout, 1000, 100, CPU)
    assert float(keep.float().mean()) == pytest.approx(0.95, abs=3e-3)
    assert dropout.scale * (1 - dropout.threshold / 65536) == pytest.approx(1.0, rel=1e-12)
    x = torch.randn(1000, 100)
    assert torch.equal(drop(x, dropout) != 0, keep)
    torch.testing.assert_close(drop(x, dropout)[keep], x[keep] / 0.95, rtol=1e-4, atol=0)


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
    assert drop(x, None) is x and drop(x, Dropout(0.0, 1, 0)) is x


def test_seeds_follow_the_default_generator() -> None:
    torch.manual_seed(3)
    first = [draw_seed(), draw_seed()]
    torch.manual_seed(3)
    assert [draw_seed(), draw_seed()] == first
    assert first[0] != first[1]
