"""Questions to a model behind an OpenAI-compatible endpoint (vLLM and others), with retries.

In: an `Endpoint` and chat messages. Out: the text of the answer, or an error whose type shows the
cause: the clip, the endpoint or the settings. Temporary failures (busy, down, slow, broken answers)
are retried with growing pauses, never earlier than the server asks for.
"""

import asyncio
import email.utils
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import httpx2

Message = dict[str, Any]

_BUSY: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_WRONG_SETTINGS: Final = frozenset({401, 403, 404, 405})
_QUOTED: Final = 300  # characters of a server's message that are shown


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where a model is served, and the settings of its answers."""

    base_url: str  # up to and with the version, e.g. http://host:8000/v1
    model: str
    key_env: str = ""  # environment variable with the API key; empty = no key
    max_tokens: int = 512  # of an answer
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(
                "endpoint base URL: must start with http:// or https://, such as "
                f"http://host:8000/v1, found {self.base_url!r}"
            )
        try:
            url = httpx2.URL(self.base_url)
            readable = bool(url.host) and (url.port or 0) < 2**16
        except httpx2.InvalidURL:
            readable = False
        if not readable:
            raise ValueError(
                "endpoint base URL: must name a host, and a port that is a number below 65536, "
                f"such as http://host:8000/v1, found {self.base_url!r}"
            )
        if not self.model:
            raise ValueError("endpoint model: must be the name under which the server serves it")
        if self.max_tokens < 1 or self.temperature < 0:
            raise ValueError(
                "endpoint: max_tokens must be at least 1 and temperature at least 0, found "
                f"{self.max_tokens} and {self.temperature}"
            )
        if self.key_env and not os.environ.get(self.key_env):
            raise ValueError(
                f"endpoint key: the environment variable {self.key_env} must hold the API key, "
                f"found nothing; export {self.key_env}=..."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """Timeouts and retries; times in seconds."""

    timeout_s: float = 120.0  # of one attempt, from the connection to the last byte
    attempts: int = 6  # including the first
    first_pause_s: float = 1.0  # doubles with every attempt; half of it is random
    longest_pause_s: float = 60.0  # unless the server asks for more
    longest_asked_s: float = 600.0  # longest pause that a server can ask for with Retry-After

    def __post_init__(self) -> None:
        if self.timeout_s <= 0 or self.attempts < 1 or self.first_pause_s < 0:
            raise ValueError(
                "patience: timeout must be above 0 s, attempts at least 1 and pauses not negative, "
                f"found {self.timeout_s}, {self.attempts} and {self.first_pause_s}"
            )


class Refused(Exception):
    """The server will not answer this question; asking again does not help."""


class Unanswered(Exception):
    """No usable answer in all attempts; a later run may succeed."""


class _Temporary(Exception):
    """One attempt failed for a reason that may not last."""

    def __init__(self, cause: str, *, not_before_s: float = 0.0) -> None:
        super().__init__(cause)
        self.not_before_s = not_before_s


class ChatClient:
    """A pool of connections; use as an async context manager."""

    def __init__(self, patience: Patience, *, connections: int) -> None:
        self._patience = patience
        self._http = httpx2.AsyncClient(
            timeout=httpx2.Timeout(patience.timeout_s, pool=None),
            limits=httpx2.Limits(
                max_connections=connections, max_keepalive_connections=connections
            ),
        )
        self._draw = random.Random(0)  # spreads the pauses and affects no result
        self._closed_until = 0.0  # monotonic time until which a busy server wants no question
        self.retries = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def ask(self, endpoint: Endpoint, messages: Sequence[Message]) -> str:
        """The answer's text, without outer spaces.

        Raises:
            Refused: this question is refused (too long, say), or its answer hit `max_tokens`.
            Unanswered: all attempts failed.
            ValueError: the settings are wrong: key, model name or URL.
        """
        for attempt in range(1, self._patience.attempts + 1):
            await asyncio.sleep(max(0.0, self._closed_until - time.monotonic()))
            try:
                # The library's timeout restarts with every byte: a slow stream would never end.
                async with asyncio.timeout(self._patience.timeout_s):
                    return await self._attempt(endpoint, messages)
            except (_Temporary, httpx2.RequestError, TimeoutError) as error:
                cause = _cause(error, self._patience)
                if attempt == self._patience.attempts:
                    raise Unanswered(f"{cause}, after {attempt} attempts") from error
                self.retries += 1
                await asyncio.sleep(self._pause_s(attempt, error))
        raise AssertionError("the last attempt returns or raises")

    def _pause_s(self, attempt: int, error: Exception) -> float:
        longest = self._patience.longest_pause_s
        pause_s = min(longest, self._patience.first_pause_s * 2.0 ** (attempt - 1))
        pause_s *= 0.5 + 0.5 * self._draw.random()
        if isinstance(error, _Temporary) and error.not_before_s > 0:
            pause_s = max(pause_s, min(error.not_before_s, self._patience.longest_asked_s))
            # The whole server is busy, so all other questions wait too.
            self._closed_until = max(self._closed_until, time.monotonic() + pause_s)
        return pause_s

    async def _attempt(self, endpoint: Endpoint, messages: Sequence[Message]) -> str:
        headers = {}
        if endpoint.key_env:
            headers["Authorization"] = f"Bearer {os.environ[endpoint.key_env]}"
        response = await self._http.post(
            f"{endpoint.base_url.rstrip('/')}/chat/completions",
            headers=headers,
            json={
                "model": endpoint.model,
                "messages": list(messages),
                "max_tokens": endpoint.max_tokens,
                "temperature": endpoint.temperature,
            },
        )
        status = response.status_code
        if status == 200:
            return _answer(response.text, endpoint)
        message = f"{status} from {endpoint.base_url}: {response.text.strip()[:_QUOTED]}"
        if status in _WRONG_SETTINGS or response.is_redirect:  # a redirect means a wrong base URL
            raise ValueError(
                f"endpoint: {message}; check the base URL, the model name {endpoint.model!r} and "
                f"the key ({endpoint.key_env or 'none was sent'})"
            )
        if status in _BUSY or status >= 500:
            raise _Temporary(
                message, not_before_s=_retry_after_s(response.headers.get("retry-after"))
            )
        raise Refused(message)


def _answer(body: str, endpoint: Endpoint) -> str:
    try:
        choice = json.loads(body)["choices"][0]
        text = choice["message"]["content"]
        cut = choice.get("finish_reason") == "length"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _Temporary(
            f"an answer that is not a chat completion: {body.strip()[:_QUOTED]!r}"
        ) from error
    if not isinstance(text, str) or not text.strip():
        raise _Temporary("an empty answer")
    if cut:
        raise Refused(f"the answer was cut at max_tokens {endpoint.max_tokens}; raise it")
    return text.strip()


def _retry_after_s(value: str | None) -> float:
    """Seconds that a Retry-After header asks for: a number, or a date (RFC 9110, 10.2.3)."""
    if value is None:
        return 0.0
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _cause(error: Exception, patience: Patience) -> str:
    if isinstance(error, (TimeoutError, httpx2.TimeoutException)):
        return f"no answer within {patience.timeout_s:g} s"
    return str(error) or type(error).__name__
