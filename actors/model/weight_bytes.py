"""How much memory the weights of each role will fill, before anything is loaded.

Told from the config alone, so that a deployment can be planned and progress be shown; `weights`
fills exactly as much where a checkpoint is stored like the official ones.
"""

from __future__ import annotations

import math

import torch

from ostro.actors.model.nvfp4_stacks import nvfp4_expert_bytes
from ostro.actors.model.weight_names import TEXT_SCHEME, ExpectedTensor, Role
from ostro.configs.model import ModelConfig
from ostro.configs.quantization import WeightFormat

# Parameters that stay FP8 -> the scales that come along: a weight's own and that of its inputs.
# Gate and up of the shared expert are one weight.
_SCALES = {"q_a": 2, "q_b": 2, "kv_a": 2, "o_proj": 2, "shared_down": 2}
_SCALES |= {"shared_gate": 2, "shared_up": 0}
_SCALE_BYTES = torch.float32.itemsize


def attention_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    precision: WeightFormat = WeightFormat.PLAIN,
    *,
    stacks_shared: bool = False,
) -> int:
    """Memory that `load_attention_weights` fills, in bytes.

    Exact where all is FP8 that may be, or all experts NVFP4, as in the official checkpoints.

    Args:
        config: The model.
        dtype: Of what is not quantised.
        precision: What quantised weights are held in, as `weights` says.
        stacks_shared: Whether shared experts go into the stack of routed ones, as whose last slots
            their bytes are counted here. It matters to NVFP4 alone, which is dequantised elsewhere.
    """
    is_packed = stacks_shared and precision is WeightFormat.NVFP4
    num_bytes = sum(
        _attention_tensor_bytes(tensor, dtype, precision)
        for tensor in TEXT_SCHEME.expected(config).values()
        if tensor.role is Role.ATTENTION
        and not (is_packed and tensor.parameter.startswith("shared_"))
    )
    return num_bytes + is_packed * config.num_layers * nvfp4_expert_bytes(config)


def expert_bytes(
    config: ModelConfig,
    num_local: int,
    dtype: torch.dtype,
    precision: WeightFormat = WeightFormat.PLAIN,
) -> int:
    """Memory that `load_expert_weights` fills for this many local slots, in bytes.

    Exact where all experts are stored alike, as in the official checkpoint.
    """
    values = 3 * config.expert_hidden_size * config.hidden_size
    each_bytes = values * dtype.itemsize
    if precision is WeightFormat.FP8:  # two matrices with two scales each
        each_bytes = values + 4 * _SCALE_BYTES
    if precision is WeightFormat.NVFP4:
        each_bytes = nvfp4_expert_bytes(config)
    return config.num_layers * num_local * each_bytes


def _attention_tensor_bytes(
    tensor: ExpectedTensor, dtype: torch.dtype, precision: WeightFormat
) -> int:
    values = math.prod(tensor.shape)
    if precision is WeightFormat.FP8 and tensor.parameter in _SCALES:
        return values + _SCALES[tensor.parameter] * _SCALE_BYTES
    return values * (torch.float32 if tensor.parameter == "gate" else dtype).itemsize
