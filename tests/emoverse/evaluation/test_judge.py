"""The judge model against a real server: what is asked, how verdicts are read, kept, resumed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_shards.annotate.endpoint import Endpoint, Patience
from emoverse.evaluation.judge import judge_predictions, read_verdict, read_verdicts
from emoverse.evaluation.result_files import read_results
from launch.cli import main

QUICK = Patience(timeout_s=5.0, attempts=2, first_pause_s=0.01, longest_pause_s=0.02)
Serve = Callable[[Callable[[str], str | int]], tuple[str, list[str]]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """`serve(answer)` -> (base URL, the questions so far); an int answer is a status."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Callable[[str], str | int]) -> tuple[str, list[str]]:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][0]["content"]
                asked.append(text)
                said = answer(text)
                words = str(said).split(" ")
                cut = len(words) > body["max_tokens"]  # a word counts as a token
                choice = {
                    "message": {"content": " ".join(words[: body["max_tokens"]])},
                    "finish_reason": "length" if cut else "stop",
                }
                content = json.dumps({"choices": [choice]}).encode()
                self.send_response(said if isinstance(said, int) else 200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/v1", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    lines = [
        {"task": "eri", "response": "She is glad.", "label": "She feels joy."},
        {"task": "eri", "response": "She {is} sad.", "label": "She feels joy."},
        {"task": "eri", "response": " ", "label": "She feels joy."},
        {"task": "er", "response": "Happy.", "label": "Happy."},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8", 0.8),
        ("Score: 10", 1.0),
        ("7/10", 0.7),
        ("0.", 0.0),
        ("3 or 4", None),
        ("eleven", None),
        ("11", None),
        ("", None),
    ],
)
def test_a_verdict_is_one_integer(text: str, expected: float | None) -> None:
    assert read_verdict(text) == expected


def test_verdicts_are_asked_once_kept_and_resumed(
    serve: Serve, answers: Path, tmp_path: Path
) -> None:
    url, asked = serve(lambda text: "9" if "glad" in text else "I cannot say")
    endpoint, store = Endpoint(base_url=url, model="judge"), tmp_path / "judge.jsonl"
    predictions = read_results(answers)
    judged = judge_predictions(predictions, endpoint, store, patience=QUICK)
    assert [one.row.judge for one in judged] == [0.9, None, 0.0, None]
    assert len(asked) == 2 and "She feels joy." in asked[0]
    store.write_text(store.read_text() + '{"key": "cut o')  # killed in a line
    judged = judge_predictions(predictions, endpoint, store, patience=QUICK)
    assert len(asked) == 3 and "{is}" in asked[2]  # only what has no verdict yet
    assert [one.row.judge for one in judged][:3] == [0.9, None, 0.0]
    assert len(read_verdicts(store)) == 1
    other = Endpoint(base_url=url, model="other")
    judge_predictions(predictions, other, store, patience=QUICK)
    assert len(asked) == 5  # another judge's verdicts are not its own


def test_a_judge_that_is_down_or_set_up_wrongly_is_told(
    serve: Serve, answers: Path, tmp_path: Path
) -> None:
    predictions, store = read_results(answers), tmp_path / "judge.jsonl"
    down = Endpoint(base_url=serve(lambda text: 503)[0], model="judge")
    with pytest.raises(RuntimeError, match=r"does not answer: .*503.*the same command goes on"):
        judge_predictions(predictions, down, store, patience=QUICK)
    wrong = Endpoint(base_url=serve(lambda text: 401)[0], model="judge")
    with pytest.raises(ValueError, match="check the base URL, the model name 'judge'"):
        judge_predictions(predictions, wrong, store, patience=QUICK)


def test_what_keeps_no_verdict_is_told_with_its_cause(
    serve: Serve, answers: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    for number, (judge, cause) in enumerate(
        [
            (lambda text: 400, "2 unscored; the first: 400 from http://"),
            (lambda text: "3 or 4", "2 unscored; the first: not one integer from 0 to 10: '3"),
            (lambda text: "5", "0 unscored"),
        ]
    ):
        judge_predictions(
            read_results(answers),
            Endpoint(base_url=serve(judge)[0], model="judge"),
            tmp_path / f"{number}.jsonl",
            patience=QUICK,
            log=said.append,
        )
        assert said[-1].startswith(f"judge judge: 2 answers, 2 asked, {cause}")
    assert said[-1].endswith("0 unscored")


def test_a_judge_may_explain_its_integer(
    serve: Serve, answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, _ = serve(lambda text: "8\n\nThe second text" + " agrees with the first," * 30)
    words = ["evaluate", str(answers), "--judge", url, "--judge-model", "m", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)["answers.jsonl"]["tasks"]["eri"]
    assert found["judge"]["unscored"] == 0


def test_the_verb_adds_the_judge_to_metrics(
    serve: Serve, answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, _ = serve(lambda text: "6")
    words = ["evaluate", str(answers), "--judge", url, "--judge-model", "m", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)["answers.jsonl"]["tasks"]["eri"]
    assert found["metrics"]["judge"]["value"] == pytest.approx(0.4)  # 0.6, 0.6, and unreadable 0
    assert found["judge"] == {"model": "m", "base_url": url, "prompt_version": 1, "unscored": 0}
    assert (answers.parent / "judge.jsonl").is_file()
    assert main(["evaluate", str(answers), "--judge", url]) == 2
    assert "endpoint model: must be the name" in capsys.readouterr().err
