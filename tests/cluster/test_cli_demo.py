"""`ostro demo` against a grpc.aio server of the test that answers what the tour wants."""

from __future__ import annotations

import asyncio
import io
import signal
from collections.abc import Iterator

import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_thread import serve_in_thread
from PIL import Image
from typer.testing import CliRunner

from ostro.cluster.cli import app
from ostro.cluster.cli_demo import TOUR, picture_lines
from ostro.protos import generation_pb2, generation_pb2_grpc

Event = generation_pb2.StreamChatResponse


class FakeModel(generation_pb2_grpc.GenerationServiceServicer):
    """Right under effort high, wrong under none; keeps what it was asked.

    Attributes:
        interrupts: Press Ctrl-C instead of answering.
    """

    url: str

    def __init__(self) -> None:
        self.requests: list[generation_pb2.StreamChatRequest] = []
        self.interrupts = False

    async def StreamChat(self, request, context):  # noqa: N802
        self.requests.append(request)
        if self.interrupts:
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(60)
        effort = request.options.reasoning.effort
        thinks = effort == generation_pb2.REASONING_EFFORT_HIGH
        yield Event(
            started=generation_pb2.Started(reasoning=generation_pb2.ReasoningOptions(effort=effort))
        )
        if thinks:
            text = "6*7=42\nand so on"
            channel = generation_pb2.CHANNEL_THINKING
            yield Event(delta=generation_pb2.Delta(channel=channel, text=text))
        if request.conversation.tools:
            call = generation_pb2.ToolCall(name="get_weather", arguments='{"city": "Paris"}')
            yield Event(tool_call=generation_pb2.ToolCallDone(call=call))
        else:
            text = self._wanted(request) if thinks else "7"
            channel = generation_pb2.CHANNEL_ANSWER
            yield Event(delta=generation_pb2.Delta(channel=channel, text=text))
        usage = generation_pb2.Usage(completion_tokens=12)
        timing = generation_pb2.Timing(total=Duration(nanos=250_000_000))
        yield Event(ended=generation_pb2.Ended(usage=usage, timing=timing))

    @staticmethod
    def _wanted(request: generation_pb2.StreamChatRequest) -> str:
        question = request.conversation.messages[-1].parts[-1].text
        return next(stop.wanted or "words" for stop in TOUR if stop.question == question)


@pytest.fixture
def model() -> Iterator[FakeModel]:
    fake = FakeModel()
    with serve_in_thread(
        lambda server: generation_pb2_grpc.add_GenerationServiceServicer_to_server(fake, server)
    ) as fake.url:
        yield fake


def test_demo_asks_every_question_at_both_efforts(model: FakeModel) -> None:
    result = CliRunner().invoke(app, ["demo", "--url", model.url])
    assert result.exit_code == 0, result.output
    assert len(model.requests) == 2 * len(TOUR)
    judged = [stop for stop in TOUR if stop.wanted]
    without_tools = [stop for stop in judged if not stop.tools]
    assert result.output.count("  right") == 2 * len(judged) - len(without_tools)
    assert result.output.count("  wrong") == len(without_tools)
    assert "        6*7=42\n        and so on\n" in result.output
    assert 'get_weather({"city": "Paris"})' in result.output
    assert "12 tokens, 0.25 s" in result.output


def test_demo_shows_its_picture_to_the_model_and_to_the_reader(model: FakeModel) -> None:
    output = CliRunner().invoke(app, ["demo", "--url", model.url]).output
    shown = [
        part.image.data
        for request in model.requests
        for part in request.conversation.messages[-1].parts
        if part.HasField("image")
    ]
    assert len(shown) == 2
    assert Image.open(io.BytesIO(shown[0])).size == (140, 28)
    assert next(line for line in picture_lines(shown[0]) if line.strip()) in output


def test_demo_ends_with_ctrl_c(model: FakeModel) -> None:
    model.interrupts = True
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    try:
        result = CliRunner().invoke(app, ["demo", "--url", model.url])
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130
    assert len(model.requests) == 1


def test_demo_says_where_nothing_answers() -> None:
    result = CliRunner().invoke(app, ["demo", "--url", "127.0.0.1:1"])
    assert result.exit_code == 1


def test_picture_lines_draw_two_pixels_in_a_character() -> None:
    picture = Image.new("L", (4, 4), 255)
    for place in ((0, 0), (1, 0), (1, 1), (2, 1)):
        picture.putpixel(place, 0)
    file = io.BytesIO()
    picture.save(file, "PNG")
    assert list(picture_lines(file.getvalue(), columns=4)) == ["▀█▄", ""]
