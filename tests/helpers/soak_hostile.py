"""What a soak's worst clients do: leave, stall, lie, flood, send bytes that are no request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator

import httpx
from soak_http import CHAT, TEXT, chat_body
from soak_outcomes import LostError, UndocumentedError, check_status
from soak_site import CANARY, Site

_READ_TIMEOUT_S = 60.0
_FLOOD = 70  # more requests at once than run and wait
_BODY_TOO_LARGE = 2 * 2**20
_LINGER_0 = struct.pack("ii", 1, 0)  # close() resets the connection


@contextlib.asynccontextmanager
async def _connection(
    port: int,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    async with asyncio.timeout(_READ_TIMEOUT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**16)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _head(site: Site, path: str, *more: str) -> bytes:
    lines = (
        f"POST {path} HTTP/1.1",
        "host: x",
        f"x-api-key: {site.key()}",
        "content-type: application/json",
        *more,
    )
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _whole(site: Site, path: str, body: dict) -> bytes:
    data = json.dumps(body).encode()
    return _head(site, path, f"content-length: {len(data)}") + data


def _long_stream(site: Site) -> dict:
    return {
        "messages": [{"role": "user", "content": site.question()}],
        "max_tokens": 1500,
        "ignore_eos": True,
        "reasoning_effort": site.dice.choice(("none", "high")),
        "stream": True,
        "n": site.dice.choice((1, 1, 4)),
    }


async def leave_stream(site: Site) -> str:
    """Hangs up in the middle of an answer."""
    asked = site.http.stream("POST", CHAT, json=_long_stream(site), headers=site.headers())
    async with asked as answer:
        if answer.status_code != 200:
            await answer.aread()
            return check_status(answer, (200,))
        lines = answer.aiter_lines()
        for _ in range(site.dice.randrange(1, 20)):
            await anext(lines, None)
    return "left"


async def leave_whole(site: Site) -> str:
    """Does not wait for an answer that comes whole."""
    body = {**_long_stream(site), "stream": False}
    try:
        answer = await site.http.post(
            CHAT, json=body, headers=site.headers(), timeout=site.dice.uniform(0.05, 1.5)
        )
    except httpx.TimeoutException:
        return "left"
    return check_status(answer, (200,))


async def reset(site: Site) -> str:
    """The connection is reset while an answer comes."""
    async with _connection(site.http_port) as (reader, writer):
        writer.write(_whole(site, CHAT, _long_stream(site)))
        async with asyncio.timeout(_READ_TIMEOUT_S):
            with contextlib.suppress(OSError):
                await reader.read(200)
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
        writer.transport.abort()
    return "left"


async def read_slowly(site: Site) -> str:
    """Reads nothing for a while, then leaves."""
    async with _connection(site.http_port) as (_, writer):
        writer.write(_whole(site, TEXT, _flood_of_text(site)))
        await asyncio.sleep(site.dice.uniform(1, 5))
    return "left"


def _flood_of_text(site: Site) -> dict:
    return {
        "prompt": site.question(),
        "n": 8,
        "max_tokens": 1500,
        "ignore_eos": True,
        "stream": True,
        "logprobs": 5,
    }


async def stall_in_head(site: Site) -> str:
    """Half a head, then nothing."""
    async with _connection(site.http_port) as (_, writer):
        writer.write(_head(site, CHAT)[: site.dice.randrange(1, 60)])
        await asyncio.sleep(site.dice.uniform(0.5, 4))
    return "left"


async def stall_in_body(site: Site) -> str:
    """Half a body, then nothing: the server gives it up, and says so."""
    half = _head(site, CHAT, "content-length: 1000") + b'{"messages": ["' + CANARY.encode()
    async with _connection(site.http_port) as (reader, writer):
        writer.write(half)
        if site.chance(0.3):
            return "left"
        return await _status(reader, b"408")


async def send_half_and_close(site: Site) -> str:
    """Shuts its side down in the middle of a body."""
    async with _connection(site.http_port) as (reader, writer):
        writer.write(_head(site, CHAT, "content-length: 1000") + b"{")
        writer.write_eof()
        async with asyncio.timeout(_READ_TIMEOUT_S):
            with contextlib.suppress(OSError):
                await reader.read(1000)
    return "left"


async def _status(reader: asyncio.StreamReader, *wanted: bytes) -> str:
    try:
        async with asyncio.timeout(_READ_TIMEOUT_S):
            answer = await reader.read(2000)
    except OSError as error:
        raise LostError(f"the connection broke: {error}") from None
    if not answer:
        raise LostError("the connection was closed without an answer")
    status = answer.split(b" ", 2)[1]
    if status in (b"503", b"504"):
        raise LostError(str(answer[:300]))
    if status not in wanted:
        raise UndocumentedError(f"{answer[:300]!r}")
    return "refused"


async def send_garbage(site: Site) -> str:
    """Bytes that are no HTTP, and none that gRPC knows."""
    port = site.dice.choice((site.http_port, site.grpc_port))
    garbage = site.dice.choice(
        (
            site.dice.randbytes(400),
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + site.dice.randbytes(200),
            b"GET / HTTP/9.9\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + site.dice.randbytes(100),
            b"GET /%00%ff HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
        )
    )
    async with _connection(port) as (reader, writer):
        writer.write(garbage)
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(2):
                await reader.read(1000)
    return "left"


async def send_nonsense(site: Site) -> str:
    """Well-formed HTTP that must be refused with a 4xx."""
    said = [{"role": "user", "content": site.question()}]
    bodies = (
        b'{"messages": [',
        b"\xff\xfe" + CANARY.encode(),
        b"",
        b"[" * 100_000,
        json.dumps({"messages": CANARY}).encode(),
        json.dumps({"messages": []}).encode(),
        json.dumps({"messages": said, "max_tokens": -1}).encode(),
        json.dumps({"messages": said, "model": CANARY}).encode(),
        json.dumps({"messages": said, "n": 300}).encode(),
        json.dumps({"messages": said, "reasoning_effort": CANARY}).encode(),
        json.dumps({"messages": said, CANARY: 1, "strict": True}).encode(),
        json.dumps({"messages": [{"role": "user", "content": CANARY * 9000}]}).encode(),
        json.dumps({"messages": said, "response_format": _schema({"type": CANARY})}).encode(),
        json.dumps({"messages": said, "structured_outputs": {"regex": f"({CANARY}"}}).encode(),
        json.dumps({"messages": [_broken_picture()]}).encode(),
        b"x" * _BODY_TOO_LARGE,
    )
    answer = await site.http.post(CHAT, content=site.dice.choice(bodies), headers=site.headers())
    return check_status(answer, (400, 404, 413, 422))


def _schema(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": CANARY, "schema": schema}}


def _broken_picture() -> dict:
    part = {"type": "image_url", "image_url": "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAA"}
    return {"role": "user", "content": [part, {"type": "text", "text": CANARY}]}


async def knock(site: Site) -> str:
    """Without a good key, or where there is nothing."""
    path, key = site.dice.choice((("/v1/models", "ostro-wrong"), ("/v1/nothing", site.key())))
    answer = await site.http.get(path, headers=site.headers(key))
    return check_status(answer, (401, 404))


async def flood(site: Site) -> str:
    """More at once than the cell takes: each is answered, or told when to come again."""
    body = {**chat_body(site), "max_tokens": 8, "n": 1}

    async def one() -> str:
        answer = await site.http.post(CHAT, json=body, headers=site.headers())
        return check_status(answer, (200,))

    ends = await asyncio.gather(*(one() for _ in range(_FLOOD)), return_exceptions=True)
    for end in ends:
        if isinstance(end, BaseException):
            raise end
    return "busy" if "busy" in ends else "ok"


KINDS = {
    leave_stream: 8,
    leave_whole: 5,
    reset: 4,
    read_slowly: 3,
    stall_in_head: 2,
    stall_in_body: 3,
    send_half_and_close: 2,
    send_garbage: 3,
    send_nonsense: 8,
    knock: 2,
    flood: 1,
}
