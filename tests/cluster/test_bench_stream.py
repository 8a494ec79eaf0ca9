"""Streamed requests of load tests against a small server that misbehaves in every known way."""

import asyncio
import json
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from ostro.cluster.bench_stream import RequestFailedError, SseParser, Target, send

TEXT_CHUNK = {"choices": [{"index": 0, "text": "a", "finish_reason": None}]}
END_CHUNK = {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}
USAGE_CHUNK = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 6}}


def events(*chunks, done=True):
    data = [json.dumps(chunk) for chunk in chunks] + ["[DONE]"] * done
    return [f"data: {line}\n\n".encode() for line in data]


async def stream(request, parts, *, breaks=False):
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for part in parts:
        await response.write(part)
        await asyncio.sleep(0.01)  # a read of its own
    if breaks:
        request.transport.abort()
    return response


@asynccontextmanager
async def serving(handler):
    app = web.Application()
    app.router.add_post("/v1/completions", handler)
    app.router.add_post("/v1/chat/completions", handler)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        yield session, str(server.make_url("")).rstrip("/")


def ask(handler, *, chat=False, timeout_s=10.0, prompt=(1, 2), **extra):
    async def run():
        async with serving(handler) as (session, url):
            target = Target(
                name="t",
                url=url,
                model="m",
                chat=chat,
                new_tokens=6,
                api_key="k",
                extra=extra,
                timeout_s=timeout_s,
            )
            return await send(session, target, prompt, 0.0)

    return asyncio.run(run())


def answer_with(*chunks, done=True, breaks=False):
    async def handler(request):
        return await stream(request, events(*chunks, done=done), breaks=breaks)

    return handler


# ---- events


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 1000])
def test_events_are_found_wherever_the_bytes_are_cut(cut):
    sent = ': hello\r\nid: 3\r\ndata: {"a":\r\ndata: "é"}\r\n\r\n\ndata:x\n\ndata: rest'.encode()
    parser, found = SseParser(), []
    for start in range(0, len(sent), cut):
        found += parser.feed(sent[start : start + cut])
    assert found == ['{"a":\n"é"}', "x"]


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(RequestFailedError, match="UTF-8"):
        SseParser().feed(b"data: \xff\n\n")


def test_a_line_without_end_is_refused():
    parser = SseParser()
    parser.feed(b"x" * 4 * 2**20)
    with pytest.raises(RequestFailedError, match="beyond"):
        parser.feed(b"x")


# ---- answers


def test_tokens_are_counted_by_usage():
    outcome = ask(answer_with(TEXT_CHUNK, TEXT_CHUNK, END_CHUNK, USAGE_CHUNK))
    assert outcome.failure is None
    assert (outcome.num_output_tokens, outcome.num_prompt_tokens) == (6, 5)
    assert outcome.tells_usage
    assert len(outcome.arrivals_s) == 2


def test_token_ids_count_where_no_usage_is_told():
    ids = {"choices": [{"index": 0, "text": "", "token_ids": [7, 8, 9], "finish_reason": None}]}
    outcome = ask(answer_with(ids, ids, END_CHUNK))
    assert (outcome.num_output_tokens, outcome.tells_usage) == (6, False)
    assert len(outcome.arrivals_s) == 2


def test_events_count_where_nothing_else_is_told():
    outcome = ask(answer_with(TEXT_CHUNK, TEXT_CHUNK, TEXT_CHUNK, END_CHUNK))
    assert (outcome.num_output_tokens, outcome.tells_usage) == (3, False)


def test_events_that_come_together_are_one_arrival():
    async def handler(request):
        first, *others = events(TEXT_CHUNK, TEXT_CHUNK, TEXT_CHUNK, END_CHUNK, USAGE_CHUNK)
        return await stream(request, [first, b"".join(others)])

    outcome = ask(handler)
    assert len(outcome.arrivals_s) == 2
    assert outcome.num_output_tokens == 6


@pytest.mark.parametrize("field", ["content", "reasoning_content", "reasoning"])
def test_chat_counts_text_and_thoughts_but_not_the_role(field):
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    said = {"choices": [{"delta": {field: "x"}, "finish_reason": None}]}
    outcome = ask(answer_with(role, said, END_CHUNK, USAGE_CHUNK), chat=True, prompt="hello")
    assert len(outcome.arrivals_s) == 1


def test_a_stream_may_end_without_done_once_it_has_a_reason():
    assert ask(answer_with(TEXT_CHUNK, END_CHUNK, done=False)).failure is None


def test_request_is_what_was_asked_for():
    seen = {}

    async def handler(request):
        seen.update(await request.json(), key=request.headers["Authorization"])
        return await stream(request, events(TEXT_CHUNK, END_CHUNK))

    ask(handler, ignore_eos=True, min_tokens=6)
    assert seen == {
        "model": "m",
        "prompt": [1, 2],
        "max_tokens": 6,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "min_tokens": 6,
        "key": "Bearer k",
    }


# ---- failures


async def overloaded(_request):
    return web.json_response({"error": {"message": "too much waits"}}, status=429)


async def crashed(_request):
    return web.Response(text="<html>oops</html>", status=500)


async def whole(_request):
    return web.json_response({"choices": [{"text": "a"}]})


async def nonsense(request):
    return await stream(request, [b"data: {no json\n\n"])


async def number(request):
    return await stream(request, [b"data: 3\n\n"])


async def silent(request):
    await asyncio.sleep(30)
    return await stream(request, [])


@pytest.mark.parametrize(
    ("handler", "kind", "detail"),
    [
        (overloaded, "HTTP 429", "too much waits"),
        (crashed, "HTTP 500", "oops"),
        (whole, "not a stream", "application/json"),
        (nonsense, "unreadable event", "no json"),
        (number, "unreadable event", "3"),
        (silent, "timeout", "0.3 s"),
        (answer_with(END_CHUNK, USAGE_CHUNK), "empty answer", ""),
        (answer_with(TEXT_CHUNK, done=False), "cut short", ""),
        (answer_with(TEXT_CHUNK, done=False, breaks=True), "connection broke", ""),
        (answer_with(TEXT_CHUNK, {"error": {"message": "lost"}}), "error in the stream", "lost"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_failure_has_a_kind_and_a_detail(handler, kind, detail):
    outcome = ask(handler, timeout_s=0.3 if handler is silent else 10.0)
    assert outcome.failure is not None
    assert outcome.failure.kind == kind
    assert detail in outcome.failure.detail


def test_a_server_that_is_not_there_is_told_so():
    async def run():
        target = Target(
            name="t",
            url="http://127.0.0.1:9",
            model="m",
            chat=False,
            new_tokens=1,
            extra={},
            timeout_s=5.0,
        )
        async with aiohttp.ClientSession() as session:
            return await send(session, target, "x", 0.0)

    outcome = asyncio.run(run())
    assert outcome.failure is not None
    assert outcome.failure.kind == "cannot connect"
