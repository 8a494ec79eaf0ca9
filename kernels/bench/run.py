"""Measure cases one by one: an error in one is told and the others go on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ostro.kernels.bench.measure import Case, Ceilings, Launch, largest_error, replay_us
from ostro.kernels.gpu.dependent_launch import dependent_launch


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came out of one case.

    Attributes:
        operation: Of the case.
        size: Of the case.
        us: Median time of a launch; NaN if it failed.
        floor_us: What the ceilings allow.
        gigabytes_s: Bytes that must move over the time.
        teraflops: Likewise of the FLOPs.
        error: Relative, against float32.
        is_right: Whether that is within the case's tolerance, and nothing failed.
        others_us: Times of other kernels that do the same work; "pdl" is the kernel itself, by
            dependent launches.
        failure: What went wrong, "" if nothing did.
    """

    operation: str
    size: str
    us: float
    floor_us: float
    gigabytes_s: float
    teraflops: float
    error: float
    is_right: bool
    others_us: dict[str, float]
    failure: str

    def share_of_floor(self) -> float:
        """The floor over the time: 1 is as fast as the machine can be."""
        return self.floor_us / self.us

    def line(self) -> str:
        """The figures in one short line."""
        others = "".join(f"  {name} {us:.1f}" for name, us in self.others_us.items())
        verdict = "ok" if self.is_right else "WRONG"
        return (
            f"{self.operation:15} {self.size:14} {self.us:8.1f} us {self.gigabytes_s:4.0f} GB/s"
            f" {self.teraflops:3.0f} TF {self.share_of_floor():4.0%} {verdict} {self.error:.0e}"
            f"{others} {self.failure[:60]}"
        ).rstrip()


def run_case(case: Case, ceilings: Ceilings, *, with_pdl: bool = False) -> Result:
    """Check, then time, if asked by dependent launches too; a failure is part of the result."""
    us = error = math.nan
    failure = ""
    others_us: dict[str, float] = {}
    try:
        error = case.error()
        us = replay_us(case.launches)
        for name, launches in case.others.items():
            others_us[name] = _time_of_other(launches)
        if with_pdl:
            with dependent_launch(True):
                error = largest_error((error, case.error()))
                others_us["pdl"] = replay_us(case.launches)
    except Exception as problem:  # noqa: BLE001 - one broken kernel must not hide the others
        failure = f"{type(problem).__name__}: {problem}"[:300]
    torch.cuda.synchronize()
    return Result(
        operation=case.operation,
        size=case.size,
        us=us,
        floor_us=ceilings.floor_us(case),
        gigabytes_s=case.bytes_moved / us / 1e3,
        teraflops=case.flops / us / 1e6,
        error=error,
        is_right=not failure and error <= case.tolerance,
        others_us=others_us,
        failure=failure,
    )


def _time_of_other(launches: Sequence[Launch]) -> float:
    """NaN where this torch or this GPU does not have it."""
    try:
        return replay_us(launches)
    except (RuntimeError, AttributeError, TypeError, ValueError):
        return math.nan


def run_cases(
    cases: Iterable[Case], ceilings: Ceilings, *, with_pdl: bool = False
) -> Iterator[Result]:
    """Results in order."""
    for case in cases:
        yield run_case(case, ceilings, with_pdl=with_pdl)
