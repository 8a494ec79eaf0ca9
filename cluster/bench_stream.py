"""One streamed request to an OpenAI-compatible server, and when its output arrived.

Asks nothing of the server beyond the standard: text in `choices`, usage at the end if it tells it.
Every way in which a request can fail has a kind, so that a report can count them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from ostro.cluster.bench_statistics import Failure, Outcome

_MAX_EVENT_BYTES = 4 * 2**20
_MAX_DETAIL_CHARS = 300
_END_TIMEOUT_S = 1.0
_DONE = "[DONE]"
_TEXT_FIELDS = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")

Prompt = list[int] | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server and how to ask it.

    Attributes:
        name: What tables call it.
        url: Of the server, without `/v1`.
        model: As the server names it.
        chat: `/v1/chat/completions` instead of `/v1/completions`.
        new_tokens: `max_tokens` of each request.
        api_key: Sent as a bearer token; "" sends none.
        extra: Fields of the body beyond the standard ones, such as `ignore_eos`.
        timeout_s: Of a whole request.
    """

    name: str
    url: str
    model: str
    chat: bool
    new_tokens: int
    api_key: str = field(default="", repr=False)
    extra: Mapping[str, Any]
    timeout_s: float

    def endpoint(self) -> str:
        """Where requests go."""
        return f"{self.url}/v1/{'chat/completions' if self.chat else 'completions'}"

    def headers(self) -> dict[str, str]:
        """Beyond those of any JSON request."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """The request as JSON."""
        if self.chat:
            asked: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
        else:
            asked = {"prompt": prompt}
        return {
            "model": self.model,
            **asked,
            "max_tokens": self.new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }


class RequestFailedError(Exception):
    """A request has no complete answer; `failure` says why."""

    def __init__(self, kind: str, detail: str) -> None:
        self.failure = Failure(kind, " ".join(detail.split())[:_MAX_DETAIL_CHARS])
        super().__init__(f"{kind}: {detail}")


class SseParser:
    """Bytes of a server-sent event stream, cut anywhere, to the data of its events."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, received: bytes) -> list[str]:
        """The data of the events that these bytes complete.

        Raises:
            RequestFailedError: A line is absurdly long or is not UTF-8.
        """
        *lines, self._rest = (self._rest + received).split(b"\n")
        if len(self._rest) > _MAX_EVENT_BYTES:
            raise RequestFailedError("unreadable event", f"a line beyond {_MAX_EVENT_BYTES} bytes")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(_text(line[5:]).removeprefix(" "))
            elif not line and self._data:
                events.append("\n".join(self._data))
                self._data = []
        return events


class Answer:
    """What the events of one answer have brought so far."""

    def __init__(self) -> None:
        self.is_done = False
        self._finished = False
        self._last_s = 0.0
        self._arrivals_s: list[float] = []
        self._num_events = 0
        self._num_token_ids = 0
        self._usage: dict[str, Any] | None = None

    def take(self, events: Sequence[str], now_s: float) -> None:
        """Note the events of one read.

        Raises:
            RequestFailedError: One of them is an error, or no JSON.
        """
        self._last_s = now_s
        brought = [self._take(event) for event in events]
        if any(brought):
            self._arrivals_s.append(now_s)

    def outcome(self, due_s: float) -> Outcome:
        """The whole answer.

        Raises:
            RequestFailedError: It is not complete.
        """
        if not (self.is_done or self._finished):
            raise RequestFailedError("cut short", "the stream ended without [DONE] and no reason")
        if not self._arrivals_s:
            raise RequestFailedError("empty answer", "the stream held no output")
        usage = self._usage or {}
        num_tokens = usage.get("completion_tokens") or self._num_token_ids or self._num_events
        return Outcome(
            due_s=due_s,
            ended_s=self._last_s,
            arrivals_s=tuple(self._arrivals_s),
            num_output_tokens=num_tokens,
            num_prompt_tokens=usage.get("prompt_tokens") or 0,
            tells_usage=bool(usage.get("completion_tokens")),
        )

    def _take(self, event: str) -> bool:
        """Whether an event holds output."""
        if event == _DONE:
            self.is_done = True
            return False
        try:
            chunk = json.loads(event)
            error, choices = chunk.get("error"), chunk.get("choices") or []
            self._usage = chunk.get("usage") or self._usage
        except (ValueError, AttributeError):
            raise RequestFailedError("unreadable event", event) from None
        if error:
            raise RequestFailedError("error in the stream", _message(error))
        has_output = False
        for choice in choices:
            self._finished |= choice.get("finish_reason") is not None
            self._num_token_ids += len(choice.get("token_ids") or ())
            delta = choice.get("delta") or {}
            has_output |= bool(
                choice.get("text")
                or choice.get("token_ids")
                or any(delta.get(name) for name in _TEXT_FIELDS)
            )
        self._num_events += has_output
        return has_output


async def send(
    session: aiohttp.ClientSession, target: Target, prompt: Prompt, due_s: float
) -> Outcome:
    """Send a request and read its answer to the end; failures come back as outcomes too."""
    try:
        async with asyncio.timeout(target.timeout_s):
            answer = await _read(session, target, prompt)
        return answer.outcome(due_s)
    except RequestFailedError as error:
        failure = error.failure
    except TimeoutError:
        failure = Failure("timeout", f"no complete answer within {target.timeout_s:g} s")
    except aiohttp.ClientConnectorError as error:
        failure = Failure("cannot connect", str(error))
    except aiohttp.InvalidURL as error:
        failure = Failure("cannot connect", f"{error} is no URL")
    except (aiohttp.ClientError, OSError) as error:
        failure = Failure("connection broke", f"{type(error).__name__}: {error}")
    return Outcome(due_s=due_s, ended_s=time.perf_counter(), failure=failure)


async def _read(session: aiohttp.ClientSession, target: Target, prompt: Prompt) -> Answer:
    parser, answer = SseParser(), Answer()
    async with session.post(
        target.endpoint(), json=target.body(prompt), headers=target.headers()
    ) as response:
        if response.status != 200:
            raise RequestFailedError(f"HTTP {response.status}", await _error_text(response))
        if response.content_type != "text/event-stream":
            raise RequestFailedError("not a stream", f"the answer is {response.content_type}")
        async for received in response.content.iter_any():
            answer.take(parser.feed(received), time.perf_counter())
            if answer.is_done:
                break
        # To its very end, or the connection could not be used again.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(response.content.read(), _END_TIMEOUT_S)
    return answer


async def _error_text(response: aiohttp.ClientResponse) -> str:
    text = (await response.content.read(_MAX_EVENT_BYTES)).decode(errors="replace")
    try:
        body = json.loads(text)
    except ValueError:
        return text
    return _message(body.get("error") or body) if isinstance(body, dict) else text


def _message(error: object) -> str:
    if isinstance(error, dict):
        return str(error.get("message") or error.get("detail") or error)
    return str(error)


def _text(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise RequestFailedError("unreadable event", "a line that is not UTF-8") from None
