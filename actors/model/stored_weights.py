"""How each weight of a checkpoint is stored: plain, FP8 or NVFP4, and in which tensors.

`match_tensors` holds every tensor of a checkpoint against the config, by headers alone. `read_raw`
hands a weight out as it is stored, for kernels that multiply in its own format; `fill` is the way
of those that do not: dequantised, one weight or one expert at a time, into memory that is there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch

from ostro.actors.errors import CheckpointError
from ostro.actors.model.checkpoint import CheckpointReader, ReadProgress
from ostro.actors.model.native_names import HEAD_SCHEME, choose_naming
from ostro.actors.model.weight_formats import NVFP4_GROUP, RawWeight, dequantize_into
from ostro.actors.model.weight_names import ExpectedTensor, NamingScheme, Shape
from ostro.configs.checkpoint_layout import CheckpointLayout
from ostro.configs.model import ModelConfig
from ostro.configs.quantization import WeightFormat

# Parameters that may be quantised: what multiplies most of the bytes. The rest is plain always.
_ATTENTION = ("q_a", "q_b", "kv_a", "kv_b", "o_proj")
_SHARED = ("shared_gate", "shared_up", "shared_down")
_EXPERTS = ("experts_gate_up", "experts_down", "expert_gate", "expert_up", "expert_down")
QUANTIZABLE = frozenset((*_ATTENTION, *_SHARED, *_EXPERTS, "joint"))
StoredPlain: TypeAlias = frozenset[tuple[str, int | None]]  # (parameter, layer) of some weights
_PLAIN = ("BF16", "F32", "F16")
_FP8_STEP = 16  # to which cuBLAS wants rows of weights, inputs and outputs aligned
_LISTED = 6  # names that an error lists of each kind


def multipliable_format(config: ModelConfig) -> WeightFormat:
    """The format in which a checkpoint's weights can be multiplied as they are stored.

    NVFP4 always can, with inputs in the model's dtype. FP8 needs a scale for the inputs of
    each weight, and sizes that divide by 16. Otherwise PLAIN: quantised weights are dequantised.
    """
    declared = config.quantization
    if declared is None:
        return WeightFormat.PLAIN
    if declared.weight_format is WeightFormat.NVFP4:
        return WeightFormat.NVFP4
    sizes = (
        config.hidden_size,
        config.q_lora_rank,
        config.latent_width(),
        config.num_heads * config.qk_head_dim(),
        config.num_heads * config.v_head_dim,
        config.expert_hidden_size,
        config.shared_hidden_size(),
    )
    is_served = declared.has_input_scales and not any(size % _FP8_STEP for size in sizes)
    return WeightFormat.FP8 if is_served else WeightFormat.PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """One expected weight and the tensors that hold it, by name.

    Attributes:
        expected: Which weight.
        weight_format: How it is stored.
        values: The tensor of its values.
        scale: Of its scales; None if PLAIN.
        global_scale: Of its global scale; None unless NVFP4.
        input_scale: Of the scale of its inputs, if there is one.
    """

    expected: ExpectedTensor
    weight_format: WeightFormat
    values: str
    scale: str | None = None
    global_scale: str | None = None
    input_scale: str | None = None

    def tensors(self) -> tuple[str, ...]:
        """All of its tensors."""
        every = (self.values, self.scale, self.global_scale, self.input_scale)
        return tuple(name for name in every if name is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMatch:
    """A checkpoint's tensors held against its config.

    Attributes:
        scheme: How they are named.
        weights: Every weight that is there, by the name that it has when plain.
        missing: Tensors that should be there.
        unknown: Tensors that fill nothing, each with its file.
        misfits: Tensors of a wrong shape, dtype or format, each with what is wrong.
        ignored: Known tensors that the config has no use for.
    """

    scheme: NamingScheme
    weights: dict[str, StoredWeight]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    misfits: tuple[str, ...]
    ignored: tuple[str, ...]

    def problem(self) -> str | None:
        """Everything that is wrong in one sentence; None if nothing is."""
        kinds = {
            "missing": self.missing,
            "unknown": self.unknown,
            "not as the config says": self.misfits,
        }
        told = [f"{len(found)} {kind}: {_abridge(found)}" for kind, found in kinds.items() if found]
        return "tensors " + "; ".join(told) if told else None

    def check(self, directory: Path) -> None:
        """Raise `CheckpointError` if anything is wrong."""
        problem = self.problem()
        if problem is not None:
            raise CheckpointError(f"{directory}: {problem}")


def _abridge(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def match_tensors(reader: CheckpointReader, config: ModelConfig) -> TensorMatch:
    """Find the tensors of every weight; reads nothing but what the reader knows already.

    Raises:
        CheckpointError: The names follow no known scheme.
    """
    names = reader.names()
    scheme = HEAD_SCHEME if config.is_draft_head() else choose_naming(names)
    search = _Search(reader, config, scheme, frozenset(names))
    weights = {
        expected.name: stored
        for expected in scheme.expected(config).values()
        if (stored := search.find(expected)) is not None
    }
    used = {name for stored in weights.values() for name in stored.tensors()}
    left = [name for name in names if name not in used]
    ignored = tuple(name for name in left if scheme.is_ignored(name, config))
    unserved = frozenset(ignored)
    return TensorMatch(
        scheme=scheme,
        weights=weights,
        missing=tuple(sorted(search.missing)),
        unknown=tuple(f"{reader.file(name).name}: {name}" for name in left if name not in unserved),
        misfits=tuple(search.misfits),
        ignored=ignored,
    )


def stored_plain(match: TensorMatch) -> StoredPlain:
    """Which weights a checkpoint leaves plain of those that may be quantised."""
    return frozenset(
        (weight.expected.parameter, weight.expected.layer)
        for weight in match.weights.values()
        if weight.weight_format is WeightFormat.PLAIN and weight.expected.parameter in QUANTIZABLE
    )


def stored_weight(
    expected: ExpectedTensor, layout: CheckpointLayout, weight_format: WeightFormat
) -> StoredWeight:
    """The tensors that a weight has in a layout and format, the scale of its inputs included."""
    name = expected.name
    if weight_format is WeightFormat.PLAIN:
        return StoredWeight(expected=expected, weight_format=weight_format, values=name)
    module = name.removesuffix("weight")
    if weight_format is WeightFormat.NVFP4:
        return StoredWeight(
            expected=expected,
            weight_format=weight_format,
            values=module + "weight_packed",
            scale=module + "weight_scale",
            global_scale=module + "weight_global_scale",
            input_scale=module + "input_global_scale",
        )
    scales = (name + "_scale_inv", name + "_activation_scale")  # of stacked experts
    if name.endswith(".weight"):
        scales = (name + "_scale_inv", module + "activation_scale")
    if layout is CheckpointLayout.MISTRAL:
        scales = (module + "qscale_weight", module + "qscale_act")
    return StoredWeight(
        expected=expected,
        weight_format=weight_format,
        values=name,
        scale=scales[0],
        input_scale=scales[1],
    )


@dataclass(slots=True)
class _Search:
    """Finds each weight's tensors and notes what is wrong with them."""

    reader: CheckpointReader
    config: ModelConfig
    scheme: NamingScheme
    names: frozenset[str]
    missing: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    def find(self, expected: ExpectedTensor) -> StoredWeight | None:
        weight_format = self._format(expected)
        if weight_format is None:
            self.missing.append(expected.name)
            return None
        full = stored_weight(expected, self.scheme.layout, weight_format)
        stored = self._present(full)
        self._check_format(stored)
        self._check_groups(stored)
        for name, dtypes, shapes in _demands(stored):
            self._check_tensor(name, dtypes, shapes)
        return stored

    def _format(self, expected: ExpectedTensor) -> WeightFormat | None:
        if expected.parameter in QUANTIZABLE:
            packed = stored_weight(expected, self.scheme.layout, WeightFormat.NVFP4)
            if not self.names.isdisjoint(packed.tensors()):
                return WeightFormat.NVFP4
            fp8 = stored_weight(expected, self.scheme.layout, WeightFormat.FP8)
            if fp8.scale in self.names or self._dtype(expected.name) == "F8_E4M3":
                return WeightFormat.FP8
        return WeightFormat.PLAIN if expected.name in self.names else None

    def _dtype(self, name: str) -> str | None:
        return self.reader.dtype_name(name) if name in self.names else None

    def _present(self, full: StoredWeight) -> StoredWeight:
        """Without the tensors that are not there; those that should be are noted as missing."""
        declared = self.config.quantization
        optional = full.input_scale if declared and not declared.has_input_scales else None
        absent = {name for name in full.tensors() if name not in self.names}
        self.missing += sorted(absent - {optional})
        return StoredWeight(
            expected=full.expected,
            weight_format=full.weight_format,
            values=full.values,
            scale=None if full.scale in absent else full.scale,
            global_scale=None if full.global_scale in absent else full.global_scale,
            input_scale=None if full.input_scale in absent else full.input_scale,
        )

    def _check_format(self, stored: StoredWeight) -> None:
        declared = self.config.quantization
        declared_format = declared.weight_format if declared else WeightFormat.PLAIN
        if stored.weight_format not in (WeightFormat.PLAIN, declared_format):
            self.misfits.append(
                f"{stored.values} is {stored.weight_format.value}, but "
                f"{self.scheme.layout.config_name} declares {declared_format.value}"
            )

    def _check_groups(self, stored: StoredWeight) -> None:
        num_inputs = stored.expected.shape[-1]
        if stored.weight_format is WeightFormat.NVFP4 and num_inputs % NVFP4_GROUP:
            self.misfits.append(
                f"{stored.values} has {num_inputs} inputs, which nvfp4 cannot cut into groups of "
                f"{NVFP4_GROUP}"
            )

    def _check_tensor(self, name: str, dtypes: Sequence[str], shapes: Sequence[Shape]) -> None:
        if name not in self.names:
            return  # noted as missing
        shape, dtype = self.reader.shape(name), self.reader.dtype_name(name)
        where = f"{self.reader.file(name).name}: {name} is"
        if shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            self.misfits.append(f"{where} {list(shape)}, not {wanted}")
        elif dtype not in dtypes:
            self.misfits.append(f"{where} {dtype}, not {' or '.join(dtypes)}")


