"""The served model asked over its two faces, as any client would: `openai` and gRPC."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Sequence
from typing import Any, Protocol

import grpc
import openai
from PIL import Image
from problems import Reply
from rich.progress import Progress
from tasks import Example

from ostro.protos import generation_pb2 as pb
from ostro.protos import generation_pb2_grpc

MAX_TOKENS = 400
_CONCURRENCY = 64
_TIMEOUT_S = 120.0
_ENDED_BY = {
    pb.ReasoningReport.ENDED_BY_UNSPECIFIED: None,
    pb.ReasoningReport.ENDED_BY_MODEL: "model",
    pb.ReasoningReport.ENDED_BY_BUDGET: "budget",
    pb.ReasoningReport.ENDED_BY_CALLER: "caller",
}


class Face(Protocol):
    """One way in."""

    name: str

    async def ask(self, example: Example, effort: str, budget: int | None = None) -> Reply:
        """Ask greedily; `budget` replaces the effort's own thinking budget."""
        ...


def png_of(example: Example) -> bytes | None:
    """The example's picture as a file."""
    if example.image is None:
        return None
    file = io.BytesIO()
    Image.fromarray(example.image).save(file, "PNG")
    return file.getvalue()


class HttpFace:
    """OpenAI chat completions by the `openai` client."""

    name = "HTTP"

    def __init__(self, base_url: str) -> None:
        self._client = openai.AsyncOpenAI(
            base_url=base_url, api_key="-", timeout=_TIMEOUT_S, max_retries=0
        )
        self._model: str | None = None

    async def ask(self, example: Example, effort: str, budget: int | None = None) -> Reply:
        """See `Face`."""
        if self._model is None:
            self._model = (await self._client.models.list()).data[0].id
        extra: dict[str, Any] = {"reasoning_effort": effort}
        if budget is not None:
            extra["thinking_token_budget"] = budget
        began_s = time.monotonic()
        answer = await self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": self._content(example)}],
            tools=list(example.tools) or openai.omit,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=MAX_TOKENS,
            extra_body=extra,
        )
        message, usage = answer.choices[0].message, answer.usage
        report = answer.model_extra["reasoning"]
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
        return Reply(
            text=message.content or "",
            calls=tuple(calls),
            tokens=usage.completion_tokens,
            thinking_tokens=report.get("tokens", 0),
            ended_by=report.get("ended_by"),
            seconds=time.monotonic() - began_s,
        )

    @staticmethod
    def _content(example: Example) -> Any:
        png = png_of(example)
        if png is None:
            return example.question
        url = "data:image/png;base64," + base64.b64encode(png).decode()
        return [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": example.question},
        ]


class GrpcFace:
    """`GenerationService.Chat`."""

    name = "gRPC"

    def __init__(self, address: str) -> None:
        self._stub = generation_pb2_grpc.GenerationServiceStub(grpc.aio.insecure_channel(address))

    async def ask(self, example: Example, effort: str, budget: int | None = None) -> Reply:
        """See `Face`."""
        reasoning = pb.ReasoningOptions(
            effort=pb.ReasoningEffort.Value(f"REASONING_EFFORT_{effort.upper()}"),
            max_thinking_tokens=budget,
        )
        png = png_of(example)
        parts = [] if png is None else [pb.Part(image=pb.Image(data=png))]
        parts.append(pb.Part(text=example.question))
        began_s = time.monotonic()
        answer = await self._stub.Chat(
            pb.ChatRequest(
                conversation=pb.Conversation(
                    messages=[pb.Message(role=pb.ROLE_USER, parts=parts)],
                    tools=[_tool(tool["function"]) for tool in example.tools],
                ),
                options=pb.GenerationOptions(
                    reasoning=reasoning,
                    sampling=pb.SamplingOptions(temperature=0.0),
                    stopping=pb.StoppingOptions(max_tokens=MAX_TOKENS),
                ),
            ),
            timeout=_TIMEOUT_S,
        )
        message, report = answer.choices[0].message, answer.choices[0].finish.report
        return Reply(
            text="".join(part.text for part in message.parts),
            calls=tuple((call.name, call.arguments) for call in message.tool_calls),
            tokens=answer.usage.completion_tokens,
            thinking_tokens=report.thinking_tokens,
            ended_by=_ENDED_BY[report.ended_by],
            seconds=time.monotonic() - began_s,
        )


def _tool(function: dict[str, Any]) -> pb.Tool:
    return pb.Tool(
        name=function["name"],
        description=function["description"],
        parameters=json.dumps(function["parameters"]),
    )


async def ask_all(
    face: Face,
    examples: Sequence[Example],
    effort: str,
    progress: Progress,
    budget: int | None = None,
) -> list[Reply]:
    """Ask every example, some at a time; replies in their order."""
    bar = progress.add_task(f"{face.name}, {effort}", total=len(examples))
    gate = asyncio.Semaphore(_CONCURRENCY)

    async def ask(example: Example) -> Reply:
        async with gate:
            reply = await face.ask(example, effort, budget)
        progress.advance(bar)
        return reply

    try:
        return await asyncio.gather(*map(ask, examples))
    finally:
        progress.remove_task(bar)
