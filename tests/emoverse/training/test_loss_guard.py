"""The loss guard: which steps are skipped, and that a resumed run decides alike."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoverse.engine.step_types import check_finite
from emoverse.training.loss_guard import MIN_STEPS, WINDOW, LossGuard

INF = math.inf


def calm(guard: LossGuard, *, steps: int = MIN_STEPS, value: float = 1.0) -> None:
    for _ in range(steps):
        assert guard.check(value, value) is None


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_a_step_that_is_not_finite_is_never_used(value: float) -> None:
    assert check_finite(1.0, 1.0) is None
    for guard in (LossGuard(spike_factor=None), LossGuard(spike_factor=5.0)):
        assert guard.check(value, 1.0) == f"loss is not finite: {value}"
        assert guard.check(1.0, value) == f"gradient norm is not finite: {value}"


def test_a_spike_is_measured_by_the_median_of_what_was_used() -> None:
    guard = LossGuard(spike_factor=5.0)
    calm(guard, steps=MIN_STEPS - 1)
    assert guard.check(1.0, 4.9) is None  # one outlier does not move the median
    assert guard.check(5.0, 5.0) is None  # the factor itself is allowed
    for _ in range(3 * WINDOW):  # what was refused does not become usual
        assert str(guard.check(5.1, 1.0)).startswith("loss 5.1 is above train.spike_factor = 5 ")
        assert "gradient norm 6 is above" in str(guard.check(1.0, 6.0))


def test_the_first_steps_and_no_factor_know_no_spike() -> None:
    guard = LossGuard(spike_factor=5.0)
    calm(guard, steps=MIN_STEPS - 1)
    assert guard.check(1e3, 1e3) is None
    assert guard.check(1e3, 1.0) is not None
    unlimited = LossGuard(spike_factor=None)
    calm(unlimited, steps=2 * MIN_STEPS)
    assert unlimited.check(1e9, 1e9) is None


def test_old_steps_are_forgotten() -> None:
    """A loss that has fallen is measured by where it is now."""
    guard = LossGuard(spike_factor=5.0)
    calm(guard, steps=4 * WINDOW, value=100.0)
    calm(guard, steps=WINDOW // 2 + 1)
    assert guard.check(6.0, 1.0) is not None


@given(
    values=st.lists(st.floats(0, 10) | st.just(math.nan), max_size=3 * WINDOW),
    stop=st.integers(0, 3 * WINDOW),
)
def test_a_resumed_guard_decides_like_one_that_never_stopped(
    values: list[float], stop: int
) -> None:
    whole, part = LossGuard(spike_factor=1.5), LossGuard(spike_factor=1.5)
    reasons: list[str | None] = []
    for step, value in enumerate(values):
        if step == stop:
            state = json.loads(json.dumps(part.state()))
            part = LossGuard(spike_factor=1.5)
            part.load(state)
        reasons.append(whole.check(value, value))
        assert part.check(value, value) == reasons[-1]
        for guard in (whole, part):
            if reasons[-1] is not None:
                guard.skipped.append(step + 1)
    assert part.state() == whole.state()