def _demands(stored: StoredWeight) -> Iterator[tuple[str, Sequence[str], Sequence[Shape]]]:
    """(tensor, the dtypes and the shapes that it may have) of each tensor of a weight."""
    shape = stored.expected.shape
    one: tuple[Shape, ...] = ((), (1,))
    if stored.weight_format is WeightFormat.PLAIN:
        yield stored.values, _PLAIN, (shape,)
        return
    if len(shape) == 3:  # stacked experts have a scale each
        one = ((shape[0],), (shape[0], 1, 1))
    if stored.weight_format is WeightFormat.FP8:
        yield stored.values, ("F8_E4M3",), (shape,)
        scales = (stored.scale, stored.input_scale)
    else:
        yield stored.values, ("U8",), ((shape[0], shape[1] // 2),)
        if stored.scale is not None:
            yield stored.scale, ("F8_E4M3",), ((shape[0], shape[1] // NVFP4_GROUP),)
        scales = (stored.global_scale, stored.input_scale)
    for name in scales:
        if name is not None:
            yield name, _PLAIN, one


def read_raw(
    reader: CheckpointReader,
    stored: StoredWeight,
    *,
    row: int | None = None,
    device: torch.device | str = "cpu",
) -> RawWeight:
    """Read a weight as it is stored.

    Args:
        reader: The checkpoint.
        stored: The weight.
        row: Which expert of stacked ones; None where the weight is not stacked.
        device: Where to.

    Raises:
        CheckpointError: As `check_scale`; the scale of the inputs is left to who divides by it.
    """

    def read(name: str) -> torch.Tensor:
        if row is None:
            return reader.read(name, device=device)
        return reader.read(name, rows=[row], device=device)[0]

    raw = RawWeight(
        weight_format=stored.weight_format,
        values=read(stored.values),
        scale=read(stored.scale) if stored.scale else None,
        global_scale=read(stored.global_scale) if stored.global_scale else None,
        input_scale=read(stored.input_scale) if stored.input_scale else None,
    )
    check_scale(stored.scale, raw.scale)
    check_scale(stored.global_scale, raw.global_scale, divides=True)
    return raw


def check_scale(name: str | None, scale: torch.Tensor | None, *, divides: bool = False) -> None:
    """Refuse a scale that would make every product with its weight a NaN or an infinity.

    Args:
        name: Its tensor.
        scale: One or several; None is right.
        divides: Whether something is divided by it.

    Raises:
        CheckpointError: It is not finite, or divides and is zero.
    """
    if scale is None:
        return
    wide = scale.float()
    is_right = torch.isfinite(wide)
    if divides:
        is_right &= torch.isfinite(1.0 / wide)
    if not bool(is_right.all()):
        other = " and not zero" if divides else ""
        raise CheckpointError(f"{name}: a scale must be finite{other}; fetch its file anew")


def check_input_scale(name: str | None, scale: torch.Tensor | None) -> None:
    """As `check_scale`, of a scale that inputs are divided by: weights can do without it.

    Raises:
        CheckpointError: It is not finite, or zero.
    """
    try:
        check_scale(name, scale, divides=True)
    except CheckpointError as error:
        way_out = "or serve a copy without: ostro weights convert --precision bf16"
        raise CheckpointError(f"{error}, {way_out}") from None


def fill(
    reader: CheckpointReader,
    stored: StoredWeight,
    out: torch.Tensor,
    *,
    row: int | None = None,
    progress: ReadProgress | None = None,
) -> None:
    """Read a weight into contiguous memory of its shape, dequantised on the memory's own device.

    Args:
        reader: The checkpoint.
        stored: The weight.
        out: Its dtype is what the weight is rounded to.
        row: Which expert of stacked ones; `out` is then that expert's.
        progress: Told the bytes of `out`.
    """
    if stored.weight_format is WeightFormat.PLAIN:
        rows = None if row is None else [row]
        target = out if row is None else out[None]
        reader.read_into(target, stored.values, rows=rows, progress=progress)
        return
    raw = read_raw(reader, stored, row=row, device=out.device)
    dequantize_into(out, raw)
    if progress is not None:
        progress(math.prod(out.shape) * out.dtype.itemsize)
