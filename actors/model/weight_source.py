"""One role's share of a checkpoint, handed out parameter by parameter, each once.

Whatever the layout and the formats: a parameter comes out dequantised to the dtype asked for, in
the row order that the model computes with. Where that is asked for, FP8 weights of linear layers
and experts stay as they are stored, and NVFP4 ones keep their codes and scales. Only the bytes
asked for are read, one tensor or expert at a time.

Shape letters: E local experts, F expert hidden, D hidden, O outputs, I inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ostro.actors.errors import CheckpointError
from ostro.actors.model.checkpoint import CheckpointReader, ReadProgress
from ostro.actors.model.fp8_stack import Fp8Stack, new_fp8_stack
from ostro.actors.model.native_names import INTERLEAVED
from ostro.actors.model.nvfp4_weights import (
    MATRICES,
    Matrix,
    new_nvfp4_experts,
    nvfp4_matrix_bytes,
    nvfp4_weight,
    put_nvfp4,
)
from ostro.actors.model.stored_weights import (
    StoredWeight,
    check_input_scale,
    check_scale,
    fill,
    match_tensors,
    multipliable_format,
    read_raw,
)
from ostro.actors.model.weight_formats import RawWeight, fp8_weight, join_rows, pairs_to_halves
from ostro.actors.model.weight_names import Role
from ostro.configs.checkpoint_layout import CheckpointLayout
from ostro.configs.model import ModelConfig
from ostro.configs.quantization import WeightFormat
from ostro.kernels.fp8_experts import Fp8Experts
from ostro.kernels.fp8_linear import Fp8Weight
from ostro.kernels.linear import LinearWeight
from ostro.kernels.nvfp4_experts import Nvfp4Experts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Where each tensor of a checkpoint went, by name; together they are all of its tensors.

    Attributes:
        used: Belong to the role that was loaded; of routed experts those of all shards.
        other_role: Fill the other role's parameters.
        ignored: Known and not served, as a tower that the config does not describe.
    """

    used: tuple[str, ...]
    other_role: tuple[str, ...]
    ignored: tuple[str, ...]


