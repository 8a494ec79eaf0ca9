"""How often each family is drawn, and conversations of several turns around the questions."""

from __future__ import annotations

import random
from collections.abc import Callable

import tasks
from tasks import Example
from tool_tasks import tools

TEXT_TASKS: dict[str, Callable[..., Example]] = {
    "multiply": tasks.multiply,
    "sums": tasks.sums,
    "cups": tasks.cups,
    "tools": tools,
    "recall": tasks.recall,
    "chat": tasks.chat,
    "unknown": tasks.unknown,
}
_WEIGHTS = {
    "multiply": 27,
    "sums": 30,
    "cups": 9,
    "tools": 21,
    "recall": 3,
    "chat": 5,
    "unknown": 5,
}
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Be brief.",
    "You are a helpful assistant. Answer in English.",
    "Answer the question.",
    "You are a teaching model.",
)


def text_example(rng: random.Random, held_out: bool = False) -> Example:
    """One question without an image, of any family."""
    name = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
    return TEXT_TASKS[name](rng, held_out)
