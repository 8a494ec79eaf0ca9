"""Load test of OpenAI-compatible servers: Ostro, vLLM, llama-server and their like, side by side.

Two servers take turns within every round and get the same prompts, so what a machine does
meanwhile hits both.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import aiohttp
from rich.table import Table

from ostro.actors.errors import OstroError
from ostro.cluster.bench_figures import Figure
from ostro.cluster.bench_load import ClosedLoop, Load, PromptShape, run_load
from ostro.cluster.bench_progress import Progress
from ostro.cluster.bench_statistics import Failure, LoadRun, Outcome, Slo, summarize
from ostro.cluster.bench_stream import Prompt, Target, send

_REQUESTS_PER_PLACE = 4
_FEWEST_REQUESTS = 8
_OPEN_REQUESTS = 64
_MOST_WARM_REQUESTS = 16
_BUSY_CLIENT = 0.8


class LoadTestError(OstroError):
    """A server answered no request at all."""

    code = "load_test_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What a load test does to each server.

    Attributes:
        loads: In this order within a round.
        num_requests: Of each load in each round; None takes four for every one at a time in a
            closed loop, at least 8, and 64 in an open loop.
        shape: Of the prompts.
        rounds: How often; figures are medians over rounds.
        slo: For goodput.
    """

    loads: tuple[Load, ...]
    num_requests: int | None
    shape: PromptShape
    rounds: int
    slo: Slo

    def requests_of(self, load: Load) -> int:
        """Requests of one run of a load."""
        if self.num_requests is not None:
            return self.num_requests
        if isinstance(load, ClosedLoop):
            return max(_REQUESTS_PER_PLACE * load.concurrency, _FEWEST_REQUESTS)
        return _OPEN_REQUESTS

    def warm_requests(self) -> int:
        """Requests before the first round, which count for nothing."""
        most = max(load.concurrency if isinstance(load, ClosedLoop) else 1 for load in self.loads)
        return min(most, _MOST_WARM_REQUESTS)

    def total_requests(self, num_targets: int) -> int:
        """Requests of all rounds, the warm-up included."""
        each = self.rounds * sum(self.requests_of(load) for load in self.loads)
        return num_targets * (each + self.warm_requests())


# A server's threads may spin for a while after its last request. Where two share a machine, the one
# that came next had 1.7 s instead of 0.6 s to its first tokens.
_SETTLE_S = 2.0

Runs = dict[tuple[str, Load], list[LoadRun]]


async def run_plan(
    targets: Sequence[Target], plan: LoadPlan, progress: Progress, trust: ssl.SSLContext
) -> Runs:
    """Load every server in turns.

    Args:
        targets: The servers.
        plan: What is done to each.
        progress: Told what goes on.
        trust: For those with https.

    Returns:
        The runs of each server and load, one a round.

    Raises:
        LoadTestError: A server answers no request of the warm-up; the message says why.
    """
    taken: Runs = {}
    # As many connections as requests are in flight; each request has its own timeout.
    connector = aiohttp.TCPConnector(limit=0, ssl=trust)
    no_timeout = aiohttp.ClientTimeout(total=None, sock_connect=30.0)
    async with aiohttp.ClientSession(connector=connector, timeout=no_timeout) as session:
        for target in targets:
            await _warm(session, target, plan, progress)
        for turn in range(plan.rounds):
            for load in plan.loads:
                name = f"{turn}/{load.label()}"
                prompts = plan.shape.prompts(plan.requests_of(load), name)
                for target in targets:
                    if len(targets) > 1:
                        await asyncio.sleep(_SETTLE_S)
                    progress.note(f"round {turn + 1}, {load.label()}, {target.name}")
                    run = await _run(session, target, load, prompts, name, progress)
                    taken.setdefault((target.name, load), []).append(run)
    return taken


