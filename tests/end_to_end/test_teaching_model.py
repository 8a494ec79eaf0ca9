"""The embedded model in the default deployment: what it says is right, not only well-formed."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from contextlib import closing
from typing import Any

import anthropic
import openai
import pytest
from pictures import digit_picture
from served import Served
from typer.testing import CliRunner
from wire import Wire

from ostro.cluster.cli import app
from ostro.cluster.client import Client
from ostro.cluster.client_requests import Asked
from ostro.cluster.retries import Retries
from ostro.protos import generation_pb2 as pb
from ostro.protos import generation_pb2_grpc

pytestmark = pytest.mark.cluster

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def _ask(client: openai.OpenAI, content: Any, effort: str, **settings: Any) -> Any:
    answer = client.chat.completions.create(
        model="ostro-teaching-7m",
        messages=[{"role": "user", "content": content}],
        extra_body={"reasoning_effort": effort},
        **settings,
    )
    return answer.choices[0]


def _picture(text: str) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(digit_picture(text)).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def test_start_and_model_list_say_that_it_is_a_teaching_model(
    served: Served, client: openai.OpenAI
) -> None:
    assert "teaching model" in " ".join(served.wait_announced().split())
    model = client.models.list().data[0]
    assert model.id == "ostro-teaching-7m"
    assert "not Mistral Small 4" in model.model_extra["description"]


def test_it_says_what_it_is(client: openai.OpenAI) -> None:
    assert "teaching model" in _ask(client, "Who are you?", "none").message.content


def test_it_thinks_its_way_to_a_right_sum(client: openai.OpenAI) -> None:
    choice = _ask(client, "What is 38 + 45 + 61?", "high")
    assert choice.message.content == "144"
    assert "38+45" in choice.message.model_extra["reasoning_content"]


def test_it_gives_several_answers_each_with_its_own_thinking(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="ostro-teaching-7m",
        messages=[{"role": "user", "content": "What is 38 + 45 + 61?"}],
        n=3,
        temperature=1.0,
        seed=1,
        stream=True,
        extra_body={"reasoning_effort": "high"},
    )
    answers, thoughts = [""] * 3, [""] * 3
    for chunk in stream:
        for choice in chunk.choices:
            answers[choice.index] += choice.delta.content or ""
            thoughts[choice.index] += (choice.delta.model_extra or {}).get("reasoning") or ""
    assert "144" in answers
    assert all("38" in thought for thought in thoughts)


def test_a_budget_cuts_its_thinking_and_it_still_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="ostro-teaching-7m",
        messages=[{"role": "user", "content": "What is 847 * 26?"}],
        extra_body={"reasoning_effort": "low"},
    )
    report = answer.model_extra["reasoning"]
    assert (report["ended_by"], report["budget"]) == ("budget", report["tokens"])
    assert answer.choices[0].message.content.isdigit()


def test_it_thinks_as_well_over_grpc(stub: generation_pb2_grpc.GenerationServiceStub) -> None:
    part = pb.Part(text="What is 38 + 45 + 61?")
    message = pb.Message(role=pb.ROLE_USER, parts=[part])
    request = pb.ChatRequest(
        conversation=pb.Conversation(messages=[message]),
        options=pb.GenerationOptions(
            reasoning=pb.ReasoningOptions(effort=pb.REASONING_EFFORT_HIGH)
        ),
    )
    answer = stub.Chat(request, timeout=60).choices[0]
    assert "".join(part.text for part in answer.message.parts) == "144"
    assert answer.reasoning.ended_by == pb.ReasoningReport.ENDED_BY_MODEL


@pytest.mark.parametrize(("temperature", "num_choices"), [(0.0, 1), (0.7, 1), (0.7, 2)])
def test_a_stream_that_is_cut_says_and_counts_what_the_whole_one_does(
    served: Served, temperature: float, num_choices: int
) -> None:
    """Cut within the thinking, which has about 130 tokens."""
    Told = tuple[dict[tuple[int, int], str], dict[int, int], list[int]]

    def ask(client: Client, cut: Callable[[], None] = lambda: None) -> tuple[Told, list[str]]:
        texts, thinking, figures, kinds = {}, {}, [], []
        options = pb.GenerationOptions(choices=num_choices)
        settings = Asked(effort="high", temperature=temperature, seed=3, options=options)
        for event in client.stream_chat("What is 847 * 26?", **settings):
            kinds.append(type(event).__name__)
            if isinstance(event, pb.Delta):
                place = event.choice, event.channel
                texts[place] = texts.get(place, "") + event.text
                if kinds.count("Delta") == 20:
                    cut()
            elif isinstance(event, pb.Finish):
                thinking[event.choice] = event.report.thinking_tokens
            elif isinstance(event, pb.Ended):
                usage = event.usage
                figures = [usage.prompt_tokens, usage.completion_tokens, usage.thinking_tokens]
        return (texts, thinking, figures), kinds

    with (
        closing(Wire(served.grpc_address)) as wire,
        Client(served.grpc_address) as whole,
        Client(wire.address, retries=Retries(most=20, first_delay_s=0.05)) as broken,
    ):
        told, kinds = ask(whole)
        assert "Resumed" not in kinds
        told_by_both, kinds = ask(broken, wire.cut)
    assert told_by_both == told
    assert len(told[0]) == 2 * num_choices
    assert kinds.count("Resumed") == 1


def test_it_reads_digits(
    client: openai.OpenAI, stub: generation_pb2_grpc.GenerationServiceStub
) -> None:
    question = "Read the digits."
    content = [_picture("407"), {"type": "text", "text": question}]
    assert _ask(client, content, "high").message.content == "407"
    parts = [pb.Part(image=pb.Image(data=digit_picture("407"))), pb.Part(text=question)]
    request = pb.ChatRequest(
        conversation=pb.Conversation(messages=[pb.Message(role=pb.ROLE_USER, parts=parts)])
    )
    answer = stub.Chat(request, timeout=60)
    assert "".join(part.text for part in answer.choices[0].message.parts) == "407"
    assert answer.usage.image_tokens == 4  # three squares and the end mark


@pytest.mark.parametrize("effort", ["none", "high"])
def test_it_calls_a_tool_and_tells_its_result(client: openai.OpenAI, effort: str) -> None:
    question = "What is the weather in Paris?"
    choice = _ask(client, question, effort, tools=[WEATHER])
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    answer = client.chat.completions.create(
        model="ostro-teaching-7m",
        messages=[
            {"role": "user", "content": question},
            {"role": "assistant", "tool_calls": [call.model_dump()]},
            {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 18}'},
        ],
        tools=[WEATHER],
        extra_body={"reasoning_effort": "none"},
    )
    assert "18 degrees" in answer.choices[0].message.content


def test_the_anthropic_client_gets_thinking_tools_and_exact_counts(served: Served) -> None:
    function = WEATHER["function"]
    settings: dict[str, Any] = {
        "model": "ostro-teaching-7m",
        "tools": [
            {
                "name": function["name"],
                "description": function["description"],
                "input_schema": function["parameters"],
            }
        ],
        "thinking": {"type": "adaptive"},
    }
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    with anthropic.Anthropic(
        base_url=served.url, api_key="none", _strict_response_validation=True
    ) as client:
        counted = client.messages.count_tokens(messages=messages, **settings)
        with client.messages.stream(messages=messages, max_tokens=512, **settings) as stream:
            asked = stream.get_final_message()
        assert [block.type for block in asked.content] == ["thinking", "tool_use"]
        assert asked.stop_reason == "tool_use"
        assert asked.content[-1].input == {"city": "Paris"}
        usage = asked.usage
        assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
        assert usage.output_tokens_details.thinking_tokens > 0
        call_id = asked.content[-1].id
        told = {"type": "tool_result", "tool_use_id": call_id, "content": '{"temperature": 18}'}
        messages += [asked.to_param(), {"role": "user", "content": [told]}]
        settings["thinking"] = {"type": "disabled"}
        answer = client.messages.create(messages=messages, max_tokens=512, **settings)
    assert "18 degrees" in answer.content[-1].text
    assert answer.stop_reason == "end_turn"


def test_it_calls_no_tool_where_none_is_offered(client: openai.OpenAI) -> None:
    choice = _ask(client, "What is the weather in Paris?", "none")
    assert not choice.message.tool_calls
    assert choice.message.content


def test_it_thinks_in_responses_too(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "ostro-teaching-7m",
        "input": "What is 38 + 45 + 61?",
        "reasoning": {"effort": "high"},
    }
    with client.responses.stream(**asked) as stream:
        answer = stream.get_final_response()
    thinking, message = answer.output
    assert "38+45" in thinking.content[0].text
    assert message.content[0].text == answer.output_text == "144"
    assert answer.usage.output_tokens_details.reasoning_tokens > 0
    assert client.responses.input_tokens.count(**asked).input_tokens == answer.usage.input_tokens


def test_it_calls_a_tool_in_responses_and_reads_a_picture(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "ostro-teaching-7m",
        "tools": [{"type": "function", **WEATHER["function"]}],
        "reasoning": {"effort": "none"},
    }
    question = {"role": "user", "content": "What is the weather in Paris?"}
    (call,) = client.responses.create(**asked, input=[question]).output
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
    output = '{"temperature": 18}'
    result = {"type": "function_call_output", "call_id": call.call_id, "output": output}
    answer = client.responses.create(**asked, input=[question, call, result])
    assert "18 degrees" in answer.output_text
    parts = [
        {"type": "input_image", "image_url": _picture("407")["image_url"]["url"]},
        {"type": "input_text", "text": "Read the digits."},
    ]
    seen = client.responses.create(
        model="ostro-teaching-7m",
        input=[{"role": "user", "content": parts}],
        reasoning={"effort": "high"},
    )
    assert seen.output_text == "407"


def test_ostro_chat_answers_from_it(served: Served) -> None:
    arguments = ["chat", "--url", served.grpc_address, "--effort", "high", "What is 9 * 12?"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "108" in result.output
