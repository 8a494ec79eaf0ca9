"""What a decode step launches on a GPU, told without one.

Tensors have shapes but no memory ("meta") and say that they are on a GPU, so a whole layer in the
model's sizes costs nothing. Torch's operations are recorded as they are called, Triton's kernels
where they would be launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import embedding
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ostro.actors.model.batch import Batch
from ostro.actors.model.cuda_graphs import GraphInputs, input_forms, most_pages
from ostro.actors.model.eagle_head import EagleHead
from ostro.actors.model.latent_cache import LatentCache
from ostro.actors.model.packed_copy import packed_bytes
from ostro.cluster.bench_random_weights import random_head_weights
from ostro.cluster.bench_whole_model import PAGE_SIZE, WholeModel, mistral_small_4
from ostro.configs.quantization import WeightFormat
from ostro.kernels.gpu import dependent_launch as pdl
from ostro.kernels.gpu import mla_decode, tiles
from ostro.kernels.gpu.combine import _combine_kernel

DEPENDENT = " (dependent)"
_HOPPER = 90
_CHUNKS_OF_REQUEST = 8
# Make a tensor without running anything.
_ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class _NoMemory(TorchFunctionMode):
    """Tensors that are to be made on a GPU have shapes alone."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Appends the name of every operation that runs on the device."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        if name.endswith("_") or not (name in _ALLOCATE or _is_view(result, args)):
            self._names.append(f"torch.{name}")
        return result


def _is_view(result: Any, args: Any) -> bool:
    """Whether an operation gave its input back, perhaps in another shape."""
    first = result[0] if isinstance(result, list | tuple) else result
    of_inputs = [arg.untyped_storage()._cdata for arg in args if isinstance(arg, torch.Tensor)]
    return first.untyped_storage()._cdata in of_inputs


@contextmanager
def _imagined_gpu(*, is_joined: bool) -> Iterator[list[str]]:
    """A Hopper whose kernels are only named; values that code compares are equal if `is_joined`."""
    names: list[str] = []

    def launch(kernel: Any, *_: object, **options: object) -> None:
        names.append(kernel.fn.__name__ + DEPENDENT * bool(options.get("launch_pdl")))

    with pytest.MonkeyPatch.context() as patch, _NoMemory():
        patch.setattr(type(_combine_kernel), "run", launch)
        patch.setattr(torch.Tensor, "is_cuda", True)
        patch.setattr(torch, "equal", lambda *_: is_joined)
        patch.setattr(torch.Tensor, "__float__", lambda _: 1.0)  # the size of drawn weights
        for module in (tiles, mla_decode, pdl):
            patch.setattr(module, "architecture", lambda _: _HOPPER)
        yield names


def _decode_batch(num_requests: int) -> Batch:
    size = (num_requests, num_requests * _CHUNKS_OF_REQUEST)
    forms = input_forms(*size, most_pages(size[1], PAGE_SIZE))
    memory_bytes = torch.empty(packed_bytes(forms), dtype=torch.uint8, device="meta")
    rows = torch.empty(num_requests, dtype=torch.int64, device="meta")
    return GraphInputs.within(memory_bytes, forms).batch(rows, PAGE_SIZE)


def decode_launches(
    num_requests: int, precision: WeightFormat, *, num_layers: int, is_joined: bool = True
) -> list[str]:
    """Names of all that a decode step of so many layers launches, in order.

    Args:
        num_requests: Of the step.
        precision: Of the weights.
        num_layers: Of the model, whose other sizes are Mistral Small 4's.
        is_joined: Whether the projections before attention have one scale.

    Where launches are dependent (`kernels.gpu.dependent_launch`), names end with `DEPENDENT`.
    """
    config = mistral_small_4(num_layers)
    with _imagined_gpu(is_joined=is_joined) as names:
        model = WholeModel(config, cache_tokens=PAGE_SIZE, precision=precision)
        batch = _decode_batch(num_requests)
        names.clear()
        with _Operations(names):
            model.decoder.forward([batch], model.exchange)
        return list(names)


def head_launches(num_rows: int) -> list[str]:
    """Names of all that a pass of the official draft head launches, its graph's copies included."""
    model = mistral_small_4(1)
    config = replace(
        model, num_layers=2, num_experts=0, num_experts_per_token=0, expert_hidden_size=12288
    )
    with _imagined_gpu(is_joined=True) as names:
        weights = random_head_weights(config)
        cache = LatentCache(
            config, num_pages=1, page_size=PAGE_SIZE, device="cuda", dtype=torch.bfloat16
        )
        embed_VD = torch.empty(config.vocab_size, config.hidden_size, dtype=torch.bfloat16)
        embed_VD = embed_VD.to("meta")
        head = EagleHead(config, weights, cache, lambda tokens_T, _: embedding(tokens_T, embed_VD))
        hidden_TD = torch.empty(num_rows, config.hidden_size, dtype=torch.bfloat16, device="meta")
        batch = _decode_batch(num_rows)
        names.clear()
        with _Operations(names):
            head.forward(hidden_TD, batch)
        return list(names)


def launches_of_layer(
    num_requests: int, precision: WeightFormat, *, is_joined: bool = True
) -> list[str]:
    """What each layer more adds to a decode step, in order from its attention on."""
    two, three = (
        decode_launches(num_requests, precision, num_layers=count, is_joined=is_joined)
        for count in (2, 3)
    )
    start = next(i for i, (a, b) in enumerate(zip(two, three, strict=False)) if a != b)
    return three[start : start + len(three) - len(two)]
