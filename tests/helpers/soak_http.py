"""Requests of a soak over HTTP that ask for something sensible, in every dialect."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

from soak_outcomes import (
    LostError,
    UndocumentedError,
    check_status,
    check_stream_error,
)
from soak_site import CANARY, EFFORTS, SCHEMA, TOOL, Site

MODEL = "ostro-teaching-7m"
CHAT, TEXT, CONTROL = "/v1/chat/completions", "/v1/completions", "/v1/chat/completions/control"


async def post(site: Site, path: str, body: dict, *wanted: int, key: str | None = None) -> Any:
    """(how it ended, the JSON of its answer)."""
    answer = await site.http.post(path, json=body, headers=site.headers(key))
    end = check_status(answer, wanted or (200,))
    return end, answer.json()


async def stream(site: Site, path: str, body: dict) -> AsyncIterator[dict | str]:
    """What the events of a stream say; of one that is refused the end alone, as a text."""
    asked = {**body, "stream": True}
    async with site.http.stream("POST", path, json=asked, headers=site.headers()) as answer:
        if answer.status_code != 200:
            await answer.aread()
            yield check_status(answer, (200,))
            return
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                yield "ok"
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if event.get("error"):
                    yield check_stream_error(event["error"])
                    return
                yield event


async def whole_stream(site: Site, path: str, body: dict, last: str) -> str:
    """How a stream ended that is read to its end.

    Args:
        site: Where.
        path: Of the dialect.
        body: The request.
        last: Type of a dialect's last event; "" where that is `[DONE]`.
    """
    end = ""
    async for event in stream(site, path, body):
        if isinstance(event, str):
            end = event
        elif last and event.get("type") == last:
            end = "ok"
    if not end:
        raise LostError("a stream was cut")
    return end


def chat_body(site: Site) -> dict[str, Any]:
    """A chat with some of all that can be asked for."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": site.question()}],
        "max_tokens": site.dice.choice((4, 16, 64, 160)),
        "reasoning_effort": site.dice.choice(EFFORTS),
        "seed": site.dice.randrange(1000),
    }
    if site.chance(0.3):
        body["temperature"] = 1.0
    if site.chance(0.3):
        body["n"] = site.dice.choice((2, 3, 5))
    if site.chance(0.3):
        body |= {"logprobs": True, "top_logprobs": 3}
    if site.chance(0.3):
        body["stop"] = [CANARY, "4"]
    if site.chance(0.2):
        body["tools"] = [{"type": "function", "function": TOOL}]
        body["tool_choice"] = site.dice.choice(("auto", "required"))
    elif site.chance(0.3):
        schema = {"name": "verdict", "schema": SCHEMA}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
        body.pop("stop", None)
    return body


async def chat(site: Site) -> str:
    body = chat_body(site)
    end, answer = await post(site, CHAT, body)
    if end == "ok":
        _check_chat(body, answer)
    return end


def _check_chat(body: dict, answer: dict) -> None:
    choices = answer["choices"]
    if len(choices) != body.get("n", 1):
        raise UndocumentedError(f"{len(choices)} choices where {body.get('n')} were asked for")
    for choice in choices:
        if choice["finish_reason"] != "stop":
            continue
        if "response_format" in body:
            answered = json.loads(choice["message"]["content"])
            if set(answered) != set(SCHEMA["properties"]):
                raise UndocumentedError(f"no answer of the schema: {choice}")
        if body.get("tool_choice") == "required":
            raise UndocumentedError(f"no call, though one is required: {choice}")
    if answer["usage"]["completion_tokens"] > body["max_tokens"] * len(choices):
        raise UndocumentedError(f"more than max_tokens: {answer['usage']}")


async def chat_stream(site: Site) -> str:
    body = chat_body(site)
    if site.chance(0.3):
        body["reasoning_format"] = "chunks"
    return await whole_stream(site, CHAT, body, "")


async def chat_picture(site: Site) -> str:
    """More than one picture at a time may be too much for the shard: that is told as busy."""
    picture = base64.b64encode(site.dice.choice(site.pictures)).decode()
    parts = [
        {"type": "image_url", "image_url": f"data:image/png;base64,{picture}"},
        {"type": "text", "text": f"Solve it. {CANARY}"},
    ]
    messages = [{"role": "user", "content": parts}]
    body = {"messages": messages, "max_tokens": 48, "reasoning_effort": "high"}
    if site.chance(0.5):
        return await whole_stream(site, CHAT, body, "")
    return (await post(site, CHAT, body))[0]


