"""The page of records: complete, safe with any text, and its decisions begin where they stopped."""

import functools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_shards.build.build import BuildOptions, build_shards, extract_frames
from data_shards.build.curation import Decision, write_curation
from data_shards.inspection.preview_page import write_page
from data_shards.media.video import encode_mp4
from data_shards.shards.record import Record, Turn, Video
from data_shards.tasks import Pair, Task
from launch import cli


@functools.cache
def clip() -> bytes:
    rng = np.random.default_rng(0)
    return encode_mp4(rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8), fps=8)


def make_record(index: int = 0) -> Record:
    return Record(
        key=f"clip-{index}",
        source="test",
        split="train",
        utterance="</script><b>Well & so</b>",
        speaker="Ann",
        conversation=(Turn(speaker="Ann", text="</script><b>Well & so</b>"),),
        target=1,
        emotion="joy",
        pairs=(Pair(1, "joy", 1),),
        expressions=("Jaw Drop",),
        peak_frame=2,
        tasks=(Task.ER, Task.FER, Task.ECPE),
        num_frames=6,
        notes={"identity": 7},
        media=Video(mp4=clip()),
    )


def test_a_page_shows_all_of_a_record(tmp_path: Path) -> None:
    page, keys = write_page([make_record()], tmp_path / "p", title="corpus")
    text = page.read_text()
    assert keys == ["clip-0"]
    assert (tmp_path / "p" / "media" / "clip-0.mp4").read_bytes() == clip()
    assert 'src="media/clip-0.mp4"' in text and "identity=7" in text
    for word in ("Happy.", "Jaw Drop", "1_joy,1", "&lt;emotion&gt;", "Peak frame 2"):
        assert word in text
    assert "<b>Well" not in text  # no text of the data becomes markup
    assert len(re.findall("</script>", text)) == 2
    assert not re.findall(r'(?:src|href)="(?!media/|data:,|#)', text)  # nothing from elsewhere


def test_extracted_frames_are_pictures(tmp_path: Path) -> None:
    record = extract_frames(make_record(), 2, 28, 90)
    page, _ = write_page([record], tmp_path / "p", title="corpus")
    assert page.read_text().count("<img ") == 3
    assert len(list((tmp_path / "p" / "media").iterdir())) == 3


def test_only_an_earlier_page_is_written_over(tmp_path: Path) -> None:
    write_page([make_record()], tmp_path / "p", title="corpus")
    write_page([make_record()], tmp_path / "p", title="corpus")
    (tmp_path / "p" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"new, empty or an earlier page; .* contains other files"):
        write_page([make_record()], tmp_path / "p", title="corpus")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [make_record(n) for n in range(4)]
    records[1] = replace(records[1], tasks=(Task.ER,))
    build_shards(records, tmp_path / "s", provenance={}, options=BuildOptions())
    fear = Decision(key="clip-2", action="correct", field="emotion", value="fear")
    write_curation(tmp_path / "c.jsonl", [fear, Decision(key="clip-9", action="drop")])
    words = ["preview", str(tmp_path / "s"), "--page", str(tmp_path / "p"), "-n", "2"]
    words += ["--task", "fer", "--curation", str(tmp_path / "c.jsonl")]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'p' / 'index.html'}: 2 records\n"
    text = (tmp_path / "p" / "index.html").read_text()
    data = re.search(r'id="data">(.*?)</script>', text)
    assert data is not None
    assert json.loads(data[1])["before"] == {"clip-2": [fear.to_json()]}
    assert cli.main([*words[:-5], "0"]) == 2
