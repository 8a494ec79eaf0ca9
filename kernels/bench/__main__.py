"""`python -m ostro.kernels.bench`: `ostro bench kernels` where only torch and Triton are."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ostro.kernels.bench.ceilings import NoGpuError
from ostro.kernels.bench.report import PARTS, SWEEPS, measure_kernels


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _main() -> None:
    parser = argparse.ArgumentParser(description="Measure kernels on this GPU.")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--sweep", nargs="*", default=[], choices=list(SWEEPS))
    parser.add_argument("--pdl", action="store_true", help="time dependent launches too")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--tuned", type=Path, help="write the sweep's best tiles here")
    options = parser.parse_args()
    if options.tuned is not None and not options.sweep:
        parser.error("--tuned needs --sweep: tiles are what it finds")
    began_s = time.perf_counter()
    try:
        report = measure_kernels(
            options.parts,
            options.sweep,
            _tell,
            with_pdl=options.pdl,
            json_path=options.json,
            tuned_path=options.tuned,
        )
    except NoGpuError as error:
        sys.exit(f"error: {error}")
    _tell(f"{time.perf_counter() - began_s:.0f} s")
    sys.exit(0 if report.is_right() else 1)


if __name__ == "__main__":
    _main()