async def complete(site: Site) -> str:
    """Prompts as texts or tokens, one or a list."""
    texts = [site.question() for _ in range(site.dice.choice((1, 1, 3, 6)))]
    body = {
        "prompt": texts if len(texts) > 1 else texts[0],
        "max_tokens": site.dice.choice((1, 24, 120)),
        "n": site.dice.choice((1, 1, 2)),
        "ignore_eos": site.chance(0.5),
        "echo": site.chance(0.3),
        "temperature": site.dice.choice((0, 1)),
    }
    if site.chance(0.5):
        return await whole_stream(site, TEXT, body, "")
    end, answer = await post(site, TEXT, body)
    if end == "ok" and len(answer["choices"]) != len(texts) * body["n"]:
        raise UndocumentedError(f"{len(answer['choices'])} choices of {len(texts)} prompts")
    return end


async def respond(site: Site) -> str:
    body: dict[str, Any] = {
        "input": site.question(),
        "instructions": f"Say {CANARY}.",
        "max_output_tokens": 80,
        "reasoning": {"effort": site.dice.choice(EFFORTS)},
    }
    if site.chance(0.3):
        body["tools"] = [{"type": "function", **TOOL}]
    if site.chance(0.5):
        end = ""
        async for event in stream(site, "/v1/responses", body):
            if isinstance(event, str):
                end = event
            elif event["type"] in ("response.completed", "response.incomplete"):
                end = "ok"
            elif event["type"] in ("response.failed", "error"):
                raise LostError(str(event)[:300])
        if not end:
            raise LostError("a stream was cut")
        return end
    return (await post(site, "/v1/responses", body))[0]


async def message(site: Site) -> str:
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": site.question()}],
        "system": f"Say {CANARY}.",
        "max_tokens": 80,
        "stop_sequences": [CANARY],
        "thinking": {"type": site.dice.choice(("adaptive", "disabled"))},
    }
    if site.chance(0.5):
        return await whole_stream(site, "/v1/messages", body, "message_stop")
    return (await post(site, "/v1/messages", body))[0]


async def count(site: Site) -> str:
    """What needs no cell."""
    messages = [{"role": "user", "content": site.question()}]
    asks = (
        ("/tokenize", {"prompt": site.question()}),
        ("/tokenize", {"messages": messages}),
        ("/detokenize", {"tokens": [300, 301, 302]}),
        ("/v1/messages/count_tokens", {"model": MODEL, "messages": messages}),
        ("/v1/responses/input_tokens", {"input": site.question()}),
    )
    return (await post(site, *site.dice.choice(asks)))[0]


async def look(site: Site) -> str:
    path = site.dice.choice(("/v1/models", "/metrics", "/health", "/live", "/openapi.json"))
    answer = await site.http.get(path, headers=site.headers())
    return check_status(answer, (200,))


async def end_thinking(site: Site) -> str:
    """Steered from a second connection, in the middle of a stream."""
    return await _steer(site, "reasoning_end")


async def cancel(site: Site) -> str:
    return await _steer(site, "cancel")


async def _steer(site: Site, action: str) -> str:
    key, end, steered, name = site.key(), "", False, ""
    body = {
        "messages": [{"role": "user", "content": site.question()}],
        "max_tokens": 400,
        "reasoning_effort": "high",
        "ignore_eos": True,
        "stream": True,
        "n": site.dice.choice((1, 2)),
    }
    headers = site.headers(key)
    async with site.http.stream("POST", CHAT, json=body, headers=headers) as answer:
        if answer.status_code != 200:
            await answer.aread()
            return check_status(answer, (200,))
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                end = end or "ok"
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if event.get("error"):
                    return check_stream_error(event["error"])
                name = event["id"]
            if name and not steered:
                steered = True
                await post(site, CONTROL, {"id": name, "action": action}, 200, key=key)
    if not end:
        raise LostError("a stream was cut")
    return end


async def spend(site: Site) -> str:
    """As a tenant whose quota is soon spent."""
    body = {"prompt": site.question(), "max_tokens": 2}
    return (await post(site, TEXT, body, key=site.poor_key))[0]


KINDS = {
    chat: 14,
    chat_stream: 14,
    chat_picture: 4,
    complete: 6,
    respond: 5,
    message: 5,
    count: 5,
    look: 4,
    end_thinking: 3,
    cancel: 3,
    spend: 2,
}
