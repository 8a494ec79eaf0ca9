"""One measurement of a kernel: how far it is from the truth, and how long it takes by graph replay.

Times are of CUDA graphs, so that Python's launches do not count. A graph holds every variant of a
case, each with inputs of its own, which together pass the cache.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

Launch = Callable[[], object]

_GRAPH_US = 2_000.0  # of one replay, about; shorter ones would measure its start
_MAX_LAUNCHES = 400
_PAST_CACHE_BYTES = 128 << 20  # more than twice the L2 of a Hopper
_MAX_VARIANTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kernel on inputs of one size.

    Attributes:
        operation: What runs, with its dtype where that varies: "gate_up fp8".
        size: Of its inputs: "B=32".
        launches: The same on different inputs.
        bytes_moved: That must pass the GPU's memory in one launch.
        flops: That one launch must do on tensor cores.
        flops_ceiling: Name of the ceiling of `flops`; see `Ceilings`.
        error: Runs one launch into poisoned memory and gives its relative error against float32.
        tolerance: Largest error that is right.
        others: The same work by somebody else's kernels, by name.
    """

    operation: str
    size: str
    launches: Sequence[Launch]
    bytes_moved: float
    error: Callable[[], float]
    tolerance: float
    flops: float = 0.0
    flops_ceiling: str = "bf16"
    others: Mapping[str, Sequence[Launch]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What the device does at most, measured in the same run.

    Attributes:
        copy_bytes_s: Bytes read and written by a large copy, per second.
        read_bytes_s: Bytes that a large sum reads, per second.
        flops_s: By name ("bf16", "fp8") of a large matrix product, per second.
    """

    copy_bytes_s: float
    read_bytes_s: float
    flops_s: dict[str, float]

    def bytes_s(self) -> float:
        """The faster of both."""
        return max(self.copy_bytes_s, self.read_bytes_s)

    def floor_us(self, case: Case) -> float:
        """No kernel for this case is faster, if all of its bytes come from memory."""
        memory_s = case.bytes_moved / self.bytes_s()
        return max(memory_s, case.flops / self.flops_s[case.flops_ceiling]) * 1e6


def num_variants(num_bytes: float, most: int = _MAX_VARIANTS) -> int:
    """Of inputs of so many bytes: enough to pass the cache, unless those are tiny."""
    return int(max(2, min(most, -(-_PAST_CACHE_BYTES // max(num_bytes, 1.0)))))


def poison(num_bytes: int, device: str) -> None:
    """Leave NaN in memory that the allocator hands out next."""
    torch.full((num_bytes,), 0xFF, dtype=torch.uint8, device=device)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over norm of what is right; NaN stays NaN, which nothing passes."""
    difference = torch.linalg.vector_norm(out.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()))


def largest_error(errors: Sequence[float]) -> float:
    """NaN if one is, which Python's `max` would hide."""
    return float(torch.tensor(errors).max())


def replay_us(launches: Sequence[Launch], rounds: int = 7) -> float:
    """Median time of one launch in a replayed CUDA graph, in microseconds."""

    def once() -> None:
        for launch in launches:
            launch()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # inputs may still be on their way
    with torch.cuda.stream(stream):
        once()
    stream.synchronize()
    once_us = _elapsed_us(once) / len(launches)
    repeats = max(1, min(_MAX_LAUNCHES, int(_GRAPH_US / max(once_us, 1.0))) // len(launches))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            once()
    graph.replay()
    samples = [_elapsed_us(graph.replay) for _ in range(rounds)]
    return statistics.median(samples) / (repeats * len(launches))


def _elapsed_us(run: Launch) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3
