"""One frontend behind both faces: stop strings, prefixes and usage, whole and streamed."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest
from grpc_face import grpc_face
from http_face import face
from pictures import digit_picture
from scripted_cell import CARD, CONFIG, END_THINK, THINK, FakeCell, Script

from ostro.cluster.frontend import Frontend
from ostro.cluster.prompt import PromptBuilder
from ostro.protos import generation_pb2 as pb
from ostro.protos import generation_pb2_grpc

PICTURE = digit_picture("7")
PICTURE_URL = "data:image/png;base64," + base64.b64encode(PICTURE).decode()


@dataclass
class Asked:
    """A chat in no dialect: "Hi", maybe after a picture, and what the answer begins with."""

    effort: str = "high"
    stop: list[str] = field(default_factory=list)
    has_picture: bool = False
    prefix: str | None = None
    prefix_thinking: str | None = None

    def http(self) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": "Hi"}]
        if self.has_picture:
            content.insert(0, {"type": "image_url", "image_url": PICTURE_URL})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.prefix is not None:
            thinking = {"reasoning_content": self.prefix_thinking}
            messages.append(
                {"role": "assistant", "content": self.prefix, "prefix": True, **thinking}
            )
        return {"messages": messages, "reasoning_effort": self.effort, "stop": self.stop}

    def grpc(self) -> dict[str, Any]:
        parts = [pb.Part(text="Hi")]
        if self.has_picture:
            parts.insert(0, pb.Part(image=pb.Image(data=PICTURE)))
        messages = [pb.Message(role=pb.ROLE_USER, parts=parts)]
        if self.prefix is not None:
            parts = [pb.Part(text=self.prefix)]
            if self.prefix_thinking is not None:
                parts.insert(0, pb.Part(thinking=pb.Thinking(text=self.prefix_thinking)))
            messages.append(pb.Message(role=pb.ROLE_ASSISTANT, parts=parts, prefix=True))
        options = pb.GenerationOptions(
            reasoning=pb.ReasoningOptions(effort=f"REASONING_EFFORT_{self.effort.upper()}"),
            stopping=pb.StoppingOptions(stop=self.stop),
        )
        return {"conversation": pb.Conversation(messages=messages), "options": options}


@dataclass
class Told:
    """What a face tells, in no dialect; `usage` is prompt, cached, image, completion, thinking."""

    thinking: str
    answer: str
    matched_stop: str | None
    usage: tuple[int, int, int, int, int]


def over_http(frontend: Frontend, asked: Asked) -> Told:
    with face(frontend) as http:
        answer = http.post("/v1/chat/completions", json=asked.http()).json()
    (choice,) = answer["choices"]
    message = choice["message"]
    thinking = message.get("reasoning_content", "")
    return Told(thinking, message["content"], choice["stop_reason"], http_usage(answer["usage"]))


def over_http_streamed(frontend: Frontend, asked: Asked) -> Told:
    with face(frontend) as http:
        text = http.post("/v1/chat/completions", json=asked.http() | {"stream": True}).text
    data = [line[6:] for line in text.split("\n\n") if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    chunks = [json.loads(line) for line in data]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    thinking, answer = (
        "".join(delta.get(name) or "" for delta in deltas)
        for name in ("reasoning_content", "content")
    )
    stop = chunks[-1]["choices"][0]["stop_reason"]
    return Told(thinking, answer, stop, http_usage(chunks[-1]["usage"]))


def http_usage(usage: dict[str, Any]) -> tuple[int, int, int, int, int]:
    prompt = usage["prompt_tokens_details"]
    thinking = usage["completion_tokens_details"]["reasoning_tokens"]
    counts = (prompt["cached_tokens"], prompt["image_tokens"], usage["completion_tokens"])
    return (usage["prompt_tokens"], *counts, thinking)


def over_grpc(frontend: Frontend, asked: Asked) -> Told:
    with grpc_face(frontend) as address, grpc.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        answer = stub.Chat(pb.ChatRequest(**asked.grpc()), timeout=20)
    (choice,) = answer.choices
    parts = choice.message.parts
    thinking = "".join(part.thinking.text for part in parts)
    text = "".join(part.text for part in parts)
    return Told(thinking, text, choice.finish.stop or None, grpc_usage(answer.usage))


def over_grpc_streamed(frontend: Frontend, asked: Asked) -> Told:
    with grpc_face(frontend) as address, grpc.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        events = list(stub.StreamChat(pb.StreamChatRequest(**asked.grpc()), timeout=20))
    thinking, answer = (
        "".join(event.delta.text for event in events if event.delta.channel == channel_of_text)
        for channel_of_text in (pb.CHANNEL_THINKING, pb.CHANNEL_ANSWER)
    )
    finish, ended = events[-2].finish, events[-1].ended
    return Told(thinking, answer, finish.stop or None, grpc_usage(ended.usage))


def grpc_usage(usage: pb.Usage) -> tuple[int, int, int, int, int]:
    counts = (usage.cached_prompt_tokens, usage.image_tokens, usage.completion_tokens)
    return (usage.prompt_tokens, *counts, usage.thinking_tokens)


FACES = [over_http, over_http_streamed, over_grpc, over_grpc_streamed]


@pytest.fixture
def script(prompts: PromptBuilder) -> Script:
    return Script(prompts)


@pytest.fixture(params=FACES, ids=lambda ask: ask.__name__)
def ask(
    request: pytest.FixtureRequest, prompts: PromptBuilder, script: Script
) -> Iterator[Callable[[Asked], tuple[Told, FakeCell]]]:
    """Asks over one of the faces; gives what it told, and the cell that played the script."""

    def asking(asked: Asked) -> tuple[Told, FakeCell]:
        cell = FakeCell(script.events)
        frontend = Frontend(cell, prompts, replace(CARD, has_vision=True), CONFIG)
        return request.param(frontend, asked), cell

    return asking


def test_a_stop_string_ends_the_answer_and_is_not_seen_even_in_part(ask, script):
    script.step("one ST").step("OP", " two").step(" three").end()
    told, cell = ask(Asked(effort="none", stop=["STOP"]))
    assert (told.answer, told.matched_stop) == ("one ", "STOP")
    assert cell.num_played == 2


def test_what_only_begins_like_a_stop_string_is_shown(ask, script):
    script.step("one ST").step("EM").step(" ST").end()
    told, _ = ask(Asked(effort="none", stop=["STOP"]))
    assert (told.answer, told.matched_stop) == ("one STEM ST", None)


def test_no_stop_string_is_matched_in_thinking_nor_from_there_on(ask, script):
    script.step(THINK, "STOP? ST", num_thinking_tokens=4).step(END_THINK, "OP ").step("ST").step(
        "OP"
    )
    told, _ = ask(Asked(stop=["STOP"]))
    assert told.thinking == "STOP? ST"
    assert (told.answer, told.matched_stop) == ("OP ", "STOP")


def test_usage_counts_cached_image_and_thinking_tokens(ask, script):
    script.step(THINK, "so", num_cached_tokens=3, num_thinking_tokens=2)
    script.step(END_THINK, "Yes", num_thinking_tokens=2).end(num_thinking_tokens=2)
    told, cell = ask(Asked(has_picture=True))
    (request,) = cell.requests
    (image,) = request.images
    assert image.num_tokens > 0
    prompt = len(request.prompt_token_ids)
    assert told.usage == (prompt, 3, image.num_tokens, script.num_tokens, 2)


def test_a_prefix_is_continued_and_not_told_again(ask, script, prompts):
    script.step(" upon a time").end()
    told, cell = ask(Asked(effort="none", prefix="Once"))
    assert told.answer == " upon a time"
    shown = prompts.table.decode(cell.requests[0].prompt_token_ids)
    assert shown.endswith("[/INST]Once")


def test_a_prefix_of_thinking_is_thought_on(ask, script, prompts):
    script.step(" see.", num_thinking_tokens=3).step(END_THINK, "Yes").end(num_thinking_tokens=3)
    told, cell = ask(Asked(prefix="", prefix_thinking="Let me"))
    assert (told.thinking, told.answer) == (" see.", "Yes")
    shown = prompts.table.decode(cell.requests[0].prompt_token_ids)
    assert shown.endswith("[THINK]Let me")
