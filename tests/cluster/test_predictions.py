"""A predicted answer from each face to the cell, and what usage tells of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from grpc_face import grpc_face
from http_face import HELLO as HTTP_HELLO
from http_face import face, mistral_client, openai_client, sse
from scripted_cell import CARD, CONFIG, CONTEXT, FakeCell, Script
from scripted_frontend import FINISHED, MODEL, STARTED, THOUGHTFUL, ScriptedFrontend

from ostro.actors.engine.followed_text import TOKEN_BYTES, followed_text, packed
from ostro.actors.engine.request import GenerationRequest
from ostro.actors.errors import InvalidRequestError, ShardLostError
from ostro.cluster.client import Client
from ostro.cluster.frontend import Frontend
from ostro.cluster.generation import (
    ChatGeneration,
    ChatMessage,
    Finished,
    GenerationEvent,
    GenerationOptions,
    TextDelta,
    TextGeneration,
    Usage,
)
from ostro.cluster.prompt import PromptBuilder
from ostro.cluster.retries import Retries
from ostro.protos import generation_pb2 as pb

HELLO = (ChatMessage(role="user", text="Hi"),)
DRAFTING = replace(CARD, heeds_predictions=True)
PREDICTED = Usage(
    prompt_tokens=7,
    cached_prompt_tokens=4,
    completion_tokens=11,
    thinking_tokens=5,
    accepted_prediction_tokens=6,
    rejected_prediction_tokens=3,
)
TOLD = (*THOUGHTFUL[:-1], replace(FINISHED, usage=PREDICTED))
TEXT = "one two three"


def ask(
    prompts: PromptBuilder,
    request: ChatGeneration | TextGeneration,
    *scripts: Script,
    heeds: bool = True,
) -> tuple[Finished, GenerationRequest]:
    """The last event, and what the cell was asked."""
    told = scripts or (Script(prompts).step("ok").end(),)
    cell = FakeCell([event for script in told for event in script.events])
    frontend = Frontend(cell, prompts, DRAFTING if heeds else CARD, CONFIG)
    is_chat = isinstance(request, ChatGeneration)

    async def collect(events: AsyncIterator[GenerationEvent]) -> list[GenerationEvent]:
        return [event async for event in events]

    events = asyncio.run(collect(frontend.chat(request) if is_chat else frontend.generate(request)))
    assert isinstance(events[-1], Finished)
    return events[-1], cell.requests[0]


def chat(prediction: str, **options: Any) -> ChatGeneration:
    return ChatGeneration(
        messages=HELLO, options=GenerationOptions(prediction=prediction, **options)
    )


# ---- on its way to the cell


def test_a_prediction_is_tokenized_as_an_answer_is_and_no_part_of_the_prompt(
    prompts: PromptBuilder,
) -> None:
    plain = ask(prompts, chat(""))[1]
    _, request = ask(prompts, chat(TEXT))
    assert plain.prediction == b""
    assert request.prediction == packed(prompts.text(TEXT, add_bos=False))
    assert request.prompt_token_ids == plain.prompt_token_ids


def test_names_of_control_tokens_in_a_prediction_stay_text(prompts: PromptBuilder) -> None:
    _, request = ask(prompts, chat("</s>[INST]"))
    token_ids = followed_text(request, [])._text
    assert prompts.table.decode(token_ids) == "</s>[INST]"
    assert not any(map(prompts.table.is_special, token_ids))


def test_every_choice_and_every_prompt_has_the_prediction(prompts: PromptBuilder) -> None:
    scripts = [Script(prompts, choice).step("a").end() for choice in range(4)]
    options = GenerationOptions(prediction=TEXT, num_choices=2)
    texts = TextGeneration(prompts=("Hi", "Ho"), options=options)
    _, request = ask(prompts, texts, *scripts)
    assert request.num_choices == 2
    assert request.prediction == packed(prompts.text(TEXT, add_bos=False))


def test_where_nobody_drafts_a_prediction_goes_nowhere(prompts: PromptBuilder) -> None:
    finished, request = ask(prompts, chat(TEXT), heeds=False)
    assert request.prediction == b""
    assert finished.usage.rejected_prediction_tokens == 0


@pytest.mark.parametrize(
    ("prediction", "says"),
    [("word " * CONTEXT, "context"), ("\ud800", "Unicode")],
    ids=["too long", "no text"],
)
def test_a_prediction_that_no_answer_can_be_is_refused_by_name(
    prompts: PromptBuilder, prediction: str, says: str
) -> None:
    with pytest.raises(InvalidRequestError, match=says) as refused:
        ask(prompts, chat(prediction))
    assert refused.value.param == "prediction"


# ---- usage


def test_usage_tells_the_tokens_of_the_prediction_that_came_and_the_others(
    prompts: PromptBuilder,
) -> None:
    scripts = [
        Script(prompts, 0).step("one two", num_predicted_tokens=2).end(num_predicted_tokens=2),
        Script(prompts, 1).step("six").end(num_predicted_tokens=0),
    ]
    finished, request = ask(prompts, chat(TEXT, num_choices=2), *scripts)
    size = len(request.prediction) // TOKEN_BYTES
    assert finished.usage.accepted_prediction_tokens == 2
    assert finished.usage.rejected_prediction_tokens == 2 * size - 2


def test_what_comes_after_a_stop_string_is_not_accepted(prompts: PromptBuilder) -> None:
    script = Script(prompts).step(TEXT, num_predicted_tokens=len(TEXT))
    finished, _ = ask(prompts, chat(TEXT, stop=("one",)), script)
    assert finished.usage.accepted_prediction_tokens == finished.usage.completion_tokens


def test_clients_of_both_dialects_are_told() -> None:
    prediction: Any = {"type": "content", "content": TEXT}
    asked = {"model": MODEL, "messages": HTTP_HELLO, "prediction": prediction}
    frontend = ScriptedFrontend(*TOLD)
    with face(frontend) as http:
        ours = openai_client(http).chat.completions.create(**asked)
        theirs = mistral_client(http).chat.complete(**asked)
        streamed = sse(http.post("/v1/chat/completions", json=asked | {"stream": True}).text)
    details = ours.usage.completion_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (6, 3)
    both = {
        "reasoning_tokens": 5,
        "accepted_prediction_tokens": 6,
        "rejected_prediction_tokens": 3,
    }
    assert theirs.usage.model_dump()["completion_tokens_details"] == both
    assert streamed[-1]["usage"]["completion_tokens_details"] == both
    assert [request.options.prediction for request in frontend.asked] == [TEXT] * 3


# ---- gRPC


def test_the_grpc_client_predicts_and_is_told() -> None:
    frontend = ScriptedFrontend(*TOLD)
    with grpc_face(frontend) as address, Client(address) as client:
        usage = client.chat("Hi", prediction=TEXT).usage
        by_options = pb.GenerationOptions(prediction="another")
        ended = list(client.stream_chat("Hi", options=by_options))[-1]
        list(client.generate("Hi", prediction=TEXT))
    assert (usage.accepted_prediction_tokens, usage.rejected_prediction_tokens) == (6, 3)
    assert isinstance(ended, pb.Ended)
    assert ended.usage.accepted_prediction_tokens == 6
    assert [asked.options.prediction for asked in frontend.asked] == [TEXT, "another", TEXT]


@pytest.mark.parametrize("prediction", [5, "\ud800"], ids=["a number", "no text"])
def test_the_grpc_client_refuses_what_is_no_text(prediction: Any) -> None:
    with (
        grpc_face(ScriptedFrontend()) as address,
        Client(address) as client,
        pytest.raises(InvalidRequestError) as refused,
    ):
        client.chat("Hi", prediction=prediction)
    assert refused.value.param == "prediction"


def test_a_stream_that_broke_does_not_count_what_half_of_it_told() -> None:
    class Broken(ScriptedFrontend):
        def _play(self, model: str) -> AsyncIterator[GenerationEvent]:
            lost = ShardLostError("rank 1 is gone", retry_after_s=0.01)
            hello = TextDelta(text="one ", token_ids=(5,))
            self.script = TOLD if len(self.asked) > 1 else (STARTED, hello, lost)
            return super()._play(model)

    frontend = Broken()
    retries = Retries(most=3, first_delay_s=0.001)
    with grpc_face(frontend) as address, Client(address, retries=retries) as client:
        ended = list(client.stream_chat("Hi", prediction=TEXT))[-1]
    assert isinstance(ended, pb.Ended)
    assert ended.usage.accepted_prediction_tokens == ended.usage.rejected_prediction_tokens == 0
    assert [asked.options.prediction for asked in frontend.asked] == [TEXT, TEXT]
