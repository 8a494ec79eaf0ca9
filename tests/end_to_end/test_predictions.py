"""Predicted answers over HTTP, with the clients that know them, from cells that draft."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import mistralai.client as mistral
import openai
import pytest
from local_cell import LocalCell, ProcessPool, local_cell

from ostro.cluster.frontend import Frontend
from ostro.cluster.http_ingress import build_http_app
from ostro.cluster.metrics import Metrics
from ostro.cluster.model_card import make_card
from ostro.cluster.model_paths import resolve_model
from ostro.cluster.prompt import PromptBuilder
from ostro.configs.deployment import DeploymentConfig, EngineConfig, Layout, LayoutConfig
from ostro.configs.model import load_model_config
from ostro.configs.speculation import DraftMethod, SpeculationConfig

_MODEL = resolve_model("embedded")
_NGRAM = SpeculationConfig(method=DraftMethod.NGRAM, num_draft_tokens=7, adaptive=False)
_QUESTION: Any = [{"role": "user", "content": "Who are you?"}]
_ASKED: dict[str, Any] = {"messages": _QUESTION, "temperature": 0.0, "max_tokens": 100}


@dataclass
class _Served:
    """A cell behind the HTTP face, and its clients."""

    cell: LocalCell
    name: str
    http: httpx.AsyncClient

    def __post_init__(self) -> None:
        self.openai = openai.AsyncOpenAI(
            base_url="http://ostro/v1",
            api_key="none",
            http_client=self.http,
            max_retries=0,
            _strict_response_validation=True,
        )
        self.mistral = mistral.Mistral(
            api_key="none", server_url="http://ostro", async_client=self.http
        )

    async def steps_of(self, call: Callable[[], Awaitable[Any]]) -> tuple[Any, int]:
        """What a call gives, and how many steps it took."""
        before = (await self.cell.client.state()).num_steps
        given = await call()
        return given, (await self.cell.client.state()).num_steps - before

    async def chat(self, prediction: object = None, **more: Any) -> tuple[Any, int]:
        """A whole answer of the openai client, and its steps."""
        fields = _ASKED | ({} if prediction is None else {"prediction": prediction}) | more
        return await self.steps_of(
            lambda: self.openai.chat.completions.create(model=self.name, **fields)
        )


@asynccontextmanager
async def _served(
    pool: ProcessPool, speculation: SpeculationConfig | None, layout: Layout = Layout.SINGLE
) -> AsyncIterator[_Served]:
    deployment = DeploymentConfig(
        model="embedded",
        layout=LayoutConfig(layout=layout, num_attention_shards=1, num_expert_shards=1),
        engine=EngineConfig(num_pages=512, num_threads=1, speculation=speculation),
    )
    card = make_card(_MODEL, load_model_config(_MODEL), deployment, weight_dtype="float32")
    async with local_cell(pool, deployment, _MODEL) as cell:
        prompts = PromptBuilder(_MODEL, deployment.reasoning)
        frontend = Frontend(cell.client, prompts, card, deployment)
        app = build_http_app(lambda: frontend, deployment.serving, Metrics(card.name))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), timeout=60) as http:
            yield _Served(cell, card.name, http)


def _content(text: object) -> dict[str, object]:
    return {"type": "content", "content": text}


@pytest.mark.parametrize("layout", [Layout.SINGLE, Layout.SPLIT])
def test_the_right_prediction_brings_the_same_answer_in_fewer_steps(
    pool: ProcessPool, layout: Layout
) -> None:
    async def run() -> None:
        async with _served(pool, _NGRAM, layout) as served:
            plain, num_plain_steps = await served.chat()
            answer, usage = plain.choices[0].message.content, plain.usage
            assert usage.completion_tokens_details.accepted_prediction_tokens is None
            for form in (
                answer,
                [{"type": "text", "text": part} for part in answer.partition(".")],
            ):
                predicted, num_steps = await served.chat(_content(form))
                assert predicted.choices[0].message.content == answer
                assert num_steps < num_plain_steps / 2
                assert predicted.usage.prompt_tokens == usage.prompt_tokens
                assert predicted.usage.completion_tokens == usage.completion_tokens
                details = predicted.usage.completion_tokens_details
                assert details.accepted_prediction_tokens == usage.completion_tokens - 1  # </s>
                assert details.rejected_prediction_tokens == 0
            theirs, num_steps = await served.steps_of(
                lambda: served.mistral.chat.complete_async(
                    model=served.name, prediction=_content(answer), **_ASKED
                )
            )
            assert theirs.choices[0].message.content == answer
            assert num_steps < num_plain_steps / 2

    asyncio.run(run())


def test_an_edited_text_is_followed_past_its_edits_and_after_thinking(pool: ProcessPool) -> None:
    async def run() -> None:
        async with _served(pool, _NGRAM) as served:
            plain, num_plain_steps = await served.chat(reasoning_effort="high", seed=1)
            answer = plain.choices[0].message.content
            edited = answer.replace("teaching model", "robot").replace("made by the ", "")
            predicted, num_steps = await served.chat(
                _content(edited), reasoning_effort="high", seed=1
            )
            assert predicted.choices[0].message == plain.choices[0].message
            assert num_steps < num_plain_steps * 2 / 3
            details = predicted.usage.completion_tokens_details
            assert details.accepted_prediction_tokens > details.rejected_prediction_tokens > 0

    asyncio.run(run())


def test_no_prediction_changes_an_answer(pool: ProcessPool) -> None:
    tool = {"type": "function", "function": {"name": "roll", "parameters": {"type": "object"}}}
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}}
    asked: list[dict[str, Any]] = [
        {},
        {"n": 3, "temperature": 0.9, "seed": 7},
        {"tools": [tool], "tool_choice": "required", "max_tokens": 40},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": schema},
            },
            "max_tokens": 40,
        },
        {"frequency_penalty": 1.0, "stop": "Mistral", "reasoning_effort": "low", "seed": 3},
        {"logprobs": True, "top_logprobs": 1},
    ]
    predictions = ["", "I am", "[/THINK][INST]</s>", '{"name": "roll"}', "I am a robot. " * 300]

    async def run() -> None:
        async with _served(pool, _NGRAM) as served:
            for more in asked:
                wanted, _ = await served.chat(**more)
                for prediction in predictions:
                    told, _ = await served.chat(_content(prediction), **more)
                    assert _plain(told.choices) == _plain(wanted.choices), (more, prediction[:20])

    asyncio.run(run())


def _plain(choices: list[Any]) -> list[dict[str, Any]]:
    """Without what differs from call to call: ids of calls, and digits of log probabilities."""
    plain = [choice.model_dump(exclude={"logprobs": True}) for choice in choices]
    for choice in plain:
        for call in choice["message"].get("tool_calls") or ():
            assert re.fullmatch(r"\w{9}", call.pop("id"))
    return plain


def test_a_stream_tells_what_became_of_its_prediction(pool: ProcessPool) -> None:
    async def run() -> None:
        async with _served(pool, _NGRAM) as served:
            plain, _ = await served.chat()
            answer = plain.choices[0].message.content
            stream, _ = await served.chat(
                _content(answer), stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            assert text == answer
            assert chunks[-1].usage.completion_tokens_details.rejected_prediction_tokens == 0

    asyncio.run(run())


def test_what_cannot_be_predicted_is_refused_by_name(pool: ProcessPool) -> None:
    async def run() -> None:
        async with _served(pool, _NGRAM) as served:
            with pytest.raises(openai.BadRequestError) as refused:
                await served.chat(_content("word " * 20_000))
            assert (refused.value.param, refused.value.code) == (
                "prediction",
                "context_length_exceeded",
            )

    asyncio.run(run())


def test_a_deployment_without_drafts_answers_as_well_and_says_so(pool: ProcessPool) -> None:
    async def run() -> None:
        async with _served(pool, None) as served:
            body = _ASKED | {"prediction": _content("I am a robot.")}
            told = await served.http.post("http://ostro/v1/chat/completions", json=body)
            assert told.headers["x-ignored-fields"] == "prediction"
            usage = told.json()["usage"]
            assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}
            strict = await served.http.post(
                "http://ostro/v1/chat/completions", json=body | {"strict": True}
            )
            assert (strict.status_code, strict.json()["param"]) == (422, "prediction")

    asyncio.run(run())
