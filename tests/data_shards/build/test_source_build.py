"""`emoverse build`: stopped by a scheduler it ends with 75, and the same command resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_shards.build.build import build_shards
from data_shards.build.journal import work_folder
from data_shards.build.source_build import built_with_limits
from data_shards.shards.writer import pack_record
from data_shards.sources.synthetic import SyntheticOptions, make_record
from launch import cli

ROOT = Path(__file__).resolve().parents[3]


def words(out: Path, *, clips: int = 12) -> list[str]:
    return ["build", "synthetic", "--clips", str(clips), "--out", str(out), "--shard-records", "2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_its_processes_stops_it(
    tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *words(out, clips=60), "--workers", "2"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    done = work_folder(out) / "done"
    end = time.monotonic() + 60
    while time.monotonic() < end and not list(done.glob("*.json")):
        time.sleep(0.01)
    os.killpg(process.pid, number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75, told
    assert "stopped early, finished shards are kept; the same command resumes" in told
    assert not out.exists()
    assert cli.main([*words(out, clips=60), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == 60
    assert not work_folder(out).exists()


def test_a_finished_build_is_only_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    reports = []
    for _ in range(2):
        assert cli.main([*words(out), "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert [report["already_built"] for report in reports] == [False, True]
    assert reports[0]["fingerprint"] == reports[1]["fingerprint"]
    for change in ("--seed=1", "--shard-records=1", "--shard-records=9"):
        assert cli.main([*words(out), change]) == 2
        assert "output folder must be new or empty" in capsys.readouterr().err


def test_shards_that_were_cut_by_their_size_are_those_of_the_same_limits(tmp_path: Path) -> None:
    records = [make_record(SyntheticOptions(clips=9), index) for index in range(9)]
    limit = 2 * max(len(pack_record(record).blocks) for record in records)
    index = build_shards(
        records, tmp_path / "a", provenance={}, max_records_per_shard=8, max_bytes=limit
    )
    assert index.num_shards > 1 and max(info.records for info in index.shards) < 8
    assert built_with_limits(index, 8, limit) and built_with_limits(index, 9, limit)
    assert not built_with_limits(index, 8, 2 * limit) and not built_with_limits(index, 1, limit)
