"""The advice how often to save: the formula against a simulation, the measured costs, the text."""

import json
import random
from pathlib import Path

import pytest

from launch.save_advice import advice_text, best_interval_s, save_advice, waste


def simulated_waste(interval_s: float, save_s: float, failure_s: float) -> float:
    """Share of the time lost when failures come at random and unsaved work is done again."""
    rng, now, useful = random.Random(1), 0.0, 0.0
    failure = rng.expovariate(1 / failure_s)
    for _ in range(40_000):
        if now + interval_s + save_s <= failure:
            now, useful = now + interval_s + save_s, useful + interval_s
        else:
            now = failure
            failure += rng.expovariate(1 / failure_s)
    return 1 - useful / now


def test_the_best_interval_is_the_best_of_a_simulation() -> None:
    save_s, failure_s = 2.0, 3600.0
    best = best_interval_s(save_s, failure_s)
    assert best == pytest.approx(120)
    found = {factor: simulated_waste(best * factor, save_s, failure_s) for factor in (0.4, 1, 2.5)}
    assert found[1] == min(found.values())
    assert waste(best, save_s, failure_s) == pytest.approx(found[1], rel=0.1)


def test_nothing_is_promised_before_a_save_was_measured(tmp_path: Path) -> None:
    advice = save_advice(tmp_path, trainable=1_000_000, global_batch_size=8, save_every=500)
    assert advice["checkpoint_bytes"] == 12_000_000
    assert advice["measured"] is advice["best"] is advice["overhead"] is None
    assert "about 12.0 MB; after the first one is written, plan says" in advice_text(advice)


def test_the_advice_comes_from_what_was_measured(tmp_path: Path) -> None:
    records = [
        {"kind": "interval", "samples_per_s": 16.0},
        {"kind": "save", "seconds": 0.5},
        {"kind": "step", "loss": 1.0},
    ]
    path = tmp_path / "stage1" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "sa')
    advice = save_advice(tmp_path, trainable=1000, global_batch_size=8, save_every=500)
    assert advice["measured"] == {"save_s": 0.5, "step_s": 0.5}
    assert advice["overhead"] == pytest.approx(0.5 / 250.5)
    row = advice["best"][0]
    assert (row["failure_hours"], row["steps"]) == (6, 294)  # sqrt(2 * 0.5 * 21600) = 147 s
    text = advice_text(advice)
    assert "took 0.50 s, a step 0.50 s: save_every 500 costs 0.20%" in text
    assert "294 steps (2.4 min, 0.68% lost) at one per 6 h" in text
