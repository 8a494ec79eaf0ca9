"""What may become of a request of the soak: every end is one that is documented, or a finding."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import grpc
import httpx

BUSY = frozenset({429})
LOST = frozenset({503, 504})
_LOST_CODES = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})
# How grpc tells of a connection that was cut while a call was on it.
_CUT_CODES = frozenset(
    {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED}
)
_MOST_FINDINGS = 40


class UndocumentedError(AssertionError):
    """A request ended as none may."""


class LostError(Exception):
    """A request ended as those do whose server is killed: an error only while one was."""


@dataclass
class Weather:
    """When something was being killed: what was lost then is excused."""

    spells: list[list[float]] = field(default_factory=list)

    def begin(self) -> None:
        self.spells.append([time.monotonic(), float("inf")])

    def end(self) -> None:
        self.spells[-1][1] = time.monotonic()

    def excuses(self, began_s: float) -> bool:
        """Whether a spell overlaps a request that ends now."""
        return any(until_s >= began_s for _, until_s in self.spells)


@dataclass
class Tally:
    """How the requests of a soak ended."""

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def count(self, kind: str, end: str) -> None:
        self.ends[kind, end] += 1

    def find(self, kind: str, what: object) -> None:
        self.count(kind, "finding")
        if len(self.findings) < _MOST_FINDINGS:
            self.findings.append(f"{kind}: {what}")

    def total(self, end: str) -> int:
        return sum(count for (_, how), count in self.ends.items() if how == end)

    def __str__(self) -> str:
        kinds = sorted({kind for kind, _ in self.ends})
        lines = []
        for kind in kinds:
            ends = {end: n for (of, end), n in sorted(self.ends.items()) if of == kind}
            lines.append(f"{kind:18} " + ", ".join(f"{end} {n}" for end, n in ends.items()))
        return "\n".join(lines)


def check_status(answer: httpx.Response, wanted: Collection[int]) -> str:
    """How an HTTP request ended; the body of a refusal is read already.

    Raises:
        LostError: 503 or 504, told as they should be.
        UndocumentedError: Neither wanted, nor busy, nor lost; or told badly.
    """
    status = answer.status_code
    if status in wanted and status < 400:
        return "ok"
    told = answer.text[:300]
    if status not in {*wanted, *BUSY, *LOST}:
        raise UndocumentedError(f"status {status}: {told}")
    _check_refusal(answer, told)
    if status in LOST and status not in wanted:
        raise LostError(f"{status}: {told}")
    return "busy" if status in BUSY else "refused"


def _check_refusal(answer: httpx.Response, told: str) -> None:
    try:
        body = answer.json()
    except ValueError:
        raise UndocumentedError(f"status {answer.status_code} with no JSON: {told}") from None
    if not body.get("error", {}).get("message"):
        raise UndocumentedError(f"status {answer.status_code} without an error: {told}")
    if answer.status_code in (429, 503) and int(answer.headers.get("retry-after", 0)) < 1:
        raise UndocumentedError(f"status {answer.status_code} without Retry-After: {told}")


def check_stream_error(error: dict) -> str:
    """How a stream ended that told an error.

    Raises:
        LostError: Its server was killed.
        UndocumentedError: Anything else but an overload.
    """
    kind = error.get("type")
    if kind in ("overloaded_error", "rate_limit_error"):
        return "busy"
    if kind in ("unavailable_error", "timeout_error"):
        raise LostError(str(error))
    raise UndocumentedError(f"a stream ended with {error}")


def check_call_error(error: grpc.RpcError, wanted: Collection[grpc.StatusCode]) -> str:
    """How a gRPC call ended that failed; raises as `check_status` does."""
    code, told = error.code(), f"{error.code()}: {error.details()}"[:300]
    if code in wanted:
        return "refused"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        if "grpc-status-details-bin" not in dict(error.trailing_metadata() or ()):
            raise UndocumentedError(f"{told}, without details")
        return "busy"
    if code in _LOST_CODES or code in _CUT_CODES:
        raise LostError(told)
    raise UndocumentedError(told)
