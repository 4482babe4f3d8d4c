"""A small corpus in memory (an index without files), the paper's stages, a chat server."""

import hashlib
import json
import random
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from data_shards.plan.plan import StageSpec
from data_shards.shards import fetch
from data_shards.tasks import Task, mask_of
from tests.builders import make_record, make_shards


class MemoryTable:
    """Shards as lists of task masks; slot i of a shard offers the tasks of its i-th mask."""

    def __init__(self, shards: Sequence[Sequence[int]]) -> None:
        self.shards = [np.array(shard, dtype=np.int64) for shard in shards]

    @classmethod
    def of_classes(
        cls, counts: Mapping[int, int], per_shard: int = 100, *, mixed: bool = True
    ) -> "MemoryTable":
        """`counts` records of each mask in shards of `per_shard`, mixed or class after class."""
        masks = [mask for mask, number in counts.items() for _ in range(number)]
        if mixed:
            draw = random.Random(0)  # its random() is the same in every version of Python
            masks.sort(key=lambda mask: draw.random())
        return cls([masks[i : i + per_shard] for i in range(0, len(masks), per_shard)])

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr([s.tolist() for s in self.shards]).encode()).hexdigest()

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def class_counts(self, shard: int | None = None) -> Mapping[int, int]:
        chosen = self.shards if shard is None else [self.shards[shard]]
        return Counter(mask for masks in chosen for mask in masks.tolist())

    def slots(self, shard: int, mask: int) -> NDArray[np.int64]:
        return np.flatnonzero(self.shards[shard] == mask)

    def entries(self, shard: int) -> NDArray[np.void]:
        """Text lengths of 0 to 999 characters, by (shard, slot)."""
        number = len(self.shards[shard])
        entries = np.zeros(number, dtype=[("text_chars", "<u2")])
        entries["text_chars"] = (np.arange(number) * 7919 + shard * 104729) % 1000
        return entries

    def mask(self, shard: int, slot: int) -> int:
        return int(self.shards[shard][slot])


@pytest.fixture(scope="session")
def memory_table() -> type[MemoryTable]:
    return MemoryTable


