"""HTTP responses that serve one generation and end it the moment its client is gone.

Nothing is sent before the generation's first event, so that what fails early still gets a status
of its own; after `keep_alive_s` of silence a stream is opened all the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ostro.actors.errors import OstroError
from ostro.cluster.error_table import public_error
from ostro.cluster.generation import GenerationEvent
from ostro.cluster.http_timing import TIMING_HEADER, asks_for_timing, server_timing, timing_comment
from ostro.cluster.metrics import closing_events

logger = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class StreamWriter(Protocol):
    """Writes one generation as server-sent events of some dialect; knows what went before.

    Attributes:
        end: What closes a stream, whether it ended well or failed.
    """

    end: bytes

    def write(self, event: GenerationEvent) -> bytes:
        """The bytes of an event, ready to send; may hold several chunks or none."""
        ...

    def failure(self, error: OstroError) -> bytes:
        """The last chunk of a stream that failed after it began."""
        ...


class Gatherer(Protocol):
    """Gathers the events of one generation until they can be told as one body."""

    def add(self, event: GenerationEvent) -> None:
        """Take the next event."""
        ...

    def body(self) -> bytes:
        """All of it as JSON; raises OstroError if an end is missing."""
        ...


class StreamedAnswer(Response):
    """Writes events as they come; closes their iterator when the client leaves."""

    def __init__(
        self,
        events: AsyncIterator[GenerationEvent],
        writer: StreamWriter,
        *,
        keep_alive_s: float,
        headers: Mapping[str, str],
    ) -> None:
        self.status_code = 200
        self.media_type = "text/event-stream"
        self.background = None
        self.init_headers({**_STREAM_HEADERS, **headers})
        self._events = events
        self._writer = writer
        self._keep_alive_s = keep_alive_s
        self._sending = asyncio.Lock()
        self._is_open = False
        self._sent_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the response."""
        self._sent_s = _now_s()
        await _while_connected(
            self._produce(send, tells_timing=asks_for_timing(scope)),
            receive,
            pause_s=lambda: self._sent_s + self._keep_alive_s - _now_s(),
            on_pause=lambda: self._write(send, KEEP_ALIVE),
        )

    async def _produce(self, send: Send, *, tells_timing: bool) -> None:
        event: GenerationEvent | None = None
        async with closing_events(self._events) as events:
            try:
                async for event in events:
                    await self._write(send, self._writer.write(event))
            except Exception as error:
                if not self._is_open:
                    raise
                told = public_error(error)
                if told is not error:
                    logger.exception("a stream failed after it began")
                await self._write(send, self._writer.failure(told))
        last = timing_comment(event) if tells_timing else b""
        await self._write(send, last + self._writer.end, more=False)

    async def _write(self, send: Send, data: bytes, *, more: bool = True) -> None:
        async with self._sending:
            if not self._is_open:
                self._is_open = True
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(start)
            await send({"type": "http.response.body", "body": data, "more_body": more})
            self._sent_s = _now_s()


class GatheredAnswer(Response):
    """Waits for the last event, then answers whole; closes the iterator when the client leaves."""

    def __init__(
        self,
        events: AsyncIterator[GenerationEvent],
        answer: Gatherer,
        *,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(media_type="application/json", headers=dict(headers))
        self._events = events
        self._answer = answer
        self._last: GenerationEvent | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the response."""
        if not await _while_connected(self._gather(), receive):
            return
        timing = server_timing(self._last) if asks_for_timing(scope) else None
        if timing is not None:
            self.headers[TIMING_HEADER] = timing
        self.body = self._answer.body()
        self.raw_headers = [
            *(pair for pair in self.raw_headers if pair[0] != b"content-length"),
            (b"content-length", str(len(self.body)).encode()),
        ]
        await super().__call__(scope, receive, send)

    async def _gather(self) -> None:
        async with closing_events(self._events) as events:
            async for event in events:
                self._answer.add(event)
                self._last = event


async def _while_connected(
    work: Coroutine[None, None, None],
    receive: Receive,
    *,
    pause_s: Callable[[], float | None] = lambda: None,
    on_pause: Callable[[], Coroutine[None, None, None]] | None = None,
) -> bool:
    """Run `work` until it is done or the client is gone; False if the client is gone.

    Args:
        work: Cancelled, and waited for, however this ends.
        receive: The request's own, its body already read.
        pause_s: Seconds until `on_pause` is due, asked again after each.
        on_pause: Run whenever `pause_s` has passed.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        while not (working.done() or leaving.done()):
            due_s = pause_s()
            if due_s is not None and due_s <= 0 and on_pause is not None:
                await on_pause()
                continue
            await asyncio.wait(
                {working, leaving}, timeout=due_s, return_when=asyncio.FIRST_COMPLETED
            )
        if working.done():
            working.result()
        return working.done()
    finally:
        working.cancel()
        leaving.cancel()
        # Shielded: a server that cancels us again must not cut the generation's own cleaning up.
        await asyncio.shield(asyncio.gather(working, leaving, return_exceptions=True))


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _now_s() -> float:
    return asyncio.get_running_loop().time()
