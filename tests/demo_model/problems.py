"""Held-out problems for the evaluation, and what counts as right."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tasks
from images import image_example
from tasks import Example
from tool_tasks import tools

SEED = 777
EFFORTS = ("none", "low", "high")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Problems of one kind.

    Attributes:
        name: As the report calls it.
        note: What is asked, for the card.
        make: One problem from a generator; only held-out ones where the family holds any out.
        memorised: Whether the problems are those of the training, for which nothing is held out.
    """

    name: str
    note: str
    make: Callable[[random.Random], Example]
    memorised: bool = False


def _chat(rng: random.Random, level: str) -> Example:
    while True:
        example = tasks.chat(rng, True)
        if example.level == level:
            return example


FAMILIES = (
    Family(
        name="multiply",
        note="products of up to 3 by 2 digits",
        make=lambda rng: tasks.multiply(rng, True, _trained_level(rng)),
    ),
    Family(
        name="sums",
        note="sums of 2 to 5 numbers, differences of 2",
        make=lambda rng: tasks.sums(rng, True),
    ),
    Family(
        name="cups",
        note="a ball under 3 to 6 cups, 3 to 8 swaps",
        make=lambda rng: tasks.cups(rng, True),
    ),
    Family(
        name="image multiply",
        note="`a*b` in a picture, strips",
        make=lambda rng: image_example(rng, True, "multiply", "strip"),
    ),
    Family(
        name="image sum",
        note="`a+b` in a picture, strips",
        make=lambda rng: image_example(rng, True, "sum", "strip"),
    ),
    Family(
        name="image read",
        note="1 to 5 digits in a picture, strips, all right",
        make=lambda rng: image_example(rng, True, "read", "strip"),
    ),
    Family(
        name="image read, free",
        note="the same, any size and place on up to 224 x 84 pixels",
        make=lambda rng: image_example(rng, True, "read", "free"),
    ),
    Family(
        name="tool call",
        note="numbers and closed sets as arguments; name and arguments exactly right",
        make=lambda rng: tools(rng, True, "closed"),
    ),
    Family(
        name="two tool calls",
        note="two cities in one question",
        make=lambda rng: tools(rng, True, "pair"),
    ),
    Family(
        name="tool call, free words",
        note="an argument is a word, one in five made up",
        make=lambda rng: tools(rng, True, "free"),
    ),
    Family(
        name="no tool call",
        note="no tool is offered or none fits; right if none is called",
        make=lambda rng: tools(rng, True, "none"),
    ),
    Family(
        name="recall",
        note="who has what, 2 to 5 people",
        make=lambda rng: tasks.recall(rng, True),
    ),
    Family(
        name="capitals",
        note="30 countries",
        make=lambda rng: _chat(rng, "capital"),
        memorised=True,
    ),
    Family(
        name="about itself",
        note="greetings, who are you, what can you do",
        make=lambda rng: _chat(rng, "fixed"),
        memorised=True,
    ),
    Family(
        name="unknown",
        note="out of its scope; right if it says so",
        make=lambda rng: tasks.unknown(rng, True),
    ),
)


def _trained_level(rng: random.Random) -> tuple[int, int]:
    return rng.choices([(2, 1), (2, 2), (3, 1), (3, 2)], [12, 34, 12, 38])[0]


def problems(family: Family, count: int, seed: int = SEED) -> list[Example]:
    """The same problems whatever the effort."""
    rng = random.Random(f"{seed}/{family.name}")
    return [family.make(rng) for _ in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What one request brought, over either face.

    Attributes:
        calls: (name, arguments as JSON text).
        seconds: From the request to the last byte.
    """

    text: str
    calls: tuple[tuple[str, str], ...] = ()
    tokens: int = 0
    thinking_tokens: int = 0
    ended_by: str | None = None
    seconds: float = 0.0


def is_right(example: Example, reply: Reply) -> bool:
    """Whether text and calls are what the example wants."""
    if example.calls:
        return _calls_of(reply) == [(name, dict(given)) for name, given in example.calls]
    if example.task == "tools":
        return not reply.calls and bool(reply.text.strip())
    return not reply.calls and reply.text.strip() == example.answer


def is_valid_call(example: Example, reply: Reply) -> bool:
    """Whether every call is of an offered tool, with JSON arguments under its parameters' names."""
    calls = _calls_of(reply)
    if not calls:
        return False
    offered = {
        tool["function"]["name"]: set(tool["function"]["parameters"]["properties"])
        for tool in example.tools
    }
    return all(isinstance(given, dict) and set(given) == offered.get(name) for name, given in calls)


def _calls_of(reply: Reply) -> list[tuple[str, object]]:
    calls: list[tuple[str, object]] = []
    for name, arguments in reply.calls:
        try:
            calls.append((name, json.loads(arguments)))
        except ValueError:
            calls.append((name, None))
    return calls


def digits_right(examples: Sequence[Example], replies: Sequence[Reply]) -> float:
    """Share of single digits read right, by place; a reply of another length counts as wrong."""
    right = total = 0
    for example, reply in zip(examples, replies, strict=True):
        digits = re.sub(r"\D", "", reply.text)
        total += len(example.answer)
        if len(digits) == len(example.answer):
            right += sum(a == b for a, b in zip(digits, example.answer, strict=True))
    return right / total
