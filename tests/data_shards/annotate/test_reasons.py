"""Reasons from two models: what is asked, what is kept, and a run that is killed and goes on."""

import base64
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_shards.annotate.answer_cache import AnswerCache
from data_shards.annotate.endpoint import Endpoint, Patience
from data_shards.annotate.reasons import (
    PROMPT_VERSION,
    ReasonOptions,
    annotate_reasons,
    describe_messages,
    infer_messages,
)
from data_shards.build.build import build_shards
from data_shards.jsonl import read_texts
from data_shards.media.pixels import jpeg_decode
from data_shards.shards.record import Record, Video
from data_shards.tasks import Task
from launch import cli
from tests.builders import make_clip, make_record

CLIPS = 6
PATIENCE = Patience(timeout_s=1.0, attempts=3, first_pause_s=0.01)


def word_record(number: int) -> Record:
    return make_record(
        number,
        utterance=f"Word {number}.",
        emotion=None if number == 3 else "joy",
        tasks=(Task.MSA,),
        num_frames=9,
        media=Video(mp4=make_clip(number, frames=9)),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "shards"
    build_shards([word_record(n) for n in range(CLIPS)], path, provenance={})
    return path


def options(url: str, **changes: Any) -> ReasonOptions:
    base = ReasonOptions(
        describe=Endpoint(base_url=url, model="eyes"),
        infer=Endpoint(base_url=url, model="head"),
        patience=PATIENCE,
        size=28,
        concurrency=2,
    )
    return replace(base, **changes)


def echo(body: dict[str, Any]) -> str:
    """What both models answer: the vision model counts, the text model repeats the words."""
    if body["model"] == "eyes":
        return f"A person\n smiles in {len(body['messages'][0]['content']) - 1} frames."
    question = body["messages"][1]["content"]
    said = question.partition("The person says: ")[2].partition("\n")[0]
    return f"The smile and '{said}'\n\nshow joy."


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_calls_per_clip_and_a_row_of_both(
    chat_server: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    server = chat_server(echo)
    report = annotate_reasons(folder, tmp_path / "r.jsonl", options(server.url))
    assert report["ok"] and report["reasons"] == CLIPS - 1 and report["asked"] == 2 * (CLIPS - 1)
    assert report["without_emotion"] == 1 and report["failed"] == {}
    found = rows(tmp_path / "r.jsonl")
    assert [row["key"] for row in found] == [f"clip-{n}" for n in range(CLIPS) if n != 3]
    assert found[1] == {
        "key": "clip-1",
        "emotion": "joy",
        "reason": "The smile and 'Word 1.' show joy.",
        "reason_model": "head",
        "description": "A person smiles in 8 frames.",
        "description_model": "eyes",
        "prompt_version": PROMPT_VERSION,
    }
    seen = [r.body for r in server.requests if r.body["model"] == "eyes"]
    part = seen[0]["messages"][0]["content"][0]
    head, _, data = part["image_url"]["url"].partition(",")
    assert (part["type"], head) == ("image_url", "data:image/jpeg;base64")
    assert jpeg_decode(base64.b64decode(data)).shape == (28, 28, 3)
    asked = next(r.body for r in server.requests if r.body["model"] == "head")
    text = asked["messages"][1]["content"]
    assert "A person smiles in 8 frames." in text and "emotion is known: joy" in text


def test_concurrency_is_bounded_and_used(
    chat_server: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    server = chat_server(lambda body: (time.sleep(0.03), echo(body))[1])
    annotate_reasons(folder, tmp_path / "r.jsonl", options(server.url, concurrency=3))
    assert server.most_at_once == 3


def test_answers_are_asked_for_once(
    chat_server: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    server = chat_server(echo)
    first = annotate_reasons(folder, tmp_path / "r.jsonl", options(server.url))
    before = (tmp_path / "r.jsonl").read_bytes()
    again = annotate_reasons(folder, tmp_path / "r.jsonl", options(server.url))
    assert (again["asked"], again["from_cache"]) == (0, first["asked"])
    assert (tmp_path / "r.jsonl").read_bytes() == before
    other = replace(options(server.url), infer=Endpoint(base_url=server.url, model="head2"))
    assert annotate_reasons(folder, tmp_path / "r.jsonl", other)["asked"] == CLIPS - 1


def test_a_server_that_misbehaves_costs_time_and_nothing_else(
    chat_server: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    faults = ["429", "500", "malformed", "drop", "half", "empty", "trickle"]
    count = 0

    def answer(body: dict[str, Any]) -> str:
        nonlocal count
        count += 1
        return f"!{faults[count // 2 % len(faults)]}" if count % 2 else echo(body)

    patience = replace(PATIENCE, attempts=8)
    server = chat_server(answer)
    report = annotate_reasons(
        folder, tmp_path / "r.jsonl", options(server.url, patience=patience, concurrency=1)
    )
    assert report["ok"] and report["reasons"] == CLIPS - 1
    assert len(server.requests) > 2 * (CLIPS - 1)
    calm = chat_server(echo)
    annotate_reasons(folder, tmp_path / "calm.jsonl", options(calm.url))
    assert (tmp_path / "r.jsonl").read_bytes() == (tmp_path / "calm.jsonl").read_bytes()


def test_a_clip_that_fails_is_named_and_asked_for_again(
    chat_server: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    broken = True

    def answer(body: dict[str, Any]) -> str:
        if broken and body["model"] == "head" and "Word 2." in body["messages"][1]["content"]:
            return "!400"
        return echo(body)

    server = chat_server(answer)
    report = annotate_reasons(folder, tmp_path / "r.jsonl", options(server.url))
    assert not report["ok"] and list(report["failed"]) == ["clip-2"]
    assert "400 from" in report["failed"]["clip-2"] and len(rows(tmp_path / "r.jsonl")) == 4
    broken = False
    report = annotate_reasons(folder, tmp_path / "r.jsonl", options(server.url))
    assert report["ok"] and report["asked"] == 1 and len(rows(tmp_path / "r.jsonl")) == 5


def test_a_server_that_is_gone_ends_the_run_early(unused_url: str, tmp_path: Path) -> None:
    many = [replace(word_record(0), key=f"clip-{n}") for n in range(60)]
    build_shards(many, tmp_path / "shards", provenance={})
    quick = replace(PATIENCE, attempts=1)
    report = annotate_reasons(
        tmp_path / "shards", tmp_path / "r.jsonl", options(unused_url, patience=quick)
    )
    assert report["gave_up"] and 20 <= len(report["failed"]) < 25


def test_wrong_settings_end_the_run_and_keep_the_last_result(
    chat_server: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r.jsonl"
    out.write_text("before\n")
    with pytest.raises(ValueError, match="401 from"):
        annotate_reasons(folder, out, options(chat_server(lambda body: "!401").url))
    assert out.read_text() == "before\n"


def run_and_exit(folder: Path, out: Path, url: str) -> None:
    annotate_reasons(folder, out, options(url, concurrency=1))
    os._exit(0)


def test_a_killed_run_goes_on_where_it_stopped(
    chat_server: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    server = chat_server(lambda body: (time.sleep(0.05), echo(body))[1])
    out = tmp_path / "r.jsonl"
    child = multiprocessing.get_context("fork").Process(
        target=run_and_exit, args=(folder, out, server.url)
    )
    child.start()
    end = time.monotonic() + 20
    while len(server.requests) < 5 and time.monotonic() < end:
        time.sleep(0.005)
    child.kill()
    child.join()
    assert not out.exists()
    answered = len((tmp_path / "r.jsonl.answers").read_bytes().splitlines())
    assert 3 <= answered < 2 * (CLIPS - 1)
    report = annotate_reasons(folder, out, options(server.url))
    assert report["from_cache"] == answered and report["asked"] == 2 * (CLIPS - 1) - answered
    assert len(rows(out)) == CLIPS - 1


def test_ready_texts_need_no_server(folder: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready.jsonl"
    ready.write_text(
        '{"key": "clip-0", "reason": "Her  smile\\nsays it."}\n{"key": "x", "reason": "y"}'
    )
    done = annotate_reasons(
        folder, tmp_path / "r.jsonl", ReasonOptions(reasons=read_texts(ready, "reason"))
    )
    assert done["reasons"] == 1 and done["unknown_keys"] == 1 and done["asked"] == 0
    row = rows(tmp_path / "r.jsonl")[0]
    assert row["reason"] == "Her smile says it." and row["reason_model"] == "file"
    with pytest.raises(ValueError, match=r"none of its 1 keys is in .* 'x'; is it of another data"):
        annotate_reasons(folder, tmp_path / "r.jsonl", ReasonOptions(reasons={"x": "y"}))


def test_ready_descriptions_save_the_first_call(
    chat_server: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    server = chat_server(echo)
    texts = {f"clip-{n}": f"A clip numbered {n}." for n in range(5)}
    report = annotate_reasons(
        folder, tmp_path / "r.jsonl", options(server.url, describe=None, descriptions=texts)
    )
    assert {r.body["model"] for r in server.requests} == {"head"}
    assert any("A clip numbered 1." in json.dumps(r.body) for r in server.requests)
    assert "no description in the file" in report["failed"]["clip-5"]


def test_a_torn_line_of_the_cache_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    with AnswerCache(path) as answers:
        answers.put("a", "1", model="m")
        with (
            pytest.raises(ValueError, match="another run is writing this cache"),
            AnswerCache(path),
        ):
            pass
    with path.open("ab") as stream:
        stream.write(b'{"id": "b", "ans')
    with AnswerCache(path) as answers:
        assert len(answers) == 1
        answers.put("c", "3")
    with AnswerCache(path) as answers:
        assert (answers.get("a"), answers.get("b"), answers.get("c")) == ("1", None, "3")


def test_the_prompt_version_rises_with_the_prompts() -> None:
    """If this fails, the texts were changed: raise PROMPT_VERSION, then the digits here."""
    texts = json.dumps([describe_messages([b"x"]), infer_messages("D", "U", "E")])
    assert (PROMPT_VERSION, hashlib.sha256(texts.encode()).hexdigest()[:8]) == ("1", "13926c11")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"infer": None}, "a text model must be given"),
        ({"describe": None}, "a vision model must be given"),
        ({"concurrency": 0}, "frames, size and concurrency must be at least 1, found 8, 28 and 0"),
    ],
)
def test_options_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options("http://h/v1", **changes)


def test_a_key_comes_once_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"key": "a", "reason": "x"}\n' * 2)
    with pytest.raises(ValueError, match=r"d\.jsonl:2: key a: must be unique, found it twice"):
        read_texts(path, "reason")
    path.write_text('{"key": "a"}\n')
    with pytest.raises(ValueError, match=r"d\.jsonl:1: reason: must be text, found None"):
        read_texts(path, "reason")


def test_command(
    chat_server: Callable[..., Any],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = chat_server(echo)
    out = tmp_path / "r.jsonl"
    words = ["annotate", "reasons", str(folder), "--out", str(out), "--frame-size", "28"]
    assert cli.main([*words, "--vision-url", server.url, "--text-url", server.url]) == 2
    assert "--vision-model must be given with the other one" in capsys.readouterr().err
    served = ["--vision-url", server.url, "--vision-model", "eyes", "--text-model", "head"]
    assert cli.main([*words, *served, "--text-url", server.url]) == 0
    shown = capsys.readouterr()
    assert "5 reasons for 6 records (1 have no emotion), 10 questions asked" in shown.out
    assert "6/6 clips" in shown.err
    broken = chat_server(lambda body: "!400")
    cache = ["--cache", str(tmp_path / "other"), "--text-url", broken.url, "--json"]
    assert cli.main([*words, *served, *cache]) == 75
    assert len(json.loads(capsys.readouterr().out)["failed"]) == 5
