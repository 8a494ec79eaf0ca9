"""How much memory the weights of each role will fill, before anything is loaded.

Told from the config and from which weights a checkpoint leaves plain, so that a deployment can be
planned and progress be shown: `weights` fills exactly as much.
"""

from __future__ import annotations

import math

import torch

from ostro.actors.model.native_names import HEAD_SCHEME
from ostro.actors.model.nvfp4_weights import nvfp4_expert_bytes, nvfp4_linear_bytes
from ostro.actors.model.stored_weights import StoredPlain
from ostro.actors.model.weight_names import TEXT_SCHEME, ExpectedTensor, Role
from ostro.configs.model import ModelConfig
from ostro.configs.quantization import WeightFormat

# Linear layers, which stay as they are stored -> the scales that come along in FP8: a weight's own
# and that of its inputs. Gate and up of the shared expert are one weight.
_SCALES = {"joint": 2, "q_a": 2, "q_b": 2, "kv_a": 2, "o_proj": 2, "shared_down": 2}
_SCALES |= {"shared_gate": 2, "shared_up": 0}
_SCALE_BYTES = torch.float32.itemsize


def attention_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    precision: WeightFormat = WeightFormat.PLAIN,
    *,
    stacks_shared: bool = False,
    plain: StoredPlain = frozenset(),
) -> int:
    """Memory that `load_attention_weights`, or `load_head_weights`, fills, in bytes.

    Args:
        config: The model, or a draft head.
        dtype: Of what is not quantised.
        precision: What quantised weights are held in, as `weights` says.
        stacks_shared: Whether shared experts go into the stack of routed ones, as whose last slots
            their bytes are counted here, if both are quantised. It matters to NVFP4 alone, which
            holds one unit for a matrix there, and one for each output elsewhere.
        plain: What the checkpoint leaves plain of what may be quantised; by default nothing.
    """
    is_packed = stacks_shared and precision is WeightFormat.NVFP4
    is_packed = is_packed and not any(name.startswith(("shared_", "expert")) for name, _ in plain)
    scheme = HEAD_SCHEME if config.is_draft_head() else TEXT_SCHEME
    num_bytes = sum(
        _attention_tensor_bytes(tensor, dtype, _held(tensor, precision, plain))
        for tensor in scheme.expected(config).values()
        if tensor.role is Role.ATTENTION
        and not (is_packed and tensor.parameter.startswith("shared_"))
    )
    return num_bytes + is_packed * config.num_layers * nvfp4_expert_bytes(config)


def expert_bytes(
    config: ModelConfig,
    num_local: int,
    dtype: torch.dtype,
    precision: WeightFormat = WeightFormat.PLAIN,
    *,
    plain: StoredPlain = frozenset(),
) -> int:
    """Memory that `load_expert_weights` fills for this many local slots, in bytes.

    A layer that has one plain expert is plain; `plain` as in `attention_bytes`.
    """
    plain_layers = {layer for name, layer in plain if name.startswith("expert")}
    values = 3 * config.expert_hidden_size * config.hidden_size
    plain_bytes = each_bytes = values * dtype.itemsize
    if precision is WeightFormat.FP8:  # two matrices with two scales each
        each_bytes = values + 4 * _SCALE_BYTES
    if precision is WeightFormat.NVFP4:
        each_bytes = nvfp4_expert_bytes(config)
    num_plain = len(plain_layers)
    num_bytes = num_plain * plain_bytes + (config.num_layers - num_plain) * each_bytes
    return num_local * num_bytes


def _held(tensor: ExpectedTensor, precision: WeightFormat, plain: StoredPlain) -> WeightFormat:
    """What a weight is held in: plain ones stay so, and who is multiplied together with them."""
    gate_and_up = ("shared_gate", "shared_up")
    together = gate_and_up if tensor.parameter in gate_and_up else (tensor.parameter,)
    is_plain = any((parameter, tensor.layer) in plain for parameter in together)
    return WeightFormat.PLAIN if is_plain else precision


def _attention_tensor_bytes(
    tensor: ExpectedTensor, dtype: torch.dtype, precision: WeightFormat
) -> int:
    values = math.prod(tensor.shape)
    if precision is WeightFormat.FP8 and tensor.parameter in _SCALES:
        return values + _SCALES[tensor.parameter] * _SCALE_BYTES
    if precision is WeightFormat.NVFP4 and tensor.parameter in _SCALES:
        num_outputs, num_inputs = tensor.shape
        return nvfp4_linear_bytes(num_outputs, num_inputs)
    return values * (torch.float32 if tensor.parameter == "gate" else dtype).itemsize
