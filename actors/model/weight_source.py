"""One role's share of a checkpoint, handed out parameter by parameter, each once.

Whatever the layout and the formats: a parameter comes out dequantised to the dtype asked for, in
the row order that the model computes with. Only the bytes asked for are read.

Shape letters: E local experts, F expert hidden, D hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ostro.actors.errors import CheckpointError
from ostro.actors.model.checkpoint import CheckpointReader, ReadProgress
from ostro.actors.model.native_names import INTERLEAVED
from ostro.actors.model.stored_weights import StoredWeight, fill, match_tensors
from ostro.actors.model.weight_formats import pairs_to_halves
from ostro.actors.model.weight_names import Role
from ostro.configs.checkpoint_layout import CheckpointLayout
from ostro.configs.model import ModelConfig
from ostro.configs.quantization import WeightFormat

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

    Raises:
        CheckpointError: A tensor is missing, unknown, or not as the config says; one error tells
            all of it, before any memory is taken.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        config: ModelConfig,
        role: Role,
        *,
        device: torch.device | str,
        progress: ReadProgress | None,
    ) -> None:
        self.config = config
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
        weight = self._claim(parameter, layer)
        out = torch.empty(weight.expected.shape, dtype=dtype, device=self._device)
        fill(self._reader, weight, out, progress=self._progress)
        vision = self.config.vision
        native = self._match.scheme.layout is CheckpointLayout.MISTRAL
        if native and parameter in INTERLEAVED and vision is not None:
            return pairs_to_halves(out, vision.num_heads)
        return out

    def take_experts(
        self, layer: int, local_to_logical: Sequence[int], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate_up, down) of some experts of a layer.

        Args:
            layer: Whose experts.
            local_to_logical: The logical expert for each local slot; repeats are replicas.
            dtype: As what.

        Returns:
            gate_up [E, 2F, D], gate rows first, and down [E, D, F].

        Raises:
            CheckpointError: The layer's experts were taken already, or are another role's.
        """
        config, num_local = self.config, len(local_to_logical)
        hidden, inner = config.hidden_size, config.expert_hidden_size
        gate_up = torch.empty((num_local, 2 * inner, hidden), dtype=dtype, device=self._device)
        down = torch.empty((num_local, hidden, inner), dtype=dtype, device=self._device)
        if self._match.scheme.stacks_experts():
            self._fill_stacked(gate_up, self._claim("experts_gate_up", layer), local_to_logical)
            self._fill_stacked(down, self._claim("experts_down", layer), local_to_logical)
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
        if formats and self._device.type == "cuda":
            logger.warning(
                "%s: %s weights of the %s role are dequantised to %s on the GPU and take that "
                "memory: there are no kernels yet that multiply in their own precision",
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