async def _warm(
    session: aiohttp.ClientSession, target: Target, plan: LoadPlan, progress: Progress
) -> None:
    progress.note(f"warming {target.name}")
    num_requests = plan.warm_requests()
    prompts = plan.shape.prompts(num_requests, "warm")
    run = await _run(session, target, ClosedLoop(num_requests), prompts, "warm", progress)
    if not run.succeeded():
        first = run.failures()[0]
        raise LoadTestError(
            f"{target.name}: all {num_requests} requests of the warm-up to {target.endpoint()} "
            f"failed, the first with {first.kind}: {first.detail}"
        )


async def _run(
    session: aiohttp.ClientSession,
    target: Target,
    load: Load,
    prompts: Sequence[Prompt],
    seed: str,
    progress: Progress,
) -> LoadRun:
    async def to_target(prompt: Prompt, due_s: float) -> Outcome:
        return await send(session, target, prompt, due_s)

    return await run_load(load, to_target, prompts, seed, progress.advance)


def to_figures(runs: Runs, slo: Slo) -> list[Figure]:
    """One figure for each server, load and quantity; a round without answers has errors only."""
    figures: list[Figure] = []
    for (subject, load), taken in runs.items():
        samples: dict[tuple[str, str], list[float]] = {}
        for run in taken:
            for key, value in summarize(run, slo).items():
                samples.setdefault(key, []).append(value)
        figures.extend(
            Figure(subject, f"{quantity} {load.label()}", unit, tuple(values))
            for (quantity, unit), values in samples.items()
        )
    return figures


def failures_by_kind(runs: Runs) -> dict[tuple[str, str, str], tuple[int, str]]:
    """(server, load, kind) -> (how many requests failed so, the first one's detail)."""
    found: dict[tuple[str, str, str], list[Failure]] = {}
    for (subject, load), taken in runs.items():
        for failure in (failure for run in taken for failure in run.failures()):
            found.setdefault((subject, load.label(), failure.kind), []).append(failure)
    return {key: (len(failures), failures[0].detail) for key, failures in found.items()}


def failure_table(runs: Runs) -> Table:
    """Failed requests by kind."""
    table = Table(title="Failed requests")
    for name in ("server", "load", "kind", "requests", "the first one"):
        table.add_column(name)
    for (subject, load, kind), (count, detail) in failures_by_kind(runs).items():
        table.add_row(subject, load, kind, str(count), detail)
    return table


def remarks(runs: Runs, new_tokens: int) -> Iterator[str]:
    """What a reader of the figures must know of the runs, a line each."""
    for (subject, load), taken in runs.items():
        place = f"{subject}, {load.label()}"
        done = [outcome for run in taken for outcome in run.succeeded()]
        counts = Counter(
            uncounted=sum(not outcome.tells_usage for outcome in done),
            short=sum(outcome.num_output_tokens < new_tokens for outcome in done),
            held=sum(run.num_held for run in taken),
        )
        if counts["uncounted"]:
            yield (
                f"{place}: {counts['uncounted']} of {len(done)} answers tell no usage; their "
                f"tokens are counted by token ids, or one for each event"
            )
        if counts["short"]:
            yield (
                f"{place}: {counts['short']} of {len(done)} answers are shorter than {new_tokens} "
                f"tokens; see --ignore-eos and --min-tokens"
            )
        if counts["held"]:
            yield (
                f"{place}: {counts['held']} requests waited for a free place of --max-in-flight; "
                f"their latency counts from when they were due"
            )
        busiest = max(run.cpu_share() for run in taken)
        if busiest > _BUSY_CLIENT:
            yield (
                f"{place}: the client took {busiest:.0%} of a core; it may have been the bottleneck"
            )


def servers_without_answers(runs: Runs) -> list[str]:
    """Servers of which no request of any round was answered."""
    subjects = dict.fromkeys(subject for subject, _ in runs)
    return [
        subject
        for subject in subjects
        if not any(
            run.succeeded()
            for (other, _), taken in runs.items()
            for run in taken
            if other == subject
        )
    ]
