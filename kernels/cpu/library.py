"""The CPU operators as a shared library: compiled once per machine, kept in the user's cache.

Compiled at setup by `python -m ostro.kernels.cpu.library`, else by the first process that needs it.
Where there is no compiler, or the processor has no AVX-512 BF16, there is no library and every
operation takes plain torch; `why_absent` tells which.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent
_FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-fPIC", "-w")
_COMPILERS = ("c++", "g++", "clang++")
_COMPILE_TIMEOUT_S = 300.0
_LOCK_TIMEOUT_S = 2 * _COMPILE_TIMEOUT_S
_LOCK_POLL_S = 0.2
_CPU_FLAGS = ("avx512_bf16", "avx512bw", "avx512dq", "avx512vl")

_P, _I, _F, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "ostro_linear": (_P, _I, _P, _I, _I, _I, _P, _THREADS),
    "ostro_linear_wide": (_P, _I, _P, _I, _I, _I, _P, _THREADS),
    "ostro_expert_mlp": (_P, _I, _I, _P, _P, _P, _P, _I, _I, _I, _P, _P, _THREADS),
    "ostro_rms_norm": (_P, _I, _P, _I, _I, _F, _P, _THREADS),
    "ostro_rotary": (_P, _I, _I, _I, _I, _I, _P, _THREADS),
    "ostro_write_latents": (_P, _I, _P, _F, _P, _I, _I, _I, _P, _P, _THREADS),
    "ostro_choose": (_P, _I, _I, _I, _F, _P, _P, _THREADS),
    "ostro_best_allowed": (_P, _P, _I, _P),
    "ostro_gather_allowed": (_P, _P, _I, _P, _P, _P),
    "ostro_add_rows": (_P, _P, _P, _I, _P, _THREADS),
    "ostro_mla_decode": (_P, _I, _I, _P, _P, _P, _P, _P, _P, *[_I] * 7, _F, _P, _THREADS),
    "ostro_attend_block": (*[_P, _I, _I] * 3, *[_I] * 8, _F, _P, _P, _P, _P, _THREADS),
}


class BuildError(RuntimeError):
    """The operators cannot be had on this machine; the message says why."""


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, compiled first if need be; None where there cannot be one."""
    try:
        library = ctypes.CDLL(str(_built()))
    except (BuildError, OSError) as error:
        logger.info("no CPU operators, plain torch instead: %s", error)
        return None
    for name, types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = types
        function.restype = None
    return library


def required() -> ctypes.CDLL:
    """The library where it is known to be there.

    Raises:
        RuntimeError: It is not.
    """
    library = load()
    if library is None:
        raise RuntimeError(f"no CPU operators: {why_absent()}")
    return library


def serves(tensor: torch.Tensor) -> bool:
    """Whether the operators take a tensor of this device and dtype."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and load() is not None


def why_absent() -> str | None:
    """Why there is no library on this machine; None if there is."""
    try:
        _built()
    except BuildError as error:
        return str(error)
    return None


def _built() -> Path:
    """Where the compiled library is; the name tells sources, compiler and processor apart.

    Raises:
        BuildError: It is not there and cannot be compiled.
    """
    processor = _processor_flags()
    missing = [flag for flag in _CPU_FLAGS if flag not in processor]
    if missing:
        raise BuildError(f"the processor has no {', '.join(missing)}")
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise BuildError("no C++ compiler found; install g++ or set CXX")
    sources = sorted(_SOURCES.glob("*.cpp"))
    key = hashlib.sha256(" ".join([compiler, *_FLAGS, *sorted(processor)]).encode())
    for source in [*sources, *sorted(_SOURCES.glob("*.h"))]:
        key.update(source.read_bytes())
    library = _cache_dir() / f"cpu_operators_{key.hexdigest()[:16]}.so"
    if not library.exists():
        with _alone(library.parent / "cpu_operators.lock"):
            if not library.exists():
                _compile(compiler, sources, library)
    return library


@contextmanager
def _alone(lock_file: Path) -> Iterator[None]:
    """Ranks of one machine come here together; one compiles, and the others wait for it."""
    deadline_s = time.monotonic() + _LOCK_TIMEOUT_S
    with lock_file.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise BuildError(
                        f"another process has held {lock_file} for {_LOCK_TIMEOUT_S:.0f} s; "
                        f"end it, or remove the file"
                    ) from None
                time.sleep(_LOCK_POLL_S)
        yield


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    directory = (Path(base) if base else Path.home() / ".cache") / "ostro"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"cannot write to {directory}: {error}") from error
    return directory


def _processor_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def _compile(compiler: str, sources: list[Path], library: Path) -> None:
    """One process per source, then the link; the library appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        compiles = [
            [compiler, *_FLAGS, "-c", str(source), "-o", str(object_)]
            for source, object_ in zip(sources, objects, strict=True)
        ]
        whole = Path(scratch) / library.name
        _run(compiles)
        _run([[compiler, "-shared", "-fopenmp", *map(str, objects), "-o", str(whole)]])
        whole.replace(library)


def _run(commands: list[list[str]]) -> None:
    """Run compilers side by side; none is left running."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            running.append(  # noqa: PERF401  those that have begun are ended if one cannot begin
                subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            )
        for process in running:
            _, told = process.communicate(timeout=_COMPILE_TIMEOUT_S)
            if process.returncode:
                raise BuildError(f"{commands[0][0]} failed: {told.decode(errors='replace')[-400:]}")
    except OSError as error:
        raise BuildError(f"{commands[0][0]}: {error}; install g++ or set CXX") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"compiling took over {_COMPILE_TIMEOUT_S:.0f} s") from error
    finally:
        for process in running:
            process.kill()
            process.communicate()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    load()