class Paper:
    """The EMT dataset by the counts of its Table I, and our reading of the two stages' rates."""

    counts: ClassVar = {
        mask_of([Task.MSA, Task.ER, Task.FER]): 15_870 - 4_839,
        mask_of([Task.MSA, Task.ER, Task.FER, Task.ERI]): 4_839,
        mask_of([Task.MSA, Task.ER]): 9_989,
        mask_of([Task.ECPE]): 7_081,
    }
    stage_1 = StageSpec(
        name="stage1",
        rates=(
            (Task.MSA, Fraction(2, 5)),
            (Task.ER, Fraction(1, 5)),
            (Task.FER, Fraction(2, 5)),
        ),
        take=15_000,
        epochs=2,
    )
    stage_2 = StageSpec(
        name="stage2",
        rates=(
            (Task.MSA, Fraction(1, 20)),
            (Task.ER, Fraction(19, 60)),
            (Task.ERI, Fraction(19, 60)),
            (Task.ECPE, Fraction(19, 60)),
        ),
        rest_of=("stage1",),
        epochs=2,
        shortage="repeat",
    )

    @staticmethod
    def tenth(spec: StageSpec, **changes: Any) -> StageSpec:
        """The stage for `tenth_counts`."""
        return replace(spec, **{"take": spec.take and spec.take // 10, **changes})

    def tenth_counts(self) -> dict[int, int]:
        return {mask: number // 10 for mask, number in self.counts.items()}


@pytest.fixture(scope="session")
def paper() -> Paper:
    return Paper()


# ------------------------------------------------------------------- a chat server that misbehaves


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRequest:
    """What a client sent."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]
    at_s: float  # monotonic time


class ChatServer(ThreadingHTTPServer):
    """An OpenAI-compatible server; each answer is a text, or '!FAULT' for one of its faults."""

    daemon_threads = True

    def __init__(self, answers: Sequence[str] | Callable[[dict[str, Any]], str]) -> None:
        super().__init__(("127.0.0.1", 0), _ChatHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.requests: list[ChatRequest] = []
        self.most_at_once = 0
        self.at_once = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._answers = answers

    def answer(self, request: ChatRequest) -> str:
        with self.lock:
            number = len(self.requests)
            self.requests.append(request)
        if callable(self._answers):
            return self._answers(request.body)
        return self._answers[min(number, len(self._answers) - 1)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class _ChatHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        request = ChatRequest(
            path=self.path, headers=dict(self.headers), body=body, at_s=time.monotonic()
        )
        text = server.answer(request)
        with server.lock:
            server.at_once -= 1
        if text.startswith("!"):
            self._fault(*text[1:].split(" ", 1))
        else:
            self._send(200, _completion(text))

    def _fault(self, kind: str, value: str = "") -> None:
        bodies = {
            "malformed": _completion("x")[:6],
            "list": "[1]",
            "no-choices": '{"choices": []}',
            "empty": _completion(""),
            "null": _completion(None),
            "length": _completion("Half an", finish_reason="length"),
        }
        if kind.isdecimal():
            name = "Location" if kind.startswith("3") else "Retry-After"
            headers = {name: value} if value else {}
            self._send(int(kind), "on purpose", **headers)
        elif kind in bodies:
            self._send(200, bodies[kind])
        elif kind == "encoding":  # says gzip, and is not
            self._send(200, _completion("x"), **{"Content-Encoding": "gzip"})
        elif kind == "slow":
            self.server.closing.wait(3)
            self.close_connection = True
        elif kind == "trickle":  # each byte comes in time, the answer never ends
            self._head(200, 10_000)
            while not self.server.closing.wait(0.05):
                self.wfile.write(b" ")
                self.wfile.flush()
        else:
            assert kind in ("drop", "half"), kind
            if kind == "half":
                self._head(200, 500)
                self.wfile.write(b'{"choices"')
                self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _head(self, status: int, length: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, status: int, text: str, **headers: str) -> None:
        content = text.encode()
        self._head(status, len(content), **headers)
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the screen."""


def _completion(text: str | None, *, finish_reason: str = "stop") -> str:
    message = {"role": "assistant", "content": text}
    return json.dumps({"choices": [{"message": message, "finish_reason": finish_reason}]})


@pytest.fixture
def chat_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ChatServer]]:
    """Start servers: `chat_server(answers)`, a list in order of the requests or a function."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    servers: list[ChatServer] = []

    def start(answers: Sequence[str] | Callable[[dict[str, Any]], str]) -> ChatServer:
        server = ChatServer(answers)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.closing.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def unused_url() -> str:
    """A place where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight shards of three records, for reading only."""
    records = [make_record(f"clip_{index}", num_frames=4) for index in range(24)]
    return make_shards(tmp_path_factory.mktemp("remote") / "shards", records, per_shard=3)


class FileServer(ThreadingHTTPServer):
    """Serves a folder with byte ranges, and fails as a test says."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_FileHandler, directory=str(folder)))
        self.requests: Counter[str] = Counter()
        self.failures = 0  # so many answers are 503
        self.cuts = 0  # so many answers end in the middle
        self.ranges = True
        self.wait_s = 0.0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _FileHandler(SimpleHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        name, server = self.path.lstrip("/"), self.server
        server.requests[name] += 1
        time.sleep(server.wait_s)
        path = Path(self.directory) / name
        if server.failures > 0:
            server.failures -= 1
            self.send_error(503)
            return
        if not path.is_file():
            self.send_error(404)
            return
        content, start = path.read_bytes(), 0
        if (asked := self.headers.get("Range")) and server.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        content = content[start:]
        if server.cuts > 0:
            server.cuts -= 1
            content = content[: len(content) // 2]
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(built, tmp_path / "origin"))


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(fetch, "_PAUSE_S", 0.01)
    server = FileServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
