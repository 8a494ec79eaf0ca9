"""The whole benchmark: parts and sweeps by name, results as they come, and all of it in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from ostro.kernels.bench import (
    attention_cases,
    expert_cases,
    expert_layers,
    few_row_cases,
    linear_cases,
    prefill_cases,
    sampling_cases,
    small_cases,
    sweep,
    sweep_attention,
    sweep_linear,
)
from ostro.kernels.bench.ceilings import gpu_name, measure_ceilings
from ostro.kernels.bench.json_text import json_text
from ostro.kernels.bench.measure import Case, Ceilings
from ostro.kernels.bench.run import Result, run_cases
from ostro.kernels.bench.sizes import Sizes
from ostro.kernels.bench.trials import Trial, by_time
from ostro.kernels.bench.tuned import best_tiles, write_tuned
from ostro.kernels.gpu.tiles import FP4
from ostro.kernels.latent_cache import FP8_ROWS

_SIZES = Sizes()
_FP8_CACHE = replace(_SIZES, cache_dtype=FP8_ROWS)
_NUM_TOLD = 3  # of the fastest configurations
_DTYPES = {"fp8": expert_layers.FP8, "bf16": torch.bfloat16, "nvfp4": FP4}


@dataclass(slots=True)
class Report:
    """What was measured so far.

    Attributes:
        device: Name of the GPU.
        ceilings: Of the same run.
        results: Of cases, in order.
        trials: Of sweeps, in order.
        failures: Parts and sweeps that ended with an error, and the error.
    """

    device: str
    ceilings: Ceilings
    results: list[Result] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def is_right(self) -> bool:
        """Every kernel agreed with its reference, and all of it ran."""
        return not self.failures and all(result.is_right for result in self.results)

    def title(self) -> str:
        """The device and what it does at most, in one line."""
        c = self.ceilings
        flops = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in c.flops_s.items())
        copy, read = c.copy_bytes_s / 1e12, c.read_bytes_s / 1e12
        return f"{self.device}: copy {copy:.2f} TB/s, read {read:.2f} TB/s, {flops}"

    def write(self, path: Path | None) -> None:
        """As JSON; nowhere if that is None."""
        if path is not None:
            path.write_text(json_text(asdict(self)))


def _expert_cases(name: str) -> Iterator[Case]:
    yield from expert_cases.cases(expert_layers.make_layer(_DTYPES[name], _SIZES))


PARTS: dict[str, Callable[[], Iterator[Case]]] = {
    "experts_fp8": partial(_expert_cases, "fp8"),
    "experts_bf16": partial(_expert_cases, "bf16"),
    "experts_nvfp4": partial(_expert_cases, "nvfp4"),
    "decode": partial(attention_cases.cases, _SIZES),
    "decode_fp8": partial(attention_cases.cases, _FP8_CACHE),
    "prefill": partial(prefill_cases.cases, _SIZES),
    "prefill_fp8": partial(prefill_cases.cases, _FP8_CACHE),
    "linear": partial(linear_cases.cases, _SIZES),
    "few_rows": partial(few_row_cases.cases, _SIZES),
    "small": partial(small_cases.cases, _SIZES),
    "sampling": partial(sampling_cases.cases, _SIZES),
}


def _sweep_tiles(name: str, _: Report) -> Iterator[list[Trial]]:
    yield from sweep.sweep_tiles(expert_layers.make_layer(_DTYPES[name], _SIZES))


def _sweep_few(name: str, _: Report) -> Iterator[list[Trial]]:
    yield from sweep.sweep_few(expert_layers.make_layer(_DTYPES[name], _SIZES))


def _sweep_rows(name: str, report: Report) -> Iterator[list[Trial]]:
    best = best_tiles(report.trials)  # of this run, if it swept them
    yield from sweep.sweep_rows(expert_layers.make_layer(_DTYPES[name], _SIZES), best)


SWEEPS: dict[str, Callable[[Report], Iterator[list[Trial]]]] = {
    "fp8": partial(_sweep_tiles, "fp8"),
    "bf16": partial(_sweep_tiles, "bf16"),
    "nvfp4": partial(_sweep_tiles, "nvfp4"),
    "few_fp8": partial(_sweep_few, "fp8"),
    "few_nvfp4": partial(_sweep_few, "nvfp4"),
    "rows_fp8": partial(_sweep_rows, "fp8"),
    "rows_bf16": partial(_sweep_rows, "bf16"),
    "rows_nvfp4": partial(_sweep_rows, "nvfp4"),
    "linear_nvfp4": lambda _: sweep_linear.sweep_linear(_SIZES),
    "decode": lambda _: sweep_attention.sweep_decode(_SIZES),
    "decode_fp8": lambda _: sweep_attention.sweep_decode(_FP8_CACHE),
    "prefill": lambda _: sweep_attention.sweep_prefill(_SIZES),
}


def measure_kernels(
    parts: Sequence[str],
    sweeps: Sequence[str],
    tell: Callable[[str], None],
    *,
    with_pdl: bool = False,
    json_path: Path | None = None,
    tuned_path: Path | None = None,
) -> Report:
    """Measure what is named, on the current GPU.

    Args:
        parts: Of `PARTS`.
        sweeps: Of `SWEEPS`.
        tell: Called with a line as soon as there is one.
        with_pdl: Check and time every kernel by dependent launches too (`gpu.dependent_launch`).
        json_path: Where to write the report, anew after each part; None writes none.
        tuned_path: Where to write the best tiles of grouped products and linear layers, likewise.

    Raises:
        NoGpuError: There is none.
    """
    device = gpu_name()
    torch.manual_seed(0)
    report = Report(device, measure_ceilings())
    tell(report.title())
    for name in parts:
        with _told_failures(name, report, tell):
            for result in run_cases(PARTS[name](), report.ceilings, with_pdl=with_pdl):
                report.results.append(result)
                tell(result.line())
        report.write(json_path)
    for name in sweeps:
        with _told_failures(f"sweep {name}", report, tell):
            for trials in SWEEPS[name](report):
                report.trials += trials
                tell(trials_line(trials))
        report.write(json_path)
        if tuned_path is not None:
            write_tuned(tuned_path, best_tiles(report.trials))
    return report


@contextmanager
def _told_failures(name: str, report: Report, tell: Callable[[str], None]) -> Iterator[None]:
    """What ends one part must not hide the others; memory goes back when it is over."""
    try:
        yield
    except Exception as problem:  # noqa: BLE001 - whatever it is, the report holds it
        report.failures[name] = f"{type(problem).__name__}: {problem}"[:1000]
        tell(f"{name} FAILED: {report.failures[name][:100]}")
    torch.cuda.empty_cache()


def trials_line(trials: Sequence[Trial]) -> str:
    """The fastest configurations in one short line.

    Example:
        "gate_up bfloat16 B=32 rows=16:  902.1 us 16 64 64 w4 s5 p1 | 912.0 us ..."
    """
    if len({trial.size for trial in trials}) > 1:
        return sweep_attention.contexts_line(trials)
    first, num_failed = trials[0], sum(trial.us is None for trial in trials)
    best = [f"{t.us:.1f} us {t.label()}" for group in by_time(trials) for t in group[:_NUM_TOLD]]
    failed = f"  {num_failed} failed" if num_failed else ""
    return f"{first.operation} {first.dtype} {first.size}:  {' | '.join(best)}{failed}"
