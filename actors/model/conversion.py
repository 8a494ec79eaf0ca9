"""Turn a checkpoint into another layout or precision, weight by weight.

A weight that is in the wanted precision already keeps its very bytes; any other is dequantised and
rounded anew. Which weights are quantised follows the official checkpoints: FP8 attention, shared
and routed experts; NVFP4 the experts alone. Scales for inputs are carried over where the precision
stays; rounding cannot make them, so elsewhere the checkpoint declares that it has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ostro.actors.errors import CheckpointError
from ostro.actors.model.checkpoint import CheckpointReader
from ostro.actors.model.checkpoint_writer import TensorBatch, TensorSpec
from ostro.actors.model.native_names import INTERLEAVED, NATIVE_SCHEME
from ostro.actors.model.stored_weights import (
    QUANTIZABLE,
    StoredWeight,
    TensorMatch,
    match_tensors,
    read_raw,
    stored_weight,
)
from ostro.actors.model.weight_formats import (
    NVFP4_GROUP,
    RawWeight,
    halves_to_pairs,
    join_rows,
    pairs_to_halves,
    requantize,
)
from ostro.actors.model.weight_names import (
    TEXT_SCHEME,
    TEXT_SINGLE_SCHEME,
    WRAPPER_SCHEME,
    WRAPPER_SINGLE_SCHEME,
    ExpectedTensor,
    NamingScheme,
)
from ostro.configs.checkpoint_layout import CheckpointLayout
from ostro.configs.model import ModelConfig, load_model_config
from ostro.configs.quantization import Quantization, WeightFormat

# A part of stacked experts -> the stacked parameter, and which of its halves the part is.
_STACKED = {
    "expert_gate": ("experts_gate_up", 0),
    "expert_up": ("experts_gate_up", 1),
    "expert_down": ("experts_down", None),
}
# A stacked parameter -> its parts, rows below each other.
_PARTS = {"experts_gate_up": ("expert_gate", "expert_up"), "experts_down": ("expert_down",)}


@dataclass(frozen=True, slots=True)
class Conversion:
    """What will be written.

    Attributes:
        source: The checkpoint's directory.
        config: Its config.
        layout: The wanted layout.
        quantization: What the result declares; None if it is bf16 throughout.
        batches: All tensors of the result.
    """

    source: Path
    config: ModelConfig
    layout: CheckpointLayout
    quantization: Quantization | None
    batches: tuple[TensorBatch, ...]

    def num_bytes(self) -> int:
        """Bytes of the result's weights."""
        return sum(batch.num_bytes() for batch in self.batches)


def plan_conversion(
    source: Path, layout: CheckpointLayout, weight_format: WeightFormat
) -> Conversion:
    """Settle every tensor of the result; reads headers alone.

    Raises:
        ConfigError: The source has no config that can be served.
        CheckpointError: The source cannot be served, or has weights that do not fit the format.
    """
    config = load_model_config(source)
    reader = CheckpointReader(source)
    match = match_tensors(reader, config)
    match.check(source)
    quantization = _declared(config, weight_format)
    scheme = _scheme(config, match.scheme, layout, weight_format)
    converter = _Converter(_Source(reader, config, match), scheme, quantization)
    batches = tuple(converter.batch(tensor) for tensor in scheme.expected(config).values())
    return Conversion(source, config, layout, quantization, batches)


def _declared(config: ModelConfig, weight_format: WeightFormat) -> Quantization | None:
    if weight_format is WeightFormat.PLAIN:
        return None
    found = config.quantization
    if found is not None and found.weight_format is weight_format:
        return found
    return Quantization(weight_format=weight_format, has_input_scales=False)


def _scheme(
    config: ModelConfig,
    found: NamingScheme,
    layout: CheckpointLayout,
    weight_format: WeightFormat,
) -> NamingScheme:
    """The names of the result; packed experts cannot be stacked, so they stand one by one."""
    if layout is CheckpointLayout.MISTRAL:
        return NATIVE_SCHEME
    is_wrapper = config.vision is not None
    if found.layout is layout:
        is_wrapper = found.prefix == WRAPPER_SCHEME.prefix
    if weight_format is WeightFormat.NVFP4:
        return WRAPPER_SINGLE_SCHEME if is_wrapper else TEXT_SINGLE_SCHEME
    return WRAPPER_SCHEME if is_wrapper else TEXT_SCHEME


