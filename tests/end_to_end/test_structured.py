"""Answers held to a form and forced calls, over a real cluster: what clients send and get back.

The embedded model was never taught to write JSON: what it writes well-formed, it was held to.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import httpx
import openai
import pytest
from jsonschema import validate
from mistralai.client import Mistral
from pydantic import BaseModel, Field
from served import Served

from ostro.protos import generation_pb2 as pb
from ostro.protos import generation_pb2_grpc

pytestmark = pytest.mark.cluster

MODEL = "ostro-teaching-7m"
SUM = "What is 38 + 45 + 61?"
PAIR = {
    "type": "object",
    "properties": {"right": {"type": "boolean"}, "digit": {"enum": [1, 2, 3]}},
    "required": ["right", "digit"],
    "additionalProperties": False,
}


class Verdict(BaseModel):
    """A form as users of both clients write it."""

    mood: Literal["calm", "cross"]
    marks: list[Literal[1, 2]] = Field(max_length=2)


def tool(name: str, parameters: dict[str, object], *, strict: bool = False) -> dict[str, Any]:
    function = {"name": name, "parameters": parameters, "strict": strict}
    return {"type": "function", "function": function}


TOOLS = [tool("guess", PAIR), tool("wait", {"type": "object", "properties": {}})]


def ask(client: openai.OpenAI, text: str = SUM, **fields: Any) -> Any:
    settings = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 400}
    return client.chat.completions.create(**(settings | fields)).choices[0]


def schema_format(schema: dict[str, object]) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}


def test_openai_client_parses_a_pydantic_model_whole_and_streamed(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": SUM}],
        "response_format": Verdict,
        "temperature": 0,
    }
    choice = client.chat.completions.parse(**settings).choices[0]
    assert isinstance(choice.message.parsed, Verdict)
    assert choice.finish_reason == "stop"
    with client.chat.completions.stream(**settings) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == choice.message.parsed


def test_mistral_client_parses_a_pydantic_model(served: Served) -> None:
    with Mistral(api_key="none", server_url=served.url) as client:
        answer = client.chat.parse(
            Verdict, model=MODEL, messages=[{"role": "user", "content": SUM}], max_tokens=400
        )
    assert isinstance(answer.choices[0].message.parsed, Verdict)


@pytest.mark.parametrize("effort", ["none", "high"])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_answer_keeps_to_its_schema_and_thinking_stays_free(
    client: openai.OpenAI, effort: str, temperature: float
) -> None:
    choice = ask(
        client,
        response_format=schema_format(PAIR),
        temperature=temperature,
        seed=5,
        extra_body={"reasoning_effort": effort},
    )
    validate(json.loads(choice.message.content), PAIR)
    thinking = choice.message.model_extra.get("reasoning_content") or ""
    assert bool(thinking) == (effort == "high")
    if effort == "high" and temperature == 0.0:
        assert "38+45" in thinking


def test_every_choice_is_held_and_follows_its_own_seed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": SUM}],
        n=3,
        seed=1,
        temperature=1.5,
        extra_body={"structured_outputs": {"regex": "[a-z]{12}"}},
    )
    texts = [choice.message.content for choice in answer.choices]
    assert all(re.fullmatch("[a-z]{12}", text) for text in texts)
    assert len(set(texts)) == 3


def test_responses_and_messages_are_held_too(served: Served, client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model=MODEL, input=SUM, text_format=Verdict).output_parsed
    assert isinstance(parsed, Verdict)
    body = {
        "model": MODEL,
        "max_tokens": 100,
        "messages": [{"role": "user", "content": SUM}],
        "tools": [{"name": "guess", "input_schema": PAIR}],
        "tool_choice": {"type": "tool", "name": "guess"},
    }
    answer = httpx.post(f"{served.url}/v1/messages", json=body, timeout=60).json()
    (call,) = [block for block in answer["content"] if block["type"] == "tool_use"]
    validate(call["input"], PAIR)


@pytest.mark.parametrize("budget", [1, 2, 20])
def test_a_budget_closes_the_thinking_before_a_held_answer(
    client: openai.OpenAI, budget: int
) -> None:
    extra = {"reasoning_effort": "high", "thinking_token_budget": budget}
    choice = ask(client, response_format=schema_format(PAIR), extra_body=extra)
    validate(json.loads(choice.message.content), PAIR)


def test_any_object_and_its_beginning_are_completed(client: openai.OpenAI) -> None:
    prefix = {"role": "assistant", "content": '{"right": true,', "prefix": True}
    choice = ask(
        client,
        messages=[{"role": "user", "content": SUM}, prefix],
        response_format=schema_format(PAIR),
    )
    validate(json.loads(prefix["content"] + choice.message.content), PAIR)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[a-f]{2}-[0-9]{3}"}, "[a-f]{2}-[0-9]{3}"),
        ({"choice": ['say "yes"', "n\u00f6"]}, 'say "yes"|n\u00f6'),
        ({"grammar": 'start: "<" WORD ">"\nWORD: /[a-z]{1,5}/'}, "<[a-z]{1,5}>"),
    ],
    ids=["regex", "choice", "grammar"],
)
def test_forms_that_vllm_knows(client: openai.OpenAI, form: dict[str, Any], pattern: str) -> None:
    choice = ask(client, extra_body={"structured_outputs": form})
    assert re.fullmatch(pattern, choice.message.content)
    assert choice.finish_reason == "stop"


def test_a_raw_continuation_keeps_to_its_form(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="x", max_tokens=20, extra_body={"structured_outputs": {"regex": "a{7}"}}
    )
    assert answer.choices[0].text == "aaaaaaa"


@pytest.mark.parametrize("choice", ["required", "any", "guess"])
def test_a_call_is_made_where_one_is_asked_for(client: openai.OpenAI, choice: str) -> None:
    asked: Any = {"type": "function", "function": {"name": choice}} if choice == "guess" else choice
    answer = ask(client, tools=TOOLS, tool_choice=asked, parallel_tool_calls=False)
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls"
    assert not answer.message.content
    if choice == "guess":
        assert call.function.name == "guess"
    schema = next(t for t in TOOLS if t["function"]["name"] == call.function.name)
    validate(json.loads(call.function.arguments), schema["function"]["parameters"])


def test_an_answer_cut_short_says_length(client: openai.OpenAI) -> None:
    choice = ask(client, response_format=schema_format(PAIR), max_tokens=2)
    assert choice.finish_reason == "length"


def test_refusals_name_the_field(client: openai.OpenAI) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"response_format": schema_format({"type": "objekt"})}, "json_schema.schema"),
        ({"extra_body": {"structured_outputs": {"regex": "(a"}}}, "structured_outputs.regex"),
        ({"tools": TOOLS, "tool_choice": {"function": {"name": "nope"}}}, "tool_choice"),
    ]
    for fields, param in bad:
        with pytest.raises(openai.BadRequestError) as refusal:
            ask(client, **fields)
        assert str(refusal.value.param).endswith(param)


def grpc_options(**fields: Any) -> pb.GenerationOptions:
    return pb.GenerationOptions(stopping=pb.StoppingOptions(max_tokens=400), **fields)


def test_grpc_takes_every_form(stub: generation_pb2_grpc.GenerationServiceStub) -> None:
    forms = [
        (pb.OutputFormat(json_schema=json.dumps(PAIR)), r'\s*\{\s*"right".*\}'),
        (pb.OutputFormat(regex="[xy]{5}"), "[xy]{5}"),
        (pb.OutputFormat(lark='start: "lark"'), "lark"),
    ]
    for form, pattern in forms:
        stream = stub.StreamGenerate(
            pb.StreamGenerateRequest(text="x", options=grpc_options(output_format=form)), timeout=60
        )
        text = "".join(event.delta.text for event in stream)
        assert re.fullmatch(pattern, text, re.DOTALL), text


def test_grpc_forces_a_call(stub: generation_pb2_grpc.GenerationServiceStub) -> None:
    part = pb.Part(text=SUM)
    conversation = pb.Conversation(
        messages=[pb.Message(role=pb.ROLE_USER, parts=[part])],
        tools=[pb.Tool(name="guess", parameters=json.dumps(PAIR), strict=True)],
        tool_choice=pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED, forbid_parallel=True),
    )
    answer = stub.Chat(
        pb.ChatRequest(conversation=conversation, options=grpc_options()), timeout=60
    ).choices[0]
    validate(json.loads(answer.message.tool_calls[0].arguments), PAIR)
    assert answer.finish.reason == pb.FINISH_REASON_TOOL_CALLS
