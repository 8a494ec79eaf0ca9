"""Load: seeded prompts, and requests in a closed or an open loop.

A closed loop keeps so many requests running; each one that ends makes way for the next, so a slow
server is asked less. An open loop sends when it is time to, as callers who do not know of each
other do; its latencies count from the moment at which a request was due.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from ostro.cluster.bench_statistics import LoadRun, Outcome
from ostro.cluster.bench_stream import Prompt

_WORDS = (
    *("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with"),
    *("his", "they", "at", "be", "this", "from", "have", "or", "by", "one", "had", "not", "but"),
    *("what", "all", "were", "when", "we", "there", "can", "an", "your", "which", "their", "said"),
    *("if", "do", "will", "each", "about", "how", "up", "out", "them", "then", "she", "many"),
)

Send = Callable[[Prompt, float], Awaitable[Outcome]]


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """So many requests at a time."""

    concurrency: int

    def label(self) -> str:
        """For the names of its figures."""
        return f"c={self.concurrency}"


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Poisson arrivals.

    Attributes:
        rate_per_s: Requests that become due per second, on average.
        max_in_flight: Requests under way, at most; others wait, and the run counts them.
    """

    rate_per_s: float
    max_in_flight: int

    def label(self) -> str:
        """For the names of its figures."""
        return f"r={self.rate_per_s:g}/s"


Load = ClosedLoop | OpenLoop


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptShape:
    """What prompts are made of.

    Attributes:
        num_tokens: Of each; of text prompts about so many, a word being about one.
        as_text: Words instead of token ids.
        first_token_id: Ids are drawn from [first, end).
        end_token_id: See `first_token_id`.
        seed: With a name it fixes the prompts.
    """

    num_tokens: int
    as_text: bool
    first_token_id: int
    end_token_id: int
    seed: int = 0

    def prompts(self, num_prompts: int, name: str) -> list[Prompt]:
        """So many different prompts; another name gives others, so that no cache knows them."""
        draw = random.Random(f"{self.seed}/{name}")
        return [self._prompt(draw) for _ in range(num_prompts)]

    def _prompt(self, draw: random.Random) -> Prompt:
        if self.as_text:
            return " ".join(draw.choices(_WORDS, k=self.num_tokens))
        ids = range(self.first_token_id, self.end_token_id)
        return draw.choices(ids, k=self.num_tokens)


def poisson_arrivals(rate_per_s: float, num_requests: int, seed: str) -> list[float]:
    """Seconds from the start at which requests are due, in order; gaps are exponential."""
    draw = random.Random(seed)
    gaps_s = (draw.expovariate(rate_per_s) for _ in range(num_requests))
    return list(itertools.accumulate(gaps_s))


async def run_load(
    load: Load, send: Send, prompts: Sequence[Prompt], seed: str, on_end: Callable[[], None]
) -> LoadRun:
    """Send every prompt once.

    Args:
        load: When to send.
        send: Sends one prompt that was due at a time; never raises for a request that fails.
        prompts: What to send, in order.
        seed: Fixes the arrivals of an open loop.
        on_end: Called as each request ends.
    """
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    held: list[Prompt] = []

    async def one(prompt: Prompt, due_s: float) -> Outcome:
        outcome = await send(prompt, due_s)
        on_end()
        return outcome

    if isinstance(load, ClosedLoop):
        outcomes = await _closed(load.concurrency, one, prompts)
    else:
        offsets_s = poisson_arrivals(load.rate_per_s, len(prompts), seed)
        outcomes = await _open(load.max_in_flight, one, prompts, offsets_s, held)
    return LoadRun(
        outcomes=tuple(outcomes),
        elapsed_s=max(outcome.ended_s for outcome in outcomes) - began_s,
        cpu_s=time.process_time() - began_cpu_s,
        num_held=len(held),
    )


async def _closed(concurrency: int, send: Send, prompts: Sequence[Prompt]) -> list[Outcome]:
    queue = iter(prompts)  # shared: each prompt goes to one caller

    async def caller() -> list[Outcome]:
        return [await send(prompt, time.perf_counter()) for prompt in queue]

    outcomes = await asyncio.gather(*(caller() for _ in range(concurrency)))
    return [outcome for of_caller in outcomes for outcome in of_caller]


async def _open(
    max_in_flight: int,
    send: Send,
    prompts: Sequence[Prompt],
    offsets_s: Sequence[float],
    held: list[Prompt],
) -> list[Outcome]:
    places, began_s = asyncio.Semaphore(max_in_flight), time.perf_counter()

    async def later(prompt: Prompt, offset_s: float) -> Outcome:
        await asyncio.sleep(began_s + offset_s - time.perf_counter())
        if places.locked():
            held.append(prompt)
        async with places:
            return await send(prompt, began_s + offset_s)

    return await asyncio.gather(*map(later, prompts, offsets_s))