class _Source:
    """The weights of the source, one matrix at a time, whether its experts are stacked or not."""

    def __init__(self, reader: CheckpointReader, config: ModelConfig, match: TensorMatch) -> None:
        self.reader = reader
        self.config = config
        self.layout = match.scheme.layout
        self._match = match
        self._last: tuple[str, int | None, RawWeight] | None = None

    def stored(self, parameter: str, layer: int | None, expert: int | None) -> StoredWeight:
        """How a weight is stored; `parameter` is never a stacked one."""
        scheme = self._match.scheme
        if scheme.stacks_experts() and parameter in _STACKED:
            return self._match.weights[scheme.tensor(_STACKED[parameter][0], layer)]
        return self._match.weights[scheme.tensor(parameter, layer, expert)]

    def raw(self, parameter: str, layer: int | None, expert: int | None) -> RawWeight:
        """A weight as it is stored; of stacked ones the part asked for, with the whole's scale."""
        stored = self.stored(parameter, layer, expert)
        if stored.expected.expert is not None or expert is None:
            return read_raw(self.reader, stored)
        if self._last is None or self._last[:2] != (stored.values, expert):
            self._last = (stored.values, expert, read_raw(self.reader, stored, row=expert))
        raw, half = self._last[2], _STACKED[parameter][1]
        return raw if half is None else replace(raw, values=raw.values.chunk(2)[half])


def official_format(tensor: ExpectedTensor, wanted: WeightFormat) -> WeightFormat:
    """What official checkpoints of a precision store a weight in.

    Raises:
        CheckpointError: Rows that NVFP4 cannot cut into groups.
    """
    parameter = tensor.parameter
    if parameter not in QUANTIZABLE or wanted is not WeightFormat.NVFP4:
        return wanted if parameter in QUANTIZABLE else WeightFormat.PLAIN
    if "expert" not in parameter and "shared" not in parameter:
        return WeightFormat.PLAIN
    if tensor.shape[-1] % NVFP4_GROUP:
        raise CheckpointError(
            f"{tensor.name}: {tensor.shape[-1]} inputs do not divide by {NVFP4_GROUP}, "
            f"as nvfp4 needs; take bf16 or fp8"
        )
    return wanted


