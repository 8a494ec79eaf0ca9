"""`ostro demo`: a tour of what the embedded model can do, asked of a running cluster over gRPC."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import typer
from PIL import Image
from rich.console import Console
from rich.text import Text

from ostro.cluster.cli_connection import DEFAULT_URL, Url, open_client
from ostro.cluster.cli_console import make_console, plain_errors, printable
from ostro.cluster.cli_tls import Ca, Cert, Key, read_tls
from ostro.cluster.client_requests import tool
from ostro.cluster.conversation import ChatOptions, Conversation, Turn
from ostro.protos import generation_pb2

_PICTURE = Path(__file__).parent / "teaching_model" / "example.png"
_EFFORTS = ("none", "high")
_WEATHER = tool(
    "get_weather",
    "Get the weather in a city",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """One question of the tour.

    Attributes:
        wanted: The right answer; None if there is more than one.
        image: A picture to show with it.
        tools: Tools on offer.
    """

    title: str
    question: str
    wanted: str | None = None
    image: Path | None = None
    tools: tuple[generation_pb2.Tool, ...] = ()


TOUR = (
    Stop(title="Products", question="What is 847 * 26?", wanted="22022"),
    Stop(title="Sums", question="What is 478 + 95 + 364 + 83?", wanted="1020"),
    Stop(
        title="Keeping track",
        question="The ball is under cup 2. Swap cups 2 and 4. Swap cups 1 and 3. "
        "Swap cups 4 and 1. Swap cups 3 and 2. Swap cups 5 and 1. Where is the ball?",
        wanted="5",
    ),
    Stop(title="A picture", question="Solve it.", wanted="4368", image=_PICTURE),
    Stop(
        title="A tool call",
        question="What is the weather in Paris?",
        wanted='get_weather({"city": "Paris"})',
        tools=(_WEATHER,),
    ),
    Stop(title="A fact", question="What is the capital of Norway?", wanted="Oslo"),
    Stop(title="What it is", question="Who are you?"),
    Stop(title="What it does not know", question="Why is the sky blue?"),
)


@plain_errors()
def demo(url: Url = DEFAULT_URL, ca: Ca = None, cert: Cert = None, key: Key = None) -> None:
    """Ask a running cluster one question of every kind that the embedded model knows.

    Each is asked twice, to be answered at once (effort none) and with thinking (effort high).
    Ctrl-C ends the tour.
    """
    console = make_console()
    with open_client(url, read_tls(ca, cert, key)) as client:
        for stop in TOUR:
            _show_question(stop, console)
            for effort in _EFFORTS:
                conversation = Conversation(client, ChatOptions(effort=effort, tools=stop.tools))
                if stop.image is not None:
                    conversation.attach(stop.image.read_bytes())
                turn = conversation.ask(stop.question, lambda *_: None)
                if turn.is_cancelled:
                    raise typer.Exit(130)
                _show_answer(stop, turn, console)
    console.print()
    console.print("Ask it yourself: ostro chat --effort high", highlight=False)


def _show_question(stop: Stop, console: Console) -> None:
    console.print()
    console.print(Text.assemble((f"{stop.title}: ", "bold"), stop.question), soft_wrap=True)
    if stop.image is not None:
        for line in picture_lines(stop.image.read_bytes()):
            console.print("  " + line, highlight=False)
    for offered in stop.tools:
        console.print(Text(f"  on offer: {offered.name}, {offered.description.lower()}", "dim"))


def _show_answer(stop: Stop, turn: Turn, console: Console) -> None:
    calls = [f"{call.name}({call.arguments})" for call in turn.calls]
    answer = printable(turn.answer or ", ".join(calls))
    mark, style = "", ""
    if stop.wanted is not None:
        mark, style = ("  right", "green") if answer == stop.wanted else ("  wrong", "red")
    for line in printable(turn.thinking).splitlines():
        console.print(Text(f"        {line}", "dim"), soft_wrap=True)
    console.print(
        Text.assemble(
            (f"  {turn.effort:<6}", "bold"),
            answer,
            (mark, style),
            (f"  {turn.usage.completion_tokens} tokens, {turn.total_s:.2f} s", "dim"),
        ),
        soft_wrap=True,
    )


def picture_lines(data: bytes, columns: int = 70) -> Iterator[str]:
    """An image in characters, two pixels in each: dark ink on light paper."""
    image = Image.open(io.BytesIO(data)).convert("L")
    rows = max(1, round(image.height * columns / image.width / 2))
    ink = [value < 128 for value in image.resize((columns, 2 * rows)).tobytes()]
    for start in range(0, len(ink), 2 * columns):
        upper = ink[start : start + columns]
        lower = ink[start + columns : start + 2 * columns]
        pairs = zip(upper, lower, strict=True)
        yield "".join(" ▀▄█"[above + 2 * below] for above, below in pairs).rstrip()
