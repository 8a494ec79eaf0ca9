"""`python -m ostro.kernels.bench`: measure every kernel on this GPU; needs torch and Triton alone."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from ostro.kernels.bench import expert_cases
from ostro.kernels.bench.measure import Case, measure_ceilings
from ostro.kernels.bench.run import Result, run_cases
from ostro.kernels.bench.sweep import sweep


def _experts(dtype: torch.dtype) -> Iterator[Case]:
    yield from expert_cases.cases(expert_cases.Layer(dtype))


_PARTS = {
    "experts_fp8": lambda: _experts(torch.float8_e4m3fn),
    "experts_bf16": lambda: _experts(torch.bfloat16),
}


def _line(result: Result) -> str:
    others = " ".join(f"{name} {us:.1f}" for name, us in result.others_us.items())
    right = "right" if result.is_right else "WRONG"
    return (
        f"{result.operation:18} {result.size:16} {result.us:9.1f} us {result.gigabytes_s:7.0f} GB/s "
        f"{result.teraflops:6.0f} TF {result.share_of_floor():6.1%} of floor  {right} "
        f"{result.error:.1e}  {others} {result.failure}\n"
    )


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=list(_PARTS), choices=list(_PARTS))
    parser.add_argument("--sweep", nargs="*", default=[], choices=["fp8", "bf16"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    began_s = time.perf_counter()
    ceilings = measure_ceilings()
    tree = {"device": torch.cuda.get_device_name(), "ceilings": asdict(ceilings), "results": []}
    sys.stdout.write(f"{tree['device']} {tree['ceilings']}\n")
    for part in options.parts:
        for result in run_cases(_PARTS[part](), ceilings):
            tree["results"].append(asdict(result))
            sys.stdout.write(_line(result))
            sys.stdout.flush()
        torch.cuda.empty_cache()
    tree["sweep"] = []
    for name in options.sweep:
        dtype = torch.float8_e4m3fn if name == "fp8" else torch.bfloat16
        tree["sweep"] += list(sweep(expert_cases.Layer(dtype)))
        torch.cuda.empty_cache()
    sys.stdout.write(f"{time.perf_counter() - began_s:.0f} s\n")
    if options.json:
        options.json.write_text(json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    _main()
