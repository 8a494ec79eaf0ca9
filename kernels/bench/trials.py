"""Time configurations of kernels, compiled beforehand by several processes.

Each takes a second or two to compile; they then lie in Triton's cache for the process that times
them. Sizes are arguments of kernels, not code, so tiny inputs compile what large ones run.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch

from ostro.kernels.bench.measure import Launch, replay_us

MAX_SHARED_BYTES = 232_448  # of a block, on Hopper and Blackwell
_COMPILE_TIMEOUT_S = 150.0
_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One configuration of a kernel, timed.

    Attributes:
        operation: What runs.
        dtype: Of its weights or its cache: "bfloat16".
        size: Of its inputs: "B=32".
        cut: How it was launched, by the names of the configuration's fields.
        us: Median time of a launch; None if it failed.
        failure: What went wrong, "" if nothing did.
    """

    operation: str
    dtype: str
    size: str
    cut: dict[str, int]
    us: float | None
    failure: str = ""

    def label(self) -> str:
        """The configuration in few letters: "64 128 w4 s3 p2"."""
        short = {"num_warps": "w", "num_stages": "s", "programs_per_processor": "p"}
        return " ".join(f"{short.get(name, '')}{value}" for name, value in self.cut.items())


def tried(
    operation: str, dtype: torch.dtype, size: str, cut: dict[str, int], launches: Sequence[Launch]
) -> Trial:
    """Time one configuration; a failure becomes part of the trial."""
    us, failure = None, ""
    try:
        us = replay_us(launches, _ROUNDS)
    except Exception as problem:  # noqa: BLE001 - a variant may not fit this GPU
        failure = f"{type(problem).__name__}: {problem}"[:200]
    return Trial(
        operation=operation,
        dtype=str(dtype).removeprefix("torch."),
        size=size,
        cut=cut,
        us=us,
        failure=failure,
    )


def compile_all(jobs: Sequence[Callable[[], object]]) -> None:
    """Run launches in as many processes as there are cores.

    Args:
        jobs: Of module-level functions, so that other processes find them.
    """
    workers = max(1, min(len(jobs), (os.cpu_count() or 1) - 2))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context)
    done = [pool.submit(quietly, job) for job in jobs]
    try:
        for future in as_completed(done, timeout=_COMPILE_TIMEOUT_S):
            future.result()
    except TimeoutError:
        return  # what is left compiles where it is timed
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def quietly(job: Callable[[], object]) -> None:
    """Launch; an error is left to who times the same."""
    try:
        job()
        torch.cuda.synchronize()
    except Exception:  # noqa: BLE001 - whatever a compiler raises
        return


def by_time(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Trials that ran, the fastest first, in groups of one operation, dtype and size."""
    groups: dict[tuple[str, str, str], list[Trial]] = {}
    for trial in trials:
        group = groups.setdefault((trial.operation, trial.dtype, trial.size), [])
        if trial.us is not None:
            group.append(trial)
    return [sorted(group, key=lambda trial: trial.us or 0.0) for group in groups.values() if group]
