"""Find the fastest tiles of the grouped products on this GPU.

Variants are compiled by several processes first, as each takes a second or two; they then lie in
Triton's cache for the process that times them.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict

import torch

from ostro.kernels.bench.expert_cases import NUM_CHOSEN, NUM_EXPERTS, Layer
from ostro.kernels.bench.measure import replay_us
from ostro.kernels.gpu.tiles import Tile

# Tokens of a batch whose tiles have so many rows.
_TOKENS_OF_ROWS = {16: 32, 32: 1024, 64: 2048, 128: 8192}
_MAX_SHARED_BYTES = 232_448
_COMPILE_TIMEOUT_S = 120.0
_ROUNDS = 3


def variants(operation: str, dtype: torch.dtype, rows: int) -> list[Tile]:
    """Tiles worth trying: whose loads fit shared memory."""
    few = rows <= 32
    choices = itertools.product(
        (64, 128) if few else (64, 128, 256),  # outputs
        (4, 8),  # warps
        (3, 4, 5, 6) if few else (3, 4),  # stages
        (1, 2, 3, 4) if few else (1, 2),  # programs
    )
    num_weights = 2 if operation == "gate_up" else 1
    found = []
    for block_out, num_warps, num_stages, programs in choices:
        step_bytes = 128 * (num_weights * block_out + rows)
        sums = block_out * rows * num_weights / (32 * num_warps)
        if step_bytes * num_stages * programs > _MAX_SHARED_BYTES or sums > 160:  # noqa: PLR2004
            continue
        if block_out == 64 and num_warps == 8 and few:  # noqa: PLR2004 - half of them would idle
            continue
        found.append(
            Tile(
                block_rows=rows,
                block_out=block_out,
                block_in=128 // dtype.itemsize,
                num_warps=num_warps,
                num_stages=num_stages,
                programs_per_processor=programs,
            )
        )
    return found


def sweep(layer: Layer, rows_list: tuple[int, ...] = tuple(_TOKENS_OF_ROWS)) -> Iterator[dict]:
    """Time every variant of both products; one record each, in no order of speed."""
    compile_all(layer.name, rows_list)
    for rows in rows_list:
        batches = layer.batches(_TOKENS_OF_ROWS[rows])
        hidden = [layer.gate_up(batch) for batch in batches]
        for operation in ("gate_up", "down"):
            for cut in variants(operation, layer.dtype, rows):
                record = {"operation": operation, "dtype": str(layer.dtype), **asdict(cut)}
                try:
                    if operation == "gate_up":
                        launches = [lambda b=b, c=cut: layer.gate_up(b, c) for b in batches]
                    else:
                        launches = [
                            lambda b=b, h=h, c=cut: layer.down(b, h, c)
                            for b, h in zip(batches, hidden, strict=True)
                        ]
                    record["us"] = replay_us(launches, _ROUNDS)
                except Exception as problem:  # noqa: BLE001 - a variant may not fit this GPU
                    record["failure"] = str(problem)[:200]
                yield record


def compile_all(name: str, rows_list: tuple[int, ...]) -> None:
    """Compile every variant by as many processes as there are cores, into Triton's cache."""
    jobs = [(name, operation, rows) for operation in ("gate_up", "down") for rows in rows_list]
    parts = [(job, part) for job in jobs for part in range(4)]
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(len(parts), (os.cpu_count() or 1) - 2))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        done = [pool.submit(_compile, *job, part) for job, part in parts]
        for future in as_completed(done, timeout=_COMPILE_TIMEOUT_S):
            future.result()


def _compile(name: str, operation: str, rows: int, part: int) -> None:
    """A quarter of the variants, launched on few experts: sizes are arguments, not code."""
    from ostro.kernels.bench import expert_cases
    from ostro.kernels.gpu.grouped_gemm import down_triton, gate_up_triton
    from ostro.kernels.gpu.expert_schedule import expert_schedule_triton

    dtype = torch.float8_e4m3fn if name == "fp8" else torch.bfloat16
    experts, hidden, inner = 16, 512, 256
    expert_RK = torch.zeros(16, NUM_CHOSEN, dtype=torch.int64, device="cuda")
    counts = torch.zeros(1 + experts, dtype=torch.int64, device="cuda")
    schedule = expert_schedule_triton(expert_RK, experts, rows, counts)
    scale = torch.ones(experts, device="cuda")
    pairs = expert_RK.numel()

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, device="cuda").to(dtype)

    x, hidden_AF = zeros(pairs, hidden), zeros(pairs, inner)
    gate_up, down = zeros(experts, 2 * inner, hidden), zeros(experts, hidden, inner)
    weight_RK = torch.zeros(16, NUM_CHOSEN, device="cuda")
    del expert_cases
    for cut in variants(operation, dtype, rows)[part::4]:
        scales = {"scale_E": scale, "input_scale_E": scale} if name == "fp8" else {}
        try:
            if operation == "gate_up":
                next_scale = {"next_input_scale_E": scale} if name == "fp8" else {}
                gate_up_triton(x, gate_up, schedule, cut=cut, **scales, **next_scale)
            else:
                down_triton(
                    hidden_AF, down, weight_RK, schedule, torch.bfloat16, cut=cut, **scales
                )
        except Exception:  # noqa: BLE001 - told where it is timed
            continue
    torch.cuda.synchronize()
