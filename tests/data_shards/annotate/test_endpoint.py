"""One question to a server that misbehaves: what is asked again, when, and what is given up."""

import asyncio
import itertools
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import pytest

from data_shards.annotate.endpoint import (
    ChatClient,
    Endpoint,
    Patience,
    Refused,
    Unanswered,
)

QUICK = Patience(timeout_s=0.4, attempts=4, first_pause_s=0.01)
MESSAGES = [{"role": "user", "content": "Why?"}]


def ask(
    url: str, *, patience: Patience = QUICK, times: int = 1, **changes: object
) -> tuple[list[str], int]:
    """Ask `times` times at once; the answers and the number of repeated attempts."""
    endpoint = Endpoint(**({"base_url": url, "model": "m"} | changes))  # type: ignore[arg-type]

    async def run() -> tuple[list[str], int]:
        async with ChatClient(patience, connections=times) as client:
            asked = (client.ask(endpoint, MESSAGES) for _ in range(times))
            return await asyncio.gather(*asked), client.retries

    return asyncio.run(run())


def test_a_question_and_its_answer(
    chat_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    server = chat_server(["  Because.\n"])
    assert ask(server.url + "/", key_env="SOME_KEY", max_tokens=7) == (["Because."], 0)
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.headers["Authorization"] == "Bearer secret"
    assert request.body == {
        "model": "m",
        "messages": MESSAGES,
        "max_tokens": 7,
        "temperature": 0.0,
    }
    ask(server.url)
    assert "Authorization" not in server.requests[1].headers


@pytest.mark.parametrize(
    "fault",
    [
        "429",
        "500",
        "503",
        "slow",
        "trickle",
        "malformed",
        "list",
        "no-choices",
        "empty",
        "null",
        "drop",
        "half",
        "encoding",
    ],
)
def test_what_may_pass_is_asked_again(chat_server: Callable[..., Any], fault: str) -> None:
    server = chat_server([f"!{fault}", f"!{fault}", "Fine."])
    assert ask(server.url) == (["Fine."], 2)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("500", r"500 from http://.*: on purpose, after 4 attempts"),
        ("slow", r"no answer within 0\.4 s, after 4 attempts"),
        ("malformed", r"an answer that is not a chat completion: '\{\"choi', after 4 attempts"),
        ("empty", "an empty answer, after 4 attempts"),
        ("drop", "after 4 attempts"),
    ],
)
def test_attempts_are_bounded(chat_server: Callable[..., Any], fault: str, cause: str) -> None:
    server = chat_server([f"!{fault}"] * 9)
    with pytest.raises(Unanswered, match=cause):
        ask(server.url)
    assert len(server.requests) == 4


def test_nobody_listens(unused_url: str) -> None:
    with pytest.raises(Unanswered, match="after 4 attempts"):
        ask(unused_url)


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured_by_all(
    chat_server: Callable[..., Any], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not in the parameters: test processes that start in different seconds must agree on names.
    value = "1" if form == "seconds" else formatdate(time.time() + 2, usegmt=True)
    server = chat_server([f"!429 {value}", *["Fine."] * 3])
    began = time.monotonic()
    first, retries = ask(server.url)
    assert (first, retries) == (["Fine."], 1)
    assert time.monotonic() - began >= 0.95


def test_a_long_retry_after_is_cut(chat_server: Callable[..., Any]) -> None:
    patience = Patience(timeout_s=2, attempts=2, first_pause_s=0.01, longest_asked_s=0.2)
    server = chat_server(["!429 86400", "Fine."])
    began = time.monotonic()
    assert ask(server.url, patience=patience)[0] == ["Fine."]
    assert 0.2 <= time.monotonic() - began < 5


def test_pauses_grow(chat_server: Callable[..., Any]) -> None:
    patience = Patience(timeout_s=2, attempts=5, first_pause_s=0.05)
    server = chat_server(["!500"] * 4 + ["Fine."])
    ask(server.url, patience=patience)
    times = [request.at_s for request in server.requests]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    for number, gap in enumerate(gaps):
        assert gap >= 0.025 * 2**number
    assert sum(gaps) >= 0.375


def test_a_refused_question_is_not_asked_again(chat_server: Callable[..., Any]) -> None:
    server = chat_server(["!400"])
    with pytest.raises(Refused, match=r"400 from http://.*: on purpose"):
        ask(server.url)
    assert len(server.requests) == 1


def test_a_cut_answer_is_refused(chat_server: Callable[..., Any]) -> None:
    with pytest.raises(Refused, match="cut at max_tokens 512; raise it"):
        ask(chat_server(["!length"]).url)


@pytest.mark.parametrize("status", ["401", "403", "404", "307 http://elsewhere/v1"])
def test_wrong_settings_end_the_run(chat_server: Callable[..., Any], status: str) -> None:
    with pytest.raises(
        ValueError, match=f"{status[:3]} from .* check the base URL, the model name 'm'"
    ):
        ask(chat_server([f"!{status}"]).url)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "host:8000"}, "must start with http:// or https://.* found 'host:8000'"),
        ({"base_url": "http://host:port/v1"}, "must name a host, .* found 'http://host:port/v1'"),
        ({"base_url": "http://h:99999/v1"}, "a port that is a number below 65536"),
        ({"base_url": "https://"}, "must name a host"),
        ({"model": ""}, "endpoint model: must be the name"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"key_env": "NO_SUCH_KEY"}, "variable NO_SUCH_KEY must hold the API key, found nothing"),
    ],
)
def test_settings_are_checked(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Endpoint(**({"base_url": "http://h/v1", "model": "m"} | changes))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout must be above 0 s"):
        Patience(timeout_s=0)
