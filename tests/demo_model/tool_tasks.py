"""Tool calls: questions with tools on offer, the call to make, and what to say of its result.

Nine tools, each under one name; arguments are numbers, words of closed sets (cities, rooms, people)
and, in two tools, free words. Which tools are on offer varies, and with it whether any fits.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tasks
from tasks import CAPITALS, NAMES, Example, vary, word

CITIES = (
    *sorted(CAPITALS.values()),
    *"Lyon Milan Porto Turin Delft Ghent Basel Graz Nice Kyoto Leeds Bonn Pisa Perth".split(),
)
ROOMS = "kitchen bedroom bathroom office garage hall garden".split()
NO_TOOL = "I would need a tool for that, and none fits."


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of tool.

    Attributes:
        name: What it is called.
        description: What its definition says.
        parameters: Name and JSON type of each.
        ask: Questions, with a place per argument.
        draw: Arguments in the order of the parameters.
        result: The tool's result and the answer to it, from the arguments.
        closed: Whether every argument is a number or of a closed set.
    """

    name: str
    description: str
    parameters: tuple[tuple[str, str], ...]
    ask: tuple[str, ...]
    draw: Callable[[random.Random], tuple[Any, ...]]
    result: Callable[[random.Random, tuple[Any, ...]], tuple[str, str]]
    closed: bool = True


def _two_numbers(rng: random.Random) -> tuple[int, int]:
    return rng.randrange(2, 1000), rng.randrange(2, 1000)


def _city(rng: random.Random) -> tuple[str]:
    return (rng.choice(CITIES),)


def _weather(rng: random.Random, args: tuple[Any, ...]) -> tuple[str, str]:
    degrees = rng.randrange(-9, 40)
    return json.dumps({"temperature": degrees}), f"It is {degrees} degrees in {args[0]}."


def _time(rng: random.Random, args: tuple[Any, ...]) -> tuple[str, str]:
    clock = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
    return json.dumps({"time": clock}), f"It is {clock} in {args[0]}."


def _value(compute: Callable[[int, int], int]) -> Callable[..., tuple[str, str]]:
    def result(_: random.Random, args: tuple[Any, ...]) -> tuple[str, str]:
        value = compute(*args)
        return json.dumps({"result": value}), f"The result is {value}."

    return result


def _done(_: random.Random, __: tuple[Any, ...]) -> tuple[str, str]:
    return json.dumps({"ok": True}), "Done."


_A, _B, _CITY = ("a", "integer"), ("b", "integer"), ("city", "string")

KINDS = (
    _Kind(
        "get_weather",
        "Get the weather in a city",
        (_CITY,),
        (
            "What is the weather in {}?",
            "How is the weather in {} today?",
            "What's the weather like in {}?",
            "Weather in {}?",
            "Is the weather good in {}?",
        ),
        _city,
        _weather,
    ),
    _Kind(
        "get_time",
        "Get the local time in a city",
        (_CITY,),
        ("What time is it in {}?", "Tell me the time in {}.", "What is the time in {} now?"),
        _city,
        _time,
    ),
    _Kind(
        "multiply",
        "Multiply two numbers",
        (_A, _B),
        (
            "Use the tool to multiply {} by {}.",
            "What is {} times {}? Use a tool.",
            "What is {} times {}?",
            "What is {} * {}?",
            "Multiply {} and {} with the tool.",
        ),
        _two_numbers,
        _value(lambda a, b: a * b),
    ),
    _Kind(
        "add",
        "Add two numbers",
        (_A, _B),
        (
            "Use the tool to add {} and {}.",
            "What is {} plus {}? Use a tool.",
            "What is {} plus {}?",
            "What is {} + {}?",
            "Add {} and {} with the tool.",
        ),
        _two_numbers,
        _value(lambda a, b: a + b),
    ),
    _Kind(
        "set_timer",
        "Set a timer",
        (("minutes", "integer"),),
        ("Set a timer for {} minutes.", "Start a timer of {} minutes.", "Timer for {} minutes"),
        lambda rng: (rng.randrange(1, 200),),
        _done,
    ),
    _Kind(
        "set_light",
        "Set the light in a room",
        (("room", "string"), ("level", "integer")),
        (
            "Set the light in the {} to {}.",
            "Set the {} light to {} percent.",
            "Put the light in the {} at {}.",
        ),
        lambda rng: (rng.choice(ROOMS), rng.randrange(0, 101)),
        _done,
    ),
    _Kind(
        "call_person",
        "Call a person",
        (("name", "string"),),
        ("Call {}.", "Please call {} now.", "Phone {}."),
        lambda rng: (rng.choice(NAMES),),
        _done,
    ),
    _Kind(
        "send_message",
        "Send a message to a person",
        (("to", "string"), ("text", "string")),
        ("Send {} the message: {}", "Write to {}: {}", "Tell {}: {}"),
        lambda rng: (rng.choice(NAMES), word(rng)),
        _done,
        closed=False,
    ),
    _Kind(
        "define",
        "Look up a word in the dictionary",
        (("word", "string"),),
        ("Look up the word {}.", "Define {}.", "Look up {} in the dictionary."),
        lambda rng: (word(rng),),
        lambda rng, args: (json.dumps({"found": False}), "The dictionary does not know it."),
        closed=False,
    ),
)


