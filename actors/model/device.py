"""The device of a rank: which one, how many threads, which dtypes, which precision of weights."""

from __future__ import annotations

import ctypes
import os

import torch

from ostro.actors.model.stored_weights import multipliable_format
from ostro.configs.deployment import DeploymentConfig, EngineConfig, Layout
from ostro.configs.errors import ConfigError
from ostro.configs.model import ModelConfig
from ostro.configs.quantization import WeightFormat
from ostro.kernels.latent_cache import FP8_ROW_LATENTS, FP8_ROWS

_FP8_SINCE = (8, 9)  # compute capability from which a GPU converts and multiplies e4m3
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SMALL_HIDDEN = 512
_M_TRIM_THRESHOLD = -1  # names of malloc.h
_M_MMAP_THRESHOLD = -3


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a config's name."""
    return _DTYPES[name]


def choose_dtype(requested: str, device: str, config: ModelConfig) -> str:
    """What "auto" means on a device; the same on every rank and after every restart.

    bfloat16 on CUDA. On CPU bfloat16 only where the processor multiplies it natively and the model
    is large enough to be bound by the bytes of its weights; small models are faster in float32.
    """
    if requested != "auto":
        return requested
    if device == "cuda":
        return "bfloat16"
    native = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return "bfloat16" if native and config.hidden_size >= _SMALL_HIDDEN else "float32"


def choose_cache_dtype(
    engine: EngineConfig, dtype: torch.dtype, config: ModelConfig
) -> torch.dtype:
    """What the latent cache of a model in `dtype` is held in.

    Raises:
        ConfigError: The model's latents do not fill FP8 rows.
    """
    if engine.latent_cache_dtype == "auto":
        return dtype
    if config.kv_lora_rank % FP8_ROW_LATENTS:
        raise ConfigError(
            f"latent_cache_dtype={engine.latent_cache_dtype!r}: the model's kv_lora_rank="
            f"{config.kv_lora_rank} is no multiple of {FP8_ROW_LATENTS}; set it to 'auto'"
        )
    return FP8_ROWS


def choose_precision(device: str, config: ModelConfig) -> WeightFormat:
    """What a device multiplies the quantised weights of a checkpoint in.

    CUDA in their own format where there are kernels for it. PLAIN elsewhere: they are dequantised
    to the model's dtype while they are loaded.
    """
    return multipliable_format(config) if device == "cuda" else WeightFormat.PLAIN


def check_fp8(device: str, engine: EngineConfig, precision: WeightFormat) -> None:
    """Refuse FP8 where the GPU of this process has none, before any weight is read.

    Raises:
        ConfigError: It has none; the message names what can be served on it.
    """
    if device != "cuda" or torch.cuda.get_device_capability() >= _FP8_SINCE:
        return
    name = torch.cuda.get_device_name()
    if precision is WeightFormat.FP8:
        raise ConfigError(
            f"model: its weights are FP8, which {name} does not multiply; make a bf16 one with "
            "`ostro weights convert --precision bf16`, or serve one in NVFP4"
        )
    if engine.latent_cache_dtype != "auto":
        raise ConfigError(
            f"latent_cache_dtype={engine.latent_cache_dtype!r}: {name} has no FP8; set it to 'auto'"
        )


def weight_dtype(dtype: str, precision: WeightFormat) -> str:
    """By name what most of the weights are held in, for people.

    Example:
        ("bfloat16", FP8) -> "fp8"; ("bfloat16", PLAIN) -> "bfloat16"
    """
    return dtype if precision is WeightFormat.PLAIN else precision.value


def num_threads(deployment: DeploymentConfig) -> int:
    """Threads of torch on a CPU rank: all cores alone, one where ranks share the cores.

    Ranks in lock step with two threads each were 20 times slower than with one.
    """
    if deployment.engine.num_threads is not None:
        return deployment.engine.num_threads
    if deployment.layout.layout is Layout.SINGLE:
        return len(os.sched_getaffinity(0))
    return 1


def prepare_device(device: str, deployment: DeploymentConfig) -> None:
    """Set up the calling process for its rank.

    Raises:
        ConfigError: `device` is "cuda" and this process sees no GPU.
    """
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                "device=cuda, but this process sees no GPU; set layout.device=cpu or check drivers"
            )
        torch.cuda.set_device(0)
        return
    if deployment.layout.layout is not Layout.SINGLE or deployment.engine.num_threads is not None:
        torch.set_num_threads(num_threads(deployment))
    # Else the process was started with as many as it has cores. To count them here would be wrong:
    # OpenMP has bound this thread to one of them.
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed, where the C library is glibc.

    It gives large blocks back to the system at once, and a step's activations are then page-faulted
    anew in every layer: 1,308 us instead of 74 us for a 1 MB temporary.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
