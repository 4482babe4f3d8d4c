"""Keyed permutations: bijective, invertible, well mixed, and for ever the same."""

from collections import Counter
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.plan.permutation import Permutation, derive_key, mix64

keys = st.integers(0, 2**64 - 1)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 1500), keys)
def test_table_is_a_permutation_and_agrees_with_the_points(size: int, key: int) -> None:
    permutation = Permutation(size, key)
    table = permutation.table()
    assert np.array_equal(np.sort(table), np.arange(size))
    for point in range(0, size, max(1, size // 40)):
        assert permutation(point) == table[point]
        assert permutation.inverse(permutation(point)) == point


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2**61), keys, st.data())
def test_large_permutations_are_invertible(size: int, key: int, data: st.DataObject) -> None:
    point = data.draw(st.integers(0, size - 1))
    permutation = Permutation(size, key)
    assert 0 <= permutation(point) < size
    assert permutation.inverse(permutation(point)) == point


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_permutations_are_equally_likely(size: int) -> None:
    draws = 2_000
    found = Counter(tuple(Permutation(size, derive_key(s)).table()) for s in range(draws))
    expected = draws / factorial(size)
    chi2 = sum((found[key] - expected) ** 2 / expected for key in found)
    chi2 += expected * (factorial(size) - len(found))
    freedom = factorial(size) - 1
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


def test_neighbours_are_torn_apart() -> None:
    """Against chance at n = 20,000: correlations of index and image, of neighbours, mean step."""
    size = 20_000
    chance = size**-0.5
    index = np.arange(size)
    whole, lag, step = [], [], []
    for seed in range(20):
        image = Permutation(size, derive_key(seed)).table()
        whole.append(np.corrcoef(index, image)[0, 1])
        lag.append(np.corrcoef(image[1:], image[:-1])[0, 1])
        step.append(np.abs(np.diff(image)).mean() / size)
    assert np.abs(whole).max() < 4.5 * chance and np.std(whole) < 1.6 * chance
    assert np.abs(lag).max() < 4.5 * chance and np.std(lag) < 1.6 * chance
    assert abs(np.mean(step) - 1 / 3) < 0.003


def test_another_key_is_another_permutation() -> None:
    first, second = (Permutation(1_000, derive_key(0, "x", n)).table() for n in (1, 2))
    assert (first == second).sum() < 10  # one in expectation


def test_mixing_of_words_and_arrays_agrees() -> None:
    words = [0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]
    assert mix64(np.array(words, dtype=np.uint64)).tolist() == [mix64(word) for word in words]
    flips = [(mix64(5) ^ mix64(5 ^ 1 << bit)).bit_count() for bit in range(64)]
    assert min(flips) >= 16 and max(flips) <= 48


def test_keys_and_permutations_never_change() -> None:
    assert derive_key(7, "stage1", 0) == GOLDEN_KEY
    assert Permutation(10, GOLDEN_KEY).table().tolist() == GOLDEN_TEN
    assert [Permutation(10**12, GOLDEN_KEY)(n) for n in range(3)] == GOLDEN_LARGE
    assert derive_key(7, "stage1", 0) != derive_key(7, "stage10")


GOLDEN_KEY = 16294878639983853704
GOLDEN_TEN = [0, 5, 9, 6, 7, 1, 4, 3, 8, 2]
GOLDEN_LARGE = [640477630123, 56818739371, 339258374789]
