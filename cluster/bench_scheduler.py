"""The production scheduler alone: host time and memory of a step, without a model and without Ray.

What is timed is what a shard's engine waits for: `add()`, `schedule()`, `accept()` and
`complete()`. Prompts and what the engine does with events are made outside of it.
"""

from __future__ import annotations

import cProfile
import gc
import pstats
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TypeVar

from ostro.actors.engine.request import (
    GenerationRequest,
    RequestProgress,
    SamplingParams,
    StopParams,
    TokenEvent,
)
from ostro.actors.engine.scheduler import Scheduler
from ostro.actors.engine.step import SampledToken, ScheduledStep
from ostro.actors.full_collections import FullCollections
from ostro.cluster.bench_figures import Figure
from ostro.cluster.bench_progress import Progress
from ostro.cluster.bench_statistics import percentile
from ostro.configs.deployment import EngineConfig

_PAGE_SIZE = 16
_PROMPT_TOKENS = 128
_CHURN_TOKENS = 64
_LONG_PROMPT_TOKENS = 4096
_CHUNK_TOKENS = 256
_NEVER_TOKENS = 1_000_000
_NUM_TOKEN_IDS = 32_768
_WARM_STEPS = 2 * _CHURN_TOKENS
_SAMPLED = SampledToken(7)

_Result = TypeVar("_Result")


class Scenario(StrEnum):
    """What the running requests do meanwhile.

    `DECODE`: nothing but decode. `MIXED`: besides, a long prompt is always being prefilled, 256
    tokens a step. `ARRIVALS`: each request ends after 64 tokens and a new one takes its place.
    """

    DECODE = "decode"
    MIXED = "decode and prefill"
    ARRIVALS = "decode and arrivals"


@dataclass(frozen=True, slots=True)
class StepTime:
    """What the scheduler took of one step; the CPU's time leaves out what others took of it."""

    wall_s: float
    cpu_s: float