class WeightSource:
    """Reads one role's weights, each once, and knows at the end whether all were read.

    Whatever takes a weight refuses one with a scale that is not finite.

    Raises:
        CheckpointError: A tensor is missing, unknown, or not as the config says; one error tells
            all of it, before any memory is taken.
        ValueError: The checkpoint's weights cannot be multiplied in `precision`.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        config: ModelConfig,
        role: Role,
        *,
        device: torch.device | str,
        precision: WeightFormat,
        progress: ReadProgress | None,
    ) -> None:
        if precision not in (WeightFormat.PLAIN, multipliable_format(config)):
            wanted = precision.value + " weights"
            if precision is WeightFormat.FP8:
                wanted += " with scales for their inputs"
            raise ValueError(f"precision={precision.value}, but {reader.directory} has no {wanted}")
        self.config = config
        self._precision = precision
        self._num_rounded = 0
        self._reader = reader
        self._match = match_tensors(reader, config)
        self._match.check(reader.directory)
        self._device = torch.device(device)
        self._progress = progress
        weights = self._match.weights.values()
        self._wanted = {weight.values for weight in weights if weight.expected.role is role}
        self._taken: set[str] = set()
        self._role = role

    def take(self, parameter: str, layer: int | None, dtype: torch.dtype) -> torch.Tensor:
        """A parameter that is one weight, on the source's device.

        Raises:
            CheckpointError: It was taken already, or is another role's.
        """
        out = self._fill(self._claim(parameter, layer), dtype)
        vision = self.config.vision
        native = self._match.scheme.layout is CheckpointLayout.MISTRAL
        if native and parameter in INTERLEAVED and vision is not None:
            return pairs_to_halves(out, vision.num_heads)
        return out

    def take_linear(
        self, parameters: Sequence[str], layer: int | None, dtype: torch.dtype
    ) -> LinearWeight:
        """One or two parameters that multiply the same rows, as one weight, the first one's on top.

        FP8 or NVFP4 if that is the precision asked for and they are stored so, else dequantised.

        Raises:
            CheckpointError: One was taken already, or is another role's.
        """
        weights = [self._claim(parameter, layer) for parameter in parameters]
        if self._all_stay(WeightFormat.NVFP4, weights):
            packed = nvfp4_weight([self._raw(weight) for weight in weights])
            self._tell(packed.words_BOW, packed.scales_BOS, packed.unit_O)
            return packed
        if not self._all_stay(WeightFormat.FP8, weights):
            parts = [self._fill(weight, dtype) for weight in weights]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        joined = self._read_joined(weights)
        self._tell(joined.values_OI, joined.scale, joined.input_scale)
        return joined

    def take_experts(
        self,
        layer: int,
        local_to_logical: Sequence[int],
        dtype: torch.dtype,
        num_extra: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate_up, down) of some experts of a layer.

        Args:
            layer: Whose experts.
            local_to_logical: The logical expert for each local slot; repeats are replicas.
            dtype: As what.
            num_extra: Slots behind those, which are left as they are.

        Returns:
            gate_up [E, 2F, D], gate rows first, and down [E, D, F], with E slots in all.

        Raises:
            CheckpointError: The layer's experts were taken already, or are another role's.
        """
        config, num_local = self.config, len(local_to_logical)
        hidden, inner = config.hidden_size, config.expert_hidden_size
        num_slots = num_local + num_extra
        gate_up = torch.empty((num_slots, 2 * inner, hidden), dtype=dtype, device=self._device)
        down = torch.empty((num_slots, hidden, inner), dtype=dtype, device=self._device)
        if self._match.scheme.stacks_experts():
            for parameter, out in (("experts_gate_up", gate_up), ("experts_down", down)):
                weight = self._claim(parameter, layer)
                self._fill_stacked(out[:num_local], weight, local_to_logical)
            return gate_up, down
        for parameter, out in (
            ("expert_gate", gate_up[:, :inner]),
            ("expert_up", gate_up[:, inner:]),
            ("expert_down", down),
        ):
            weights = [
                self._claim(parameter, layer, expert) for expert in range(config.num_experts)
            ]
            for slot, expert in enumerate(local_to_logical):
                fill(self._reader, weights[expert], out[slot], progress=self._progress)
        return gate_up, down

    def expert_format(self, layer: int) -> WeightFormat:
        """What a layer's experts are to be taken in: PLAIN unless all are stored as asked for."""
        weights = [
            weight
            for weight in self._match.weights.values()
            if weight.expected.role is Role.EXPERT and weight.expected.layer == layer
        ]
        return self._precision if self._all_stay(self._precision, weights) else WeightFormat.PLAIN

    def take_fp8_experts(
        self, layer: int, local_to_logical: Sequence[int], num_extra: int = 0
    ) -> Fp8Experts:
        """As `take_experts`, in FP8 as they are stored."""
        if self._match.scheme.stacks_experts():
            gate_up = self._fp8_of_stacked("experts_gate_up", layer, local_to_logical, num_extra)
            down = self._fp8_of_stacked("experts_down", layer, local_to_logical, num_extra)
        else:
            both = ("expert_gate", "expert_up")
            gate_up = self._fp8_of_single(both, layer, local_to_logical, num_extra)
            down = self._fp8_of_single(("expert_down",), layer, local_to_logical, num_extra)
        return Fp8Experts(
            gate_up_EHD=gate_up.values_EOI,
            gate_up_scale_E=gate_up.scale_E,
            gate_up_input_scale_E=gate_up.input_scale_E,
            down_EDF=down.values_EOI,
            down_scale_E=down.scale_E,
            down_input_scale_E=down.input_scale_E,
        )

    def take_nvfp4_experts(
        self, layer: int, local_to_logical: Sequence[int], num_extra: int = 0
    ) -> Nvfp4Experts:
        """As `take_experts`, in NVFP4; no value changes."""
        num_slots = len(local_to_logical) + num_extra
        experts = new_nvfp4_experts(self.config, num_slots, self._device)
        for matrix in MATRICES:
            weights = [
                self._claim(f"expert_{matrix}", layer, expert)
                for expert in range(self.config.num_experts)
            ]
            for slot, expert in enumerate(local_to_logical):
                self._put_nvfp4(experts, slot, matrix, weights[expert])
        return experts

    def take_shared_nvfp4(self, layer: int, into: Nvfp4Experts) -> None:
        """A layer's shared expert in NVFP4, into the last slot.

        Raises:
            CheckpointError: As `take_experts`.
            TypeError: It is stored otherwise.
        """
        weights = [self._claim(f"shared_{matrix}", layer) for matrix in MATRICES]
        if not self._all_stay(WeightFormat.NVFP4, weights):
            raise TypeError("routed experts are NVFP4 and the shared one is not; load it apart")
        for matrix, weight in zip(MATRICES, weights, strict=True):
            self._put_nvfp4(into, len(into.down_unit_E) - 1, matrix, weight)

    def verify(self) -> LoadReport:
        """Where every tensor of the checkpoint went; raises if one of this role went nowhere."""
        if self._taken != self._wanted:
            left = sorted(self._wanted - self._taken)
            raise CheckpointError(f"{self._reader.directory}: tensors fill no parameter: {left}")
        mine: list[str] = []
        others: list[str] = []
        for weight in self._match.weights.values():
            (mine if weight.expected.role is self._role else others).extend(weight.tensors())
        report = LoadReport(tuple(mine), tuple(others), self._match.ignored)
        if self._num_rounded:
            logger.warning(
                "%s: gate and up had different scales in %d weights of the %s role and were "
                "rounded anew to a common one",
                self._reader.directory,
                self._num_rounded,
                self._role.value,
            )
        logger.debug(
            "%s: %d tensors fill the %s role, %d belong to the other one, %d are not served",
            self._reader.directory,
            len(report.used),
            self._role.value,
            len(report.other_role),
            len(report.ignored),
        )
        return report

    def tell_dequantized(self, dtype: torch.dtype) -> None:
        """Log that a GPU serves quantised weights in another precision than their own."""
        formats = {
            weight.weight_format.value
            for weight in self._match.weights.values()
            if weight.expected.role is self._role and weight.weight_format is not WeightFormat.PLAIN
        }
        is_plain = self._precision is WeightFormat.PLAIN
        if formats and is_plain and self._device.type == "cuda":
            logger.warning(
                "%s: %s weights of the %s role are dequantised to %s on the GPU and take that "
                "memory: only nvfp4, and fp8 with scales for inputs, are multiplied as they are "
                "stored",
                self._reader.directory,
                " and ".join(sorted(formats)),
                self._role.value,
                str(dtype).removeprefix("torch."),
            )

    def _claim(self, parameter: str, layer: int | None, expert: int | None = None) -> StoredWeight:
        name = self._match.scheme.tensor(parameter, layer, expert)
        weight = self._match.weights[name]
        if weight.values in self._taken or weight.values not in self._wanted:
            raise CheckpointError(f"tensor {name} fills a second parameter, or another role's")
        self._taken.add(weight.values)
        return weight

    def _fill(self, weight: StoredWeight, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(weight.expected.shape, dtype=dtype, device=self._device)
        fill(self._reader, weight, out, progress=self._progress)
        return out

    def _raw(self, weight: StoredWeight) -> RawWeight:
        return read_raw(self._reader, weight, device=self._device)

    def _all_stay(self, weight_format: WeightFormat, weights: Sequence[StoredWeight]) -> bool:
        return self._precision is weight_format and all(
            weight.weight_format is weight_format for weight in weights
        )

    def _put_nvfp4(
        self, experts: Nvfp4Experts, slot: int, matrix: Matrix, weight: StoredWeight
    ) -> None:
        put_nvfp4(experts, slot, matrix, self._raw(weight))
        num_outputs, num_inputs = weight.expected.shape
        self._tell_bytes(nvfp4_matrix_bytes(num_outputs, num_inputs))

    def _read_joined(self, weights: Sequence[StoredWeight]) -> Fp8Weight:
        raws = [self._raw(weight) for weight in weights]
        for weight, raw in zip(weights, raws, strict=True):
            check_input_scale(weight.input_scale, raw.input_scale)
        if len(raws) == 1:
            return fp8_weight(raws[0])
        joined = join_rows(raws[0], raws[1])
        self._num_rounded += joined.scale is not raws[0].scale
        return fp8_weight(joined)

    def _fp8_of_stacked(
        self, parameter: str, layer: int, local_to_logical: Sequence[int], num_extra: int
    ) -> Fp8Stack:
        weight, reader = self._claim(parameter, layer), self._reader
        num_local = len(local_to_logical)
        stack = new_fp8_stack(num_local + num_extra, weight.expected.shape[1:], self._device)
        reader.read_into(
            stack.values_EOI[:num_local],
            weight.values,
            rows=local_to_logical,
            progress=self._progress,
        )
        _, *scales = weight.tensors()  # its own, then that of its inputs
        for name, out_E in zip(scales, (stack.scale_E, stack.input_scale_E), strict=True):
            scale_E = reader.read(name, rows=local_to_logical).view(-1)
            (check_input_scale if name == weight.input_scale else check_scale)(name, scale_E)
            out_E[:num_local].copy_(scale_E)
            self._tell(out_E[:num_local])
        return stack

    def _fp8_of_single(
        self,
        parameters: Sequence[str],
        layer: int,
        local_to_logical: Sequence[int],
        num_extra: int,
    ) -> Fp8Stack:
        by_expert = [
            [self._claim(parameter, layer, expert) for parameter in parameters]
            for expert in range(self.config.num_experts)
        ]
        num_out = sum(weight.expected.shape[0] for weight in by_expert[0])
        shape = (num_out, by_expert[0][0].expected.shape[1])
        stack = new_fp8_stack(len(local_to_logical) + num_extra, shape, self._device)
        for slot, expert in enumerate(local_to_logical):
            joined = self._read_joined(by_expert[expert])
            stack.values_EOI[slot].copy_(joined.values_OI)
            stack.scale_E[slot] = joined.scale
            stack.input_scale_E[slot] = joined.input_scale
            self._tell(joined.values_OI, joined.scale, joined.input_scale)
        return stack

    def _tell(self, *filled: torch.Tensor) -> None:
        self._tell_bytes(sum(tensor.nbytes for tensor in filled))

    def _tell_bytes(self, num_bytes: int) -> None:
        if self._progress is not None:
            self._progress(num_bytes)

    def _fill_stacked(
        self, out: torch.Tensor, weight: StoredWeight, local_to_logical: Sequence[int]
    ) -> None:
        if weight.weight_format is WeightFormat.PLAIN:  # in as few reads as there are runs
            self._reader.read_into(
                out, weight.values, rows=local_to_logical, progress=self._progress
            )
            return
        for slot, expert in enumerate(local_to_logical):
            fill(self._reader, weight, out[slot], row=expert, progress=self._progress)
