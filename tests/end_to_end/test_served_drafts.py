"""The faces of a deployment with drafts: texts, counts and streams as of one without."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import httpx
import openai
import pytest
from served import Served
from typer.testing import CliRunner

from ostro.cluster.cli import app
from ostro.protos import generation_pb2 as pb
from ostro.protos import generation_pb2_grpc

pytestmark = pytest.mark.cluster

_CUPS = "The ball is under cup 2. Swap cups 2 and 4. Swap cups 1 and 3. Where is the ball?"
_ASKED = [
    {"messages": [{"role": "user", "content": _CUPS}], "reasoning_effort": "high"},
    {
        "messages": [{"role": "user", "content": "What is 47 * 26?"}],
        "reasoning_effort": "high",
        "temperature": 0.9,
        "seed": 5,
        "n": 2,
    },
    {
        "messages": [{"role": "user", "content": _CUPS}],
        "reasoning_effort": "none",
        "max_tokens": 40,
        "min_tokens": 30,
        "frequency_penalty": 0.5,
        "stop": ["qqq"],
    },
    {
        "messages": [{"role": "user", "content": "Some numbers as JSON."}],
        "reasoning_effort": "none",
        "max_tokens": 60,
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "numbers",
                "schema": {"type": "array", "items": {"type": "boolean"}, "minItems": 3},
            },
        },
    },
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One that drafts nothing, beside the default, which drafts with the embedded head."""
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with Served(log, "--set", "engine.speculation=null") as served:
        yield served


def _texts(url: str, asked: dict[str, object]) -> dict[object, list[object]]:
    """By choice: thinking, text and how it ended; and what all of it took."""
    told: dict[object, list[object]] = {}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        body = {"model": "ostro-teaching-7m", **asked}
        extra = {key: body.pop(key) for key in ("min_tokens",) if key in body}
        stream = client.chat.completions.create(
            **body,  # type: ignore[call-overload]
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
        )
        for chunk in stream:
            for choice in chunk.choices:
                of_choice = told.setdefault(choice.index, ["", "", None])
                delta = choice.delta
                of_choice[0] += getattr(delta, "reasoning_content", None) or ""  # type: ignore[operator]
                of_choice[1] += delta.content or ""  # type: ignore[operator]
                of_choice[2] = choice.finish_reason or of_choice[2]
            if chunk.usage is not None:
                details = chunk.usage.completion_tokens_details
                told["usage"] = [
                    chunk.usage.completion_tokens,
                    details.reasoning_tokens if details else None,
                ]
    return told


@pytest.mark.parametrize("asked", _ASKED, ids=["thinks", "choices", "penalties", "JSON"])
def test_streams_over_http_say_the_same(
    served: Served, plain: Served, asked: dict[str, object]
) -> None:
    told = _texts(served.url, asked)
    assert told == _texts(plain.url, asked)
    assert told["usage"][0]


def _grpc_tokens(address: str) -> dict[int, list[int]]:
    """Token ids by channel."""
    message = pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=_CUPS)])
    request = pb.StreamChatRequest(
        conversation=pb.Conversation(messages=[message]),
        options=pb.GenerationOptions(
            reasoning=pb.ReasoningOptions(effort=pb.REASONING_EFFORT_HIGH),
            sampling=pb.SamplingOptions(temperature=0),
            return_token_ids=True,
        ),
    )
    told: dict[int, list[int]] = {}
    with grpc.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        for event in stub.StreamChat(request, timeout=60):
            if event.WhichOneof("event") == "delta":
                told.setdefault(event.delta.channel, []).extend(event.delta.token_ids)
    return told


def test_streams_over_grpc_say_the_same(served: Served, plain: Served) -> None:
    told = _grpc_tokens(served.grpc_address)
    assert told == _grpc_tokens(plain.grpc_address)
    assert {pb.CHANNEL_THINKING, pb.CHANNEL_ANSWER} <= told.keys()


def test_metrics_and_status_tell_of_drafts(served: Served) -> None:
    _texts(served.url, _ASKED[0])
    metrics = httpx.get(f"{served.url}/metrics").text
    counts = {
        line.split("{")[0]: float(line.split()[-1])
        for line in metrics.splitlines()
        if line.startswith("ostro_spec_decode_num")
    }
    drafted = counts["ostro_spec_decode_num_draft_tokens_total"]
    assert drafted >= counts["ostro_spec_decode_num_accepted_tokens_total"] > 0
    result = CliRunner().invoke(app, ["status", "--url", served.grpc_address])
    assert result.exit_code == 0, result.output
    assert "tokens a step" in " ".join(result.output.split())
