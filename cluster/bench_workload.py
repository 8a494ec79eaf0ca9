"""What the engine benchmark asks for, and what it learns from one answer."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum, auto

_FIRST_TOKEN_ID = 1000


class Question(Enum):
    """What a workload is to tell.

    `DECODE`: tokens per second of a batch. `PREFILL`: prompt tokens per second, until the first
    token. `CONTEXT`: tokens per second with so many tokens in the context already.
    """

    DECODE = auto()
    PREFILL = auto()
    CONTEXT = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests of one size, all at once.

    Attributes:
        batch: Requests that run together.
        prompt_tokens: Of each.
        new_tokens: Of each; greedy, the end token ignored.
        question: Which figures it gives.
    """

    batch: int
    prompt_tokens: int = 128
    new_tokens: int = 64
    question: Question = Question.DECODE

    def label(self) -> str:
        """The quantity whose figure is `tokens_per_s`."""
        if self.question is Question.PREFILL:
            return f"prefill of {self.prompt_tokens}"
        if self.question is Question.CONTEXT:
            return f"decode after {self.prompt_tokens}"
        return f"decode B={self.batch}"

    def tokens_per_s(self, sample: DecodeSample) -> float:
        """What the workload is to tell.

        Raises:
            ValueError: The sample is of a workload without decode, and this one asks for it.
        """
        if self.question is Question.PREFILL:
            return self.batch * self.prompt_tokens / sample.first_token_s
        if sample.step_s is None:
            raise ValueError(f"{self.label()}: no steps in which all requests decoded")
        return self.batch / sample.step_s

    def num_pages(self, page_size: int) -> int:
        """Pages that its requests fill, with one to spare for each."""
        return self.batch * (-(-(self.prompt_tokens + self.new_tokens) // page_size) + 1)


@dataclass(frozen=True, slots=True)
class DecodeSample:
    """One run of a workload.

    Attributes:
        step_s: Median seconds between a request's tokens once all requests decode; None if there
            is one token.
        first_token_s: Median seconds to a request's first token.
        seconds: Seconds by stage within the run, over all ranks.
        num_steps: Steps of the run.
    """

    step_s: float | None
    first_token_s: float
    seconds: dict[str, float]
    num_steps: int


def prefill_workloads(prompt_tokens: list[int]) -> list[Workload]:
    """One long prompt each, and its first token."""
    return [
        Workload(batch=1, prompt_tokens=size, new_tokens=1, question=Question.PREFILL)
        for size in prompt_tokens
    ]


def context_workloads(prompt_tokens: list[int], new_tokens: int) -> list[Workload]:
    """One request each that decodes after so many tokens."""
    return [
        Workload(batch=1, prompt_tokens=size, new_tokens=new_tokens, question=Question.CONTEXT)
        for size in prompt_tokens
    ]


def prompts(workload: Workload, vocab_size: int, seed: int) -> list[list[int]]:
    """Seeded random prompts, the same for every subject of a round."""
    draw = random.Random(seed)
    first_id = min(_FIRST_TOKEN_ID, vocab_size // 2)
    return [
        [draw.randrange(first_id, vocab_size) for _ in range(workload.prompt_tokens)]
        for _ in range(workload.batch)
    ]
