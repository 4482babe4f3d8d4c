"""Bad numbers: what is refused, what counts as usual, and that a resumed run judges alike."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoverse.training.loss_guard import LEAST, WINDOW, Guard, finite

INF = math.inf


def calm(guard: Guard, *, steps: int = LEAST, value: float = 1.0) -> None:
    for _ in range(steps):
        assert guard.judge(value, value) is None


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_what_is_not_finite_is_never_used(value: float) -> None:
    assert finite(1.0, 1.0) is None
    for guard in (Guard(spike_factor=None), Guard(spike_factor=5.0)):
        assert guard.judge(value, 1.0) == f"loss is not finite: {value}"
        assert guard.judge(1.0, value) == f"gradient norm is not finite: {value}"


def test_a_spike_is_measured_by_the_median_of_what_was_used() -> None:
    guard = Guard(spike_factor=5.0)
    calm(guard, steps=LEAST - 1)
    assert guard.judge(1.0, 4.9) is None  # one odd value moves no median
    assert guard.judge(5.0, 5.0) is None  # the factor itself is allowed
    for _ in range(3 * WINDOW):  # what was refused does not become usual
        assert str(guard.judge(5.1, 1.0)).startswith("loss 5.1 is above train.spike_factor = 5 ")
        assert "gradient norm 6 is above" in str(guard.judge(1.0, 6.0))


def test_the_first_steps_and_no_factor_know_no_spike() -> None:
    guard = Guard(spike_factor=5.0)
    calm(guard, steps=LEAST - 1)
    assert guard.judge(1e3, 1e3) is None
    assert guard.judge(1e3, 1.0) is not None
    unlimited = Guard(spike_factor=None)
    calm(unlimited, steps=2 * LEAST)
    assert unlimited.judge(1e9, 1e9) is None


def test_old_steps_are_forgotten() -> None:
    """A loss that has fallen is measured by where it is now."""
    guard = Guard(spike_factor=5.0)
    calm(guard, steps=4 * WINDOW, value=100.0)
    calm(guard, steps=WINDOW // 2 + 1)
    assert guard.judge(6.0, 1.0) is not None


@given(
    values=st.lists(st.floats(0, 10) | st.just(math.nan), max_size=3 * WINDOW),
    stop=st.integers(0, 3 * WINDOW),
)
def test_a_resumed_guard_judges_like_one_that_never_stopped(values: list[float], stop: int) -> None:
    whole, part = Guard(spike_factor=1.5), Guard(spike_factor=1.5)
    verdicts: list[str | None] = []
    for step, value in enumerate(values):
        if step == stop:
            state = json.loads(json.dumps(part.state()))
            part = Guard(spike_factor=1.5)
            part.load(state)
        verdicts.append(whole.judge(value, value))
        assert part.judge(value, value) == verdicts[-1]
        for guard in (whole, part):
            if verdicts[-1] is not None:
                guard.skipped.append(step + 1)
    assert part.state() == whole.state()
