"""One measurement of a kernel: how far it is from the truth, and how long it takes by graph replay.

Times are of CUDA graphs, so that Python's launches do not count. A graph holds every variant of a
case, each with inputs of its own, which together pass the cache.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Launch = Callable[[], object]

_GRAPH_US = 2_000.0  # of one replay, about; shorter ones would measure its start
_MAX_LAUNCHES = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kernel on inputs of one size.

    Attributes:
        operation: What runs, with its dtype: "gate_up fp8".
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
    flops: float
    flops_ceiling: str
    error: Callable[[], float]
    tolerance: float
    others: dict[str, Sequence[Launch]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What the device does at most, measured in the same run.

    Attributes:
        copy_bytes_s: Bytes read and written by a large copy, per second.
        flops_s: By name ("bf16", "fp8") of a large matrix product, per second.
    """

    copy_bytes_s: float
    flops_s: dict[str, float]

    def floor_us(self, case: Case) -> float:
        """No kernel for this case is faster."""
        memory_s = case.bytes_moved / self.copy_bytes_s
        return max(memory_s, case.flops / self.flops_s[case.flops_ceiling]) * 1e6


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over norm of what is right; NaN stays NaN, which nothing passes."""
    difference = torch.linalg.vector_norm(out.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()))


def replay_us(launches: Sequence[Launch], rounds: int = 7) -> float:
    """Median time of one launch in a replayed CUDA graph, in microseconds."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    stream.synchronize()
    once_us = _elapsed_us(lambda: [launch() for launch in launches]) / len(launches)
    repeats = max(1, min(_MAX_LAUNCHES, int(_GRAPH_US / max(once_us, 1.0))) // len(launches))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for launch in launches:
                launch()
    graph.replay()
    samples = [_elapsed_us(graph.replay) for _ in range(rounds)]
    return statistics.median(samples) / (repeats * len(launches))


def call_us(run: Launch, rounds: int = 5) -> float:
    """Median time of a call that no graph can hold, the host's part included."""
    run()
    return statistics.median(_elapsed_us(run) for _ in range(rounds))


def _elapsed_us(run: Launch) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def measure_ceilings() -> Ceilings:
    """A copy of 4 GB and products of 8192 x 8192 matrices of random values."""
    num_bytes = 1 << 31
    source = torch.empty(num_bytes // 4, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    copy_us = replay_us([lambda: target.copy_(source)])
    size = 8192
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_us = replay_us([lambda: left @ right])
    flops = 2.0 * size**3
    flops_s = {"bf16": flops / product_us * 1e6}
    narrow = [x.to(torch.float8_e4m3fn) for x in (left, right)]
    one = torch.ones((), device="cuda")

    def fp8_product() -> object:
        return torch._scaled_mm(
            narrow[0], narrow[1].T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    flops_s["fp8"] = flops / replay_us([fp8_product]) * 1e6
    return Ceilings(copy_bytes_s=2.0 * num_bytes / copy_us * 1e6, flops_s=flops_s)
