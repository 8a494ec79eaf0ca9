"""Compile kernels for GPUs that are not there, and read what came out.

`compiled` runs launches in a process of its own, where Triton is not interpreted: a stand-in driver
names the target, tensors are `meta`, and every launch stops after the compiler. So what is checked
is what the launcher would start: its heuristics, tiles, warps and stages. Triton's cache makes a
second run of an unchanged kernel cheap.

Launches are functions in a module of `LAUNCHES`, a dict of names. As a program it prints the
figures of some of them as JSON, or writes the file that the tests compare:

    python tests/helpers/compile_gate.py expert_launches --write tests/kernels/gpu/experts.json
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = ("sm_90", "sm_100")
MAX_SHARED_BYTES = 232_448  # per block, on both; the compiler does not fail above it
_TIMEOUT_S = 600.0

_WAIT, _START = "ACQBULK", "PREEXIT"  # for the kernel ahead; of the next one
_ACCESS = re.compile(r"(?:LDG|STG|LDGSTS|UTMALDG|UTMASTG|UBLKCP|RED|ATOM|ATOMG)\b")

# kernel -> figures of one launch; launch -> architecture -> those.
Compiled = dict[str, dict[str, dict[str, "Figures"]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one compiled kernel takes of a GPU.

    Attributes:
        registers: Per thread.
        spills: Loads and stores of registers that did not fit.
        shared_bytes: Per block.
        num_warps: Per block.
        mma: Kinds of matrix instruction, such as HGMMA.64x16x16 or UTCQMMA.
        num_tma_loads: Instructions that copy a box of a tensor to shared memory.
    """

    registers: int
    spills: int
    shared_bytes: int
    num_warps: int
    mma: tuple[str, ...]
    num_tma_loads: int


def compiled(
    module: str, names: Iterable[str], architectures: Iterable[str] = ARCHITECTURES
) -> Compiled:
    """Figures of every kernel that these launches of `module` start.

    Raises:
        RuntimeError: A kernel does not compile; the message is the compiler's.
    """
    return from_json(_run(module, names, architectures))


def _run(
    module: str, names: Iterable[str], architectures: Iterable[str], *options: str
) -> dict[str, Any]:
    """What this program prints in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, module, "--names", *names]
    command += ["--architectures", *architectures, *options]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    tree: dict[str, Any] = json.loads(done.stdout)
    return tree


def before_the_wait(module: str, names: Iterable[str]) -> dict[str, dict[str, list[str] | None]]:
    """What kernels of dependent launches do to global memory before they wait, by launch, on sm_90.

    Prefetches, which change nothing, are left out; None is a kernel that does not wait once, or
    does not let the next one start.
    """
    found: dict[str, dict[str, list[str] | None]] = _run(module, names, ("sm_90",), "--dependent")
    return found


def from_json(tree: dict[str, Any]) -> Compiled:
    """Figures as `compiled` gives them, from what this program printed."""
    return {
        name: {
            architecture: {
                kernel: Figures(**{**figures, "mma": tuple(figures["mma"])})
                for kernel, figures in kernels.items()
            }
            for architecture, kernels in by_architecture.items()
        }
        for name, by_architecture in tree.items()
    }


class _Driver:
    """Stands for the GPU where Triton asks for one; each target has a cache of its own."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> str:
        return "meta"


def _compile(
    launches: dict[str, Callable[[], None]],
    architecture: str,
    read: Callable[[Any], Any],
    *,
    is_dependent: bool,
) -> dict[str, Any]:
    """What `read` finds in every kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from ostro.kernels.gpu.dependent_launch import dependent_launch

    driver.set_active(_Driver(GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)))
    figures = {}
    for name, launch in launches.items():
        with _stopped_after_compiling() as kernels, dependent_launch(is_dependent):
            launch()
        figures[name] = {kernel: read(binary) for kernel, binary in kernels.items()}
    return figures


@contextmanager
def _stopped_after_compiling() -> Iterator[dict[str, Any]]:
    """Launches within compile only; gives the compiled kernels by name."""
    from triton.runtime.jit import JITFunction

    kernels: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernels[self.__name__] = kernel
        return kernel

    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run = run


def _told(kernel: Any, option: str) -> subprocess.CompletedProcess[str]:
    """What cuobjdump tells of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)


def _accesses_before_the_wait(kernel: Any) -> list[str] | None:
    """Instructions, in the order of their addresses; None unless the kernel waits just once."""
    lines = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?(\w+)", _told(kernel, "-sass").stdout)
    if lines.count(_WAIT) != 1 or lines.count(_START) != 1:
        return None
    return [line for line in lines[: lines.index(_WAIT)] if _ACCESS.match(line)]


def _figures(kernel: Any) -> dict[str, Any]:
    told, code = (_told(kernel, option) for option in ("-res-usage", "-sass"))
    usage = re.search(r"REG:(\d+)", told.stdout + told.stderr)
    assert usage is not None, told
    kinds = r"\b(?:[HQ]GMMA\.\d+x\d+x\d+|[HQI]MMA\.\d+|UTC\w*MMA)"
    return dataclasses.asdict(
        Figures(
            registers=int(usage[1]),
            spills=len(re.findall(r"\b(?:LDL|STL)\b", code.stdout)),
            shared_bytes=kernel.metadata.shared,
            num_warps=kernel.metadata.num_warps,
            mma=tuple(sorted(set(re.findall(kinds, code.stdout)))),
            num_tma_loads=len(re.findall(r"\bUTMALDG", code.stdout)),
        )
    )


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("--names", nargs="*", default=[])
    parser.add_argument("--architectures", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--dependent", action="store_true")
    options = parser.parse_args()
    every = importlib.import_module(options.module).LAUNCHES
    launches = {name: every[name] for name in options.names or every}
    read = _accesses_before_the_wait if options.dependent else _figures
    by_architecture = {
        arch: _compile(launches, arch, read, is_dependent=options.dependent)
        for arch in options.architectures
    }
    if options.dependent:
        sys.stdout.write(json.dumps(by_architecture["sm_90"]))
        return
    tree = {
        name: {arch: by_architecture[arch][name] for arch in by_architecture} for name in launches
    }
    if options.write is None:
        sys.stdout.write(json.dumps(tree))
        return
    import triton

    whole = {"triton": triton.__version__, "launches": tree}
    options.write.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    _main()
