"""Texts about long jobs."""

import pytest

from data_shards.progress import format_duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (245, "4m05s"), (11520, "3h12m")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
