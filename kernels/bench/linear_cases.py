"""Cases of linear layers in FP8 and NVFP4, in the sizes of the model's projections.

Shape letters: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from ostro.kernels.bench.measure import Case, num_variants, poison, relative_error
from ostro.kernels.bench.sizes import Sizes
from ostro.kernels.fp8_linear import (
    Fp8Weight,
    fp8_linear,
    fp8_linear_reference,
    quantize_fp8_reference,
)
from ostro.kernels.gpu.nvfp4_linear import nvfp4_linear_triton
from ostro.kernels.nvfp4_experts import random_nvfp4_stack
from ostro.kernels.nvfp4_linear import Nvfp4Weight, nvfp4_linear_reference, nvfp4_weight_values

BATCHES = (1, 16, 64, 256, 2048)
NVFP4_BYTES = 9 / 16  # of a weight, its share of scales included
_TOLERANCE = 1e-2


def cases(sizes: Sizes, batches: Sequence[int] = BATCHES) -> Iterator[Case]:
    """The model's projections: down to queries and latents, up to heads, out of them, experts."""
    s = sizes
    heads_in, heads_out = s.num_heads * (s.nope + s.rope), s.num_heads * s.value
    shapes = (
        (s.hidden, s.compressed + s.latent + s.rope),
        (s.compressed, heads_in),
        (heads_out, s.hidden),
        (s.inner, s.hidden),
    )
    for num_tokens in batches:
        for num_in, num_out in shapes:
            yield _fp8(s, num_tokens, num_in, num_out)
            yield _nvfp4(s, num_tokens, num_in, num_out)


def _fp8(sizes: Sizes, num_tokens: int, num_in: int, num_out: int) -> Case:
    s = sizes
    input_scale = torch.tensor(1 / 32, device=s.device)
    scale = torch.tensor(num_in**-0.5 / 16, device=s.device)
    weights = [
        Fp8Weight(
            values_OI=s.randn_fp8(num_out, num_in, scale=16.0),
            scale=scale,
            input_scale=input_scale,
        )
        for _ in range(num_variants(num_in * num_out))
    ]
    x_TI = s.randn(num_tokens, num_in)
    units_TI = quantize_fp8_reference(x_TI, input_scale)

    def error() -> float:
        expected = fp8_linear_reference(x_TI.float(), weights[0])
        poison(expected.numel() * 2, s.device)
        return relative_error(fp8_linear(x_TI, weights[0]), expected)

    product = partial(
        torch._scaled_mm,
        units_TI,
        scale_a=input_scale,
        scale_b=scale,
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
    return Case(
        operation="fp8_linear",
        size=f"{num_tokens} {num_in}>{num_out}",
        launches=[partial(fp8_linear, x_TI, weight) for weight in weights],
        bytes_moved=num_in * num_out + num_tokens * (num_in + num_out) * 2,
        flops=2.0 * num_tokens * num_in * num_out,
        flops_ceiling="fp8",
        error=error,
        tolerance=_TOLERANCE,
        others={"scaled_mm": [partial(product, weight.values_OI.t()) for weight in weights]},
    )


def _nvfp4(sizes: Sizes, num_tokens: int, num_in: int, num_out: int) -> Case:
    s, num_values = sizes, num_in * num_out
    num_weights = num_variants(num_values * NVFP4_BYTES)
    weights = [random_nvfp4_weight(s, num_in, num_out) for _ in range(num_weights)]
    wide = [
        nvfp4_weight_values(weight).bfloat16()
        for weight in weights[: num_variants(num_values * 2, len(weights))]
    ]
    x_TI = s.randn(num_tokens, num_in)

    def error() -> float:
        expected = nvfp4_linear_reference(x_TI.float(), weights[0])
        poison(expected.numel() * 2, s.device)
        return relative_error(nvfp4_linear_triton(x_TI, weights[0]), expected)

    return Case(
        operation="nvfp4_linear",
        size=f"{num_tokens} {num_in}>{num_out}",
        launches=[partial(nvfp4_linear_triton, x_TI, weight) for weight in weights],
        bytes_moved=num_values * NVFP4_BYTES + num_tokens * (num_in + num_out) * 2,
        flops=2.0 * num_tokens * num_values,
        error=error,
        tolerance=_TOLERANCE,
        others={"bf16": [partial(torch.nn.functional.linear, x_TI, weight) for weight in wide]},
    )


def random_nvfp4_weight(sizes: Sizes, num_in: int, num_out: int) -> Nvfp4Weight:
    """A weight that keeps rows at about unit size."""
    stack, size_of_value = random_nvfp4_stack(1, num_out, num_in, sizes.device)
    unit = num_in**-0.5 / size_of_value
    return Nvfp4Weight(
        words_BOW=stack.words_EBOW[0],
        scales_BOS=stack.scales_EBOS[0],
        unit_O=torch.full((num_out,), unit, device=sizes.device),
        num_inputs=num_in,
    )
