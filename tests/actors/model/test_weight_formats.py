"""FP8 and NVFP4 values: what they mean, how near rounding comes, and the order of rotated rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ostro.actors.model.weight_formats import (
    RawWeight,
    dequantize,
    dequantize_into,
    fp8_weight,
    halves_to_pairs,
    join_rows,
    pairs_to_halves,
    quantize,
    requantize,
)
from ostro.configs.quantization import WeightFormat

_QUANTIZED = [WeightFormat.FP8, WeightFormat.NVFP4]


def _weight(rows: int = 24, columns: int = 64, std: float = 0.05) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * std


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_dequantize_fp8_worked_example() -> None:
    raw = RawWeight(
        weight_format=WeightFormat.FP8,
        values=torch.tensor([[2.0]]).to(torch.float8_e4m3fn),
        scale=torch.tensor(0.5),
    )
    assert dequantize(raw, torch.float32).tolist() == [[1.0]]


def test_fp8_weight_has_float32_scales_without_dimensions() -> None:
    raw = RawWeight(
        weight_format=WeightFormat.FP8,
        values=torch.tensor([[2.0]]).to(torch.float8_e4m3fn),
        scale=torch.tensor([0.5], dtype=torch.bfloat16),
        input_scale=torch.tensor(0.25, dtype=torch.bfloat16),
    )
    weight = fp8_weight(raw)
    assert weight.values_OI is raw.values
    assert weight.scale.dtype == weight.input_scale.dtype == torch.float32
    assert (weight.scale.shape, weight.input_scale.shape) == ((), ())
    assert (weight.scale.item(), weight.input_scale.item()) == (0.5, 0.25)


@pytest.mark.parametrize("missing", ["scale", "input_scale"])
def test_fp8_weight_refuses_what_lacks_a_scale(missing: str) -> None:
    scales = {"scale": torch.tensor(0.5), "input_scale": torch.tensor(0.25), missing: None}
    values = torch.ones(1, 1).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="only an fp8 weight with its scale"):
        fp8_weight(RawWeight(weight_format=WeightFormat.FP8, values=values, **scales))


def test_dequantize_nvfp4_worked_example() -> None:
    packed = torch.zeros(1, 8, dtype=torch.uint8)
    packed[0, 0], packed[0, 7] = 0x51, 0xF9  # codes 1, 5 and, negative, 1, 7
    raw = RawWeight(
        weight_format=WeightFormat.NVFP4,
        values=packed,
        scale=torch.tensor([[4.0]]).to(torch.float8_e4m3fn),
        global_scale=torch.tensor([2.0]),
    )
    wanted = [[1.0, 6.0, *[0.0] * 12, -1.0, -12.0]]
    assert dequantize(raw, torch.float32).tolist() == wanted


@pytest.mark.parametrize("num_rows", [1, 511, 512, 1300])
@pytest.mark.parametrize("weight_format", _QUANTIZED)
def test_dequantize_into_chunks_gives_what_the_formula_says(
    num_rows: int, weight_format: WeightFormat
) -> None:
    raw = quantize(_weight(num_rows), weight_format)
    assert raw.scale is not None
    if raw.global_scale is None:
        wanted = raw.values.float() * raw.scale.float()
    else:
        rows = [
            replace(raw, values=raw.values[i : i + 1], scale=raw.scale[i : i + 1])
            for i in range(num_rows)
        ]
        wanted = torch.cat([dequantize(row, torch.float32) for row in rows])
    out = torch.full((num_rows, 64), torch.nan, dtype=torch.bfloat16)
    dequantize_into(out, raw)
    assert torch.equal(out, wanted.to(torch.bfloat16))


@pytest.mark.parametrize("missing", ["scale", "global_scale"])
def test_dequantize_refuses_a_weight_without_its_scales(missing: str) -> None:
    raw = quantize(_weight(), WeightFormat.NVFP4)
    parts = {"scale": raw.scale, "global_scale": raw.global_scale, missing: None}
    with pytest.raises(ValueError, match=f"without its {missing.replace('_', ' ')}"):
        dequantize(
            RawWeight(weight_format=WeightFormat.NVFP4, values=raw.values, **parts), torch.float32
        )


@pytest.mark.parametrize(
    ("weight_format", "most"),
    [(WeightFormat.PLAIN, 0.003), (WeightFormat.FP8, 0.03), (WeightFormat.NVFP4, 0.12)],
)
def test_quantize_comes_as_near_as_the_format_can(weight_format: WeightFormat, most: float) -> None:
    weight = _weight()
    found = dequantize(quantize(weight, weight_format), torch.float32)
    assert most / 4 < _relative(found, weight) < most


@pytest.mark.parametrize("weight_format", _QUANTIZED)
def test_quantize_in_chunks_gives_what_each_row_alone_gives(weight_format: WeightFormat) -> None:
    weight = _weight(1300)
    weight[:, 0] = 1.0  # so that every row has the scales of the whole
    whole = quantize(weight, weight_format)
    for row in (0, 510, 511, 1299):
        alone = quantize(weight[row : row + 1], weight_format)
        assert torch.equal(
            dequantize(alone, torch.float32)[0], dequantize(whole, torch.float32)[row]
        )


def test_nvfp4_rounds_to_the_nearest_code_and_a_tie_to_the_smaller() -> None:
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    weight = torch.zeros(3, 16)
    weight[:, 15] = 6.0  # the scales are 1
    weight[0, :7], weight[1, :7] = middles, -middles
    weight[2, :7] = middles.nextafter(torch.tensor(6.0))
    found = dequantize(quantize(weight, WeightFormat.NVFP4), torch.float32)[:, :7]
    assert found[0].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
    assert torch.equal(found[1], -found[0])
    assert found[2].tolist() == [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.mark.parametrize("weight_format", _QUANTIZED)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_shows_in_the_scale(
    weight_format: WeightFormat, value: float
) -> None:
    weight = _weight()
    weight[3, 7] = value
    scale = quantize(weight, weight_format).scale
    assert scale is not None
    assert not torch.isfinite(scale.float()).all()


@pytest.mark.parametrize("weight_format", _QUANTIZED)
def test_quantize_keeps_zeros_and_outliers(weight_format: WeightFormat) -> None:
    weight = torch.zeros(2, 32)
    assert torch.equal(dequantize(quantize(weight, weight_format), torch.float32), weight)
    weight[1, 5] = -3.0
    found = dequantize(quantize(weight, weight_format), torch.float32)
    torch.testing.assert_close(found, weight, rtol=0.01, atol=0.0)


@pytest.mark.parametrize("weight_format", _QUANTIZED)
def test_quantizing_what_was_dequantised_changes_little(weight_format: WeightFormat) -> None:
    once = dequantize(quantize(_weight(), weight_format), torch.float32)
    twice = dequantize(quantize(once, weight_format), torch.float32)
    assert _relative(twice, once) < 0.01


def test_requantize_leaves_a_weight_of_the_format_alone() -> None:
    raw = quantize(_weight(), WeightFormat.FP8)
    assert requantize(raw, WeightFormat.FP8) is raw
    assert requantize(raw, WeightFormat.PLAIN).values.dtype == torch.bfloat16
    assert requantize(raw, WeightFormat.NVFP4).values.shape == (24, 32)


def test_join_rows_is_exact_where_scales_are_equal() -> None:
    raw = quantize(_weight(), WeightFormat.FP8)
    joined = join_rows(raw, raw)
    assert joined.scale is raw.scale
    values = dequantize(raw, torch.float32)
    assert torch.equal(dequantize(joined, torch.float32), torch.cat((values, values)))


def test_join_rows_rounds_anew_where_scales_differ() -> None:
    parts = [_weight(std=0.01), _weight(std=0.05)]
    joined = join_rows(*(quantize(part, WeightFormat.FP8) for part in parts))
    assert joined.scale is not None
    assert joined.scale.numel() == 1
    assert _relative(dequantize(joined, torch.float32), torch.cat(parts)) < 0.05


def test_pairs_to_halves_worked_example() -> None:
    rows = torch.arange(8).view(8, 1)  # two heads of four rows
    assert pairs_to_halves(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(halves_to_pairs(pairs_to_halves(rows, 2), 2), rows)