def _definition(rng: random.Random, kind: _Kind) -> dict[str, Any]:
    described = rng.random() < 0.3
    properties = {
        key: {"type": type_, **({"description": f"The {key}"} if described else {})}
        for key, type_ in kind.parameters
    }
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": kind.name, "description": kind.description, "parameters": schema}
    return {"type": "function", "function": function}


def tools(rng: random.Random, held_out: bool, level: str | None = None) -> Example:
    """One to four tools on offer: one fits, or none does and the question is answered as ever.

    Levels: "closed" and "free" (by the arguments), "pair" (two calls), "none" (none fits).
    """
    level = level or rng.choices(["closed", "free", "pair", "none"], [58, 8, 8, 26])[0]
    if level == "none":
        return _no_call(rng, held_out)
    kinds = [kind for kind in KINDS if kind.closed is (level != "free")]
    kind = rng.choice(KINDS[:2] if level == "pair" else kinds)
    others = rng.sample([other for other in KINDS if other is not kind], rng.randint(0, 3))
    offered = [_definition(rng, one) for one in [kind, *others]]
    rng.shuffle(offered)
    if level == "pair":
        every = [(city,) for city in rng.sample(CITIES, 2)]
        question = rng.choice(kind.ask[:3]).format(f"{every[0][0]} and {every[1][0]}")
    else:
        every = [kind.draw(rng)]
        question = rng.choice(kind.ask).format(*every[0])
    keys = [key for key, _ in kind.parameters]
    calls = tuple((kind.name, dict(zip(keys, args, strict=True))) for args in every)
    results = [kind.result(rng, args) for args in every]
    with_results = rng.random() < 0.3
    return Example(
        task="tools",
        level=level,
        question=vary(rng, question) if level != "free" else question,
        working="; ".join(_thought(*call) for call in calls),
        tools=tuple(offered),
        calls=calls,
        results=tuple(result for result, _ in results) if with_results else (),
        final=" ".join(said for _, said in results) if with_results else "",
    )


def _thought(name: str, arguments: dict[str, Any]) -> str:
    return f"{name}: " + ", ".join(f"{key}={value}" for key, value in arguments.items())


def _is_for(tool: dict[str, Any], task: str) -> bool:
    words = {"multiply": "Multiply", "sums": "Add"}
    return task in words and tool["function"]["description"].startswith(words[task])


def _no_call(rng: random.Random, held_out: bool) -> Example:
    """Tools that do not fit, or a question for a tool that is not on offer."""
    chosen = rng.sample(KINDS, rng.randint(0, 3))
    offered = tuple(_definition(rng, kind) for kind in chosen)
    if rng.random() < 0.4 or not offered:
        missing = [kind for kind in KINDS if kind not in chosen and kind.closed]
        kind = rng.choice(missing)
        asked = [form for form in kind.ask if "tool" in form] or kind.ask
        return Example(
            task="tools",
            level="none",
            question=vary(rng, rng.choice(asked).format(*kind.draw(rng))),
            working="No tool fits.",
            answer=NO_TOOL,
            tools=offered,
        )
    plain = rng.choice([tasks.multiply, tasks.sums, tasks.chat, tasks.cups])(rng, held_out)
    offered = tuple(tool for tool in offered if not _is_for(tool, plain.task))
    return Example(
        task="tools",
        level="none",
        question=plain.question,
        working=plain.working,
        answer=plain.answer,
        tools=offered,
    )