def tensor_specs(
    target: StoredWeight,
    *,
    scale_dtype: torch.dtype = torch.bfloat16,
    input_scale_dtype: torch.dtype = torch.bfloat16,
) -> tuple[TensorSpec, ...]:
    """The tensors of a weight; the dtypes of scales are FP8's, as NVFP4 has its own."""
    shape = target.expected.shape
    if target.weight_format is WeightFormat.PLAIN:
        return (TensorSpec(target.values, torch.bfloat16, shape),)
    found: list[tuple[str | None, torch.dtype, tuple[int, ...]]]
    if target.weight_format is WeightFormat.NVFP4:
        rows, columns = shape
        found = [
            (target.values, torch.uint8, (rows, columns // 2)),
            (target.scale, torch.float8_e4m3fn, (rows, columns // NVFP4_GROUP)),
            (target.global_scale, torch.float32, (1,)),
            (target.input_scale, torch.float32, (1,)),
        ]
    else:
        experts = shape[:1] if len(shape) == 3 else ()  # stacked ones have a scale each
        found = [
            (target.values, torch.float8_e4m3fn, shape),
            (target.scale, scale_dtype, (*experts, 1, 1) if experts else ()),
            (target.input_scale, input_scale_dtype, experts),
        ]
    return tuple(TensorSpec(name, dtype, shape) for name, dtype, shape in found if name)


@dataclass(frozen=True, slots=True)
class _Converter:
    """Makes the tensors of the result out of the source's weights."""

    source: _Source
    scheme: NamingScheme
    quantization: Quantization | None

    def batch(self, tensor: ExpectedTensor) -> TensorBatch:
        weight_format = self._format(tensor)
        target = stored_weight(tensor, self.scheme.layout, weight_format)
        if self.quantization is None or not self.quantization.has_input_scales:
            target = replace(target, input_scale=None)
        if len(tensor.shape) == 3:
            return TensorBatch(self._specs(target), lambda: self._make_stacked(target))
        return TensorBatch(self._specs(target), lambda: self._make(target))

    def _format(self, tensor: ExpectedTensor) -> WeightFormat:
        if self.quantization is None or tensor.parameter not in QUANTIZABLE:
            return WeightFormat.PLAIN
        wanted, found = self.quantization.weight_format, self.source.config.quantization
        if found is None or found.weight_format is not wanted:
            return official_format(tensor, wanted)
        formats = {weight.weight_format for weight in self._source_weights(tensor)}
        if len(formats) > 1:
            raise CheckpointError(
                f"{tensor.name}: only a part of it is {wanted.value}; take precision bf16"
            )
        return formats.pop()

    def _source_weights(self, tensor: ExpectedTensor) -> list[StoredWeight]:
        parts = _PARTS.get(tensor.parameter, (tensor.parameter,))
        experts = range(tensor.shape[0]) if tensor.parameter in _PARTS else (tensor.expert,)
        return [
            self.source.stored(part, tensor.layer, expert) for part in parts for expert in experts
        ]

    def _specs(self, target: StoredWeight) -> tuple[TensorSpec, ...]:
        if target.weight_format is not WeightFormat.FP8:
            return tensor_specs(target)
        weights = [
            weight
            for weight in self._source_weights(target.expected)
            if weight.weight_format is WeightFormat.FP8
        ]
        return tensor_specs(
            target,
            scale_dtype=self._scale_dtype({weight.scale for weight in weights}),
            input_scale_dtype=self._scale_dtype({weight.input_scale for weight in weights}),
        )

    def _scale_dtype(self, names: set[str | None]) -> torch.dtype:
        """The source's, so that nothing is rounded; bf16, as in official files, for new scales."""
        dtypes = {self.source.reader.dtype(name) for name in names if name is not None}
        if len(dtypes) > 1:
            return torch.float32
        return dtypes.pop() if dtypes else torch.bfloat16

    def _make(self, target: StoredWeight) -> Iterator[torch.Tensor]:
        tensor = target.expected
        raw = self.source.raw(tensor.parameter, tensor.layer, tensor.expert)
        raw = _rounded(self._reordered(tensor, raw), target.weight_format, tensor.name)
        yield raw.values
        pieces = [raw.scale, raw.global_scale, raw.input_scale if target.input_scale else None]
        yield from _as_specs(pieces, self._specs(target)[1:])

    def _make_stacked(self, target: StoredWeight) -> Iterator[torch.Tensor]:
        tensor = target.expected
        scales: list[torch.Tensor | None] = []
        input_scales: list[torch.Tensor | None] = []
        for expert in range(tensor.shape[0]):
            raw = self._joined(tensor, expert, target.weight_format)
            yield raw.values
            scales.append(raw.scale)
            input_scales.append(raw.input_scale if target.input_scale else None)
        yield from _as_specs([_stacked(scales), _stacked(input_scales)], self._specs(target)[1:])

    def _joined(
        self, tensor: ExpectedTensor, expert: int, weight_format: WeightFormat
    ) -> RawWeight:
        """One expert of a stacked parameter."""
        parts = [
            _rounded(self.source.raw(part, tensor.layer, expert), weight_format, tensor.name)
            for part in _PARTS[tensor.parameter]
        ]
        return parts[0] if len(parts) == 1 else join_rows(parts[0], parts[1])

    def _reordered(self, tensor: ExpectedTensor, raw: RawWeight) -> RawWeight:
        """With the rows of the vision tower's queries and keys as the wanted layout has them."""
        vision = self.source.config.vision
        if tensor.parameter not in INTERLEAVED or vision is None:
            return raw
        if self.source.layout is self.scheme.layout:
            return raw
        native = self.source.layout is CheckpointLayout.MISTRAL
        reorder = pairs_to_halves if native else halves_to_pairs
        return replace(raw, values=reorder(raw.values, vision.num_heads))


def _rounded(raw: RawWeight, weight_format: WeightFormat, name: str) -> RawWeight:
    """`requantize`, refused where a value is not finite: rounding would make it a number."""
    rounded = requantize(raw, weight_format)
    if rounded.scale is not None and not bool(torch.isfinite(rounded.scale.float()).all()):
        raise CheckpointError(f"{name}: holds values that are not finite; fetch its file anew")
    return rounded


def _stacked(scales: list[torch.Tensor | None]) -> torch.Tensor | None:
    present = [scale.float().view(()) for scale in scales if scale is not None]
    return torch.stack(present) if present else None


def _as_specs(
    pieces: list[torch.Tensor | None], specs: tuple[TensorSpec, ...]
) -> Iterator[torch.Tensor]:
    """The pieces that there are, as their specs want them."""
    present = [piece for piece in pieces if piece is not None]
    for piece, spec in zip(present, specs, strict=True):
        yield piece.to(spec.dtype).view(spec.shape)