class Rig:
    """A scheduler with so many running requests, and the part of a shard that feeds it.

    Args:
        scenario: What goes on.
        num_running: Requests that decode.
        num_steps: Steps that will be taken, at most: there are pages for so many tokens.
    """

    def __init__(self, scenario: Scenario, num_running: int, num_steps: int) -> None:
        self._scenario = scenario
        self._draw = random.Random(num_running)
        self._num_requests = 0
        self._wall_s = self._cpu_s = 0.0
        num_places = num_running + (scenario is Scenario.MIXED)
        longest = _CHURN_TOKENS if scenario is Scenario.ARRIVALS else num_steps
        pages = num_running * (-(-(_PROMPT_TOKENS + longest) // _PAGE_SIZE) + 1)
        if scenario is Scenario.MIXED:
            pages += 2 * _LONG_PROMPT_TOKENS // _PAGE_SIZE
        # Arrivals come at two prompt tokens a step for each running request.
        budget = _CHUNK_TOKENS if scenario is Scenario.MIXED else 4 * num_running + _CHUNK_TOKENS
        config = EngineConfig(
            page_size=_PAGE_SIZE,
            max_running_requests=num_places,
            max_tokens_per_step=num_running + budget,
            max_waiting_requests=num_places,
            max_waiting_tokens=num_places * _LONG_PROMPT_TOKENS,
        )
        self.scheduler = Scheduler(config, pages, _NEVER_TOKENS)
        for _ in range(num_running):
            self.scheduler.add(self._request(staggered=True))
        if scenario is Scenario.MIXED:
            self.scheduler.add(self._long_request())
        self._next = self._request() if scenario is Scenario.ARRIVALS else self._long_request()
        while self.scheduler.load().num_running < num_running:
            self.step()

    def step(self) -> StepTime:
        """Take a step; what the scheduler took of it."""
        self._wall_s = self._cpu_s = 0.0
        step = self._timed(self.scheduler.schedule)
        if step is None:
            raise RuntimeError("the scheduler has nothing to do")
        events = self._timed(partial(self._complete, step))
        self.scheduler.cache_changes()  # as a shard does, or they would pile up
        self._replace_ended(events)
        return StepTime(self._wall_s, self._cpu_s)

    def _complete(self, step: ScheduledStep) -> list[TokenEvent]:
        accept = self.scheduler.accept
        for entry in step.entries:
            if entry.samples:
                accept(entry, _SAMPLED)
        return self.scheduler.complete(step)

    def _replace_ended(self, events: Sequence[TokenEvent]) -> None:
        """Put new requests in the place of those that ended."""
        for event in events:
            is_long = event.request_id.startswith("long")
            if event.finish_reason is None and not is_long:
                continue
            if is_long:  # its first token came, so its prefill is over
                self._timed(partial(self.scheduler.cancel, event.request_id))
                self.scheduler.take_events()
            self._timed(partial(self.scheduler.add, self._next))
            self._next = self._long_request() if is_long else self._request()

    def _timed(self, work: Callable[[], _Result]) -> _Result:
        began_s, began_cpu_s = time.perf_counter(), time.thread_time()
        result = work()
        self._cpu_s += time.thread_time() - began_cpu_s
        self._wall_s += time.perf_counter() - began_s
        return result

    def _request(self, *, staggered: bool = False) -> RequestProgress:
        max_tokens = _NEVER_TOKENS
        if self._scenario is Scenario.ARRIVALS:
            max_tokens = self._draw.randint(1, _CHURN_TOKENS) if staggered else _CHURN_TOKENS
        # Lengths differ, so that not all of them fill a page in the same step.
        return self._make("r", _PROMPT_TOKENS - self._draw.randrange(_PAGE_SIZE), max_tokens)

    def _long_request(self) -> RequestProgress:
        return self._make("long", _LONG_PROMPT_TOKENS, _NEVER_TOKENS)

    def _make(self, kind: str, prompt_tokens: int, max_tokens: int) -> RequestProgress:
        self._num_requests += 1
        request = GenerationRequest(
            request_id=f"{kind}{self._num_requests}",
            prompt_token_ids=self._draw.choices(range(_NUM_TOKEN_IDS), k=prompt_tokens),
            sampling=SamplingParams(),
            stop=StopParams(max_tokens=max_tokens, ignore_eos=True),
        )
        return RequestProgress(request, arrived_s=time.monotonic())


@dataclass(frozen=True, slots=True)
class MemorySample:
    """What steps do to memory.

    Attributes:
        growth_bytes: Per step, that stay; in pure decode the output itself is part of it.
        peak_bytes: The most that a step took on top, for a moment.
    """

    growth_bytes: float
    peak_bytes: float


def measure_scheduler(
    running: Sequence[int], *, num_steps: int, rounds: int, progress: Progress
) -> list[Figure]:
    """Time and memory of every scenario at every number of running requests."""
    figures: list[Figure] = []
    for num_running in running:
        for scenario in Scenario:
            progress.note(f"{scenario.value}, {num_running} running")
            rig = _warm_rig(scenario, num_running, rounds * num_steps)
            with FullCollections():  # as in a rank, which takes them when it is at rest
                taken = [[rig.step() for _ in range(num_steps)] for _ in range(rounds)]
            rig.scheduler.check_integrity()
            memory = measure_memory(scenario, num_running, num_steps)
            figures += _figures(scenario, num_running, taken, memory)
            progress.advance()
    return figures


def _figures(
    scenario: Scenario,
    num_running: int,
    taken: Sequence[Sequence[StepTime]],
    memory: MemorySample,
) -> list[Figure]:
    wall_us = [[step.wall_s * 1e6 for step in steps] for steps in taken]
    cpu_us = [[step.cpu_s * 1e6 for step in steps] for steps in taken]
    samples: dict[tuple[str, str], list[float]] = {
        ("step p50", "us"): [statistics.median(times) for times in wall_us],
        ("step p99", "us"): [percentile(times, 99) for times in wall_us],
        ("step CPU p99", "us"): [percentile(times, 99) for times in cpu_us],
        ("growth", "B/step"): [memory.growth_bytes],
        ("peak", "B"): [memory.peak_bytes],
    }
    return [
        Figure(scenario.value, f"{quantity} running={num_running}", unit, tuple(values))
        for (quantity, unit), values in samples.items()
    ]


def measure_memory(scenario: Scenario, num_running: int, num_steps: int) -> MemorySample:
    """Bytes that a steady state gains with every step; slow, so apart from the timed steps."""
    # From the first object on: one that is freed later counts only if its making was seen.
    tracemalloc.start()
    try:
        rig = _warm_rig(scenario, num_running, num_steps)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        peaks = []
        for _ in range(num_steps):
            held, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            rig.step()
            peaks.append(tracemalloc.get_traced_memory()[1] - held)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return MemorySample((after - before) / num_steps, max(peaks))


@dataclass(frozen=True, slots=True)
class ProfileLine:
    """One function of a profile; times without what it calls, inflated by the profiler."""

    function: str
    calls_per_step: float
    own_us_per_step: float


def profile_steps(scenario: Scenario, num_running: int, num_steps: int) -> list[ProfileLine]:
    """Where the time of steps goes, the most expensive function first."""
    rig = _warm_rig(scenario, num_running, num_steps)
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(num_steps):
        rig.step()
    profile.disable()
    raw: dict[tuple[str, int, str], tuple[int, int, float, float, object]]
    raw = vars(pstats.Stats(profile))["stats"]
    lines = [
        ProfileLine(
            f"{Path(file).stem}:{line} {name}" if line else name,
            num_calls / num_steps,
            own_s / num_steps * 1e6,
        )
        for (file, line, name), (_, num_calls, own_s, _, _) in raw.items()
    ]
    return sorted(lines, key=lambda line: -line.own_us_per_step)


def _warm_rig(scenario: Scenario, num_running: int, num_steps: int) -> Rig:
    rig = Rig(scenario, num_running, _WARM_STEPS + num_running + num_steps)
    for _ in range(_WARM_STEPS):
        rig.step()
    return rig
