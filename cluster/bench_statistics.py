"""What became of the requests of a load test, and the figures made of it.

The clock is `time.perf_counter`. An *arrival* is the moment at which a read from the connection
brought at least one event with output; one arrival may hold several tokens. From that:

    TTFT   first arrival - the moment at which the request was due
    ITL    gap between two arrivals that follow each other
    TPOT   (last arrival - first arrival) / tokens after the first arrival

Which arrival held how many tokens is not known; the output tokens that the server's usage tells
are spread evenly over them, so n tokens in c arrivals leave n - n / c after the first one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


def percentile(samples: Iterable[float], percent: float) -> float:
    """Nearest rank: the smallest sample with at least `percent` of all at or below it.

    So the 99th percentile of fewer than 100 samples is the largest of them.

    Raises:
        ValueError: There is no sample, or `percent` is not in (0, 100].

    Example:
        percentile([1, 2, 3, 4], 50) is 2.
    """
    ordered = sorted(samples)
    if not ordered:
        raise ValueError("a percentile of no samples")
    if not 0 < percent <= 100:
        raise ValueError(f"percent={percent}: must be in (0, 100]")
    return ordered[math.ceil(percent / 100 * len(ordered)) - 1]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request failed: a kind to count by, and one line of detail."""

    kind: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One request of a load test.

    Attributes:
        due_s: When it should be sent; waiting for a free place after that is its latency too.
        ended_s: When its answer was complete, or it failed.
        arrivals_s: See the module's text.
        num_output_tokens: As the server's usage tells; else its token ids, else its events.
        num_prompt_tokens: As the server's usage tells; 0 if it does not.
        tells_usage: Whether the server told usage.
        failure: None if the answer came complete.
    """

    due_s: float
    ended_s: float
    arrivals_s: tuple[float, ...] = ()
    num_output_tokens: int = 0
    num_prompt_tokens: int = 0
    tells_usage: bool = True
    failure: Failure | None = None

    def ttft_s(self) -> float:
        """Seconds to the first output."""
        return self.arrivals_s[0] - self.due_s

    def gaps_s(self) -> list[float]:
        """Seconds between arrivals."""
        return [later - earlier for earlier, later in pairwise(self.arrivals_s)]

    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first arrival; None if all came at once."""
        num_arrivals = len(self.arrivals_s)
        if num_arrivals < 2:
            return None
        later_tokens = self.num_output_tokens * (1 - 1 / num_arrivals)
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / later_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What a caller wants of a request; None leaves a side open.

    Attributes:
        ttft_s: The first output comes within so many seconds.
        itl_s: The tokens after it come within so many seconds each, on average (TPOT).
    """

    ttft_s: float | None = None
    itl_s: float | None = None

    def is_set(self) -> bool:
        """Whether anything is wanted."""
        return self.ttft_s is not None or self.itl_s is not None

    def is_met(self, outcome: Outcome) -> bool:
        """Whether a request got it; one that failed did not."""
        if outcome.failure is not None:
            return False
        if self.ttft_s is not None and outcome.ttft_s() > self.ttft_s:
            return False
        tpot_s = outcome.tpot_s()
        return self.itl_s is None or tpot_s is None or tpot_s <= self.itl_s


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRun:
    """One run of a load against one server.

    Attributes:
        outcomes: One for each request that was due.
        elapsed_s: From the start to the end of the last request.
        cpu_s: CPU seconds that the client took meanwhile.
        num_held: Requests that waited because too many were in flight (open loop).
    """

    outcomes: tuple[Outcome, ...]
    elapsed_s: float
    cpu_s: float = 0.0
    num_held: int = 0

    def succeeded(self) -> list[Outcome]:
        """Requests whose answer came complete."""
        return [outcome for outcome in self.outcomes if outcome.failure is None]

    def failures(self) -> list[Failure]:
        """Why the others failed."""
        return [outcome.failure for outcome in self.outcomes if outcome.failure is not None]

    def cpu_share(self) -> float:
        """Share of one core that the client took."""
        return self.cpu_s / self.elapsed_s if self.elapsed_s else 0.0


def summarize(run: LoadRun, slo: Slo) -> dict[tuple[str, str], float]:
    """(quantity, unit) -> value, of the requests that succeeded; errors always, in first place.

    Rates are over the whole run, and goodput's share is of all requests, failed ones included.
    """
    done = run.succeeded()
    values = {("errors", "requests"): float(len(run.outcomes) - len(done))}
    if not done:
        return values
    ttft_s = [outcome.ttft_s() for outcome in done]
    gaps_s = [gap_s for outcome in done for gap_s in outcome.gaps_s()]
    tpot_s = [value for outcome in done if (value := outcome.tpot_s()) is not None]
    num_tokens = sum(outcome.num_output_tokens for outcome in done)
    num_arrivals = sum(len(outcome.arrivals_s) for outcome in done)
    values |= _both("TTFT", ttft_s) | _both("ITL", gaps_s) | _both("TPOT", tpot_s)
    values["tokens per arrival", "tokens"] = num_tokens / num_arrivals
    values["output", "tok/s"] = num_tokens / run.elapsed_s
    values["requests", "1/s"] = len(done) / run.elapsed_s
    if slo.is_set():
        num_good = sum(slo.is_met(outcome) for outcome in run.outcomes)
        values["goodput share", "%"] = 100 * num_good / len(run.outcomes)
        values["goodput", "1/s"] = num_good / run.elapsed_s
    values["client CPU", "% of a core"] = 100 * run.cpu_share()
    return values


def _both(name: str, seconds: Sequence[float]) -> dict[tuple[str, str], float]:
    if not seconds:
        return {}
    return {
        (f"{name} p50", "ms"): statistics.median(seconds) * 1e3,
        (f"{name} p99", "ms"): percentile(seconds, 99) * 1e3,
    }
