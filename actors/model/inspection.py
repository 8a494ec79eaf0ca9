"""What a directory of weights holds, a model or a draft head, told from config and headers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ostro.actors.errors import CheckpointError
from ostro.actors.model.checkpoint import CheckpointReader
from ostro.actors.model.stored_weights import (
    StoredPlain,
    StoredWeight,
    TensorMatch,
    match_tensors,
    stored_plain,
)
from ostro.actors.model.weight_names import HEAD_JOINT, VISION_TABLE
from ostro.configs.checkpoint_layout import CheckpointLayout, find_layout, other_layout
from ostro.configs.model import ModelConfig, load_head_config, load_model_config
from ostro.configs.quantization import WeightFormat

_GROUPS = {
    "routed experts": (
        "experts_gate_up",
        "experts_down",
        "expert_gate",
        "expert_up",
        "expert_down",
    ),
    "shared experts": ("shared_gate", "shared_up", "shared_down"),
    "attention": ("q_a", "q_b", "kv_a", "kv_b", "o_proj"),
    "gates and norms": ("gate", "input_norm", "post_norm", "q_a_norm", "kv_a_norm", "final_norm"),
    "embedding and head": ("embed", "lm_head"),
    "embedding and hidden state joined": ("joint",),
    "vision tower and projector": tuple(row.parameter for row in VISION_TABLE),
}
_GROUPS_OF_HEAD = {"shared experts": "feed-forward", "gates and norms": "norms"}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGroup:
    """Weights that are of a kind.

    Attributes:
        precisions: What they are stored in, the largest part first.
        num_tensors: Tensors, scales included.
        num_parameters: Values of the model, however they are stored.
        num_bytes: Size in the files.
    """

    title: str
    precisions: tuple[str, ...]
    num_tensors: int
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A checkpoint's content.

    Attributes:
        layout: The layout that is read.
        other: A whole one beside it, which is not read.
        config: What its config says.
        num_files: Files of weights.
        groups: The weights, largest group first; empty if they cannot be told.
        missing: Tensors that should be there.
        unknown: Tensors that fill nothing.
        misfits: Tensors that are not as the config says.
        ignored: Tensors that are known and not served.
        plain: What is plain of what may be quantised.
        problem: Why it would not load, in one sentence; None if it would.
    """

    layout: CheckpointLayout
    other: CheckpointLayout | None
    config: ModelConfig
    num_files: int = 0
    groups: tuple[WeightGroup, ...] = ()
    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    misfits: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    plain: StoredPlain = frozenset()
    problem: str | None = None

    def num_parameters(self) -> int:
        """Values of the model that are there."""
        return sum(group.num_parameters for group in self.groups)

    def num_bytes(self) -> int:
        """Size of the served weights in the files."""
        return sum(group.num_bytes for group in self.groups)


def inspect_checkpoint(directory: Path) -> Inspection:
    """Read the config and headers of a checkpoint, or of a draft head, and hold them together.

    Raises:
        ConfigError: There is no config that can be served.
    """
    config = load_head_config(directory) if _is_head(directory) else load_model_config(directory)
    layout, other = find_layout(directory), other_layout(directory)
    try:
        reader = CheckpointReader(directory)
        match = match_tensors(reader, config)
    except CheckpointError as error:
        return Inspection(layout=layout, other=other, config=config, problem=error.message)
    return Inspection(
        layout=layout,
        other=other,
        config=config,
        num_files=len({reader.file(name) for name in reader.names()}),
        groups=_groups(reader, match, _GROUPS_OF_HEAD if config.is_draft_head() else {}),
        missing=match.missing,
        unknown=match.unknown,
        misfits=match.misfits,
        ignored=match.ignored,
        plain=stored_plain(match),
        problem=match.problem(),
    )


def _is_head(directory: Path) -> bool:
    """Told by the tensor that no model has; a directory without readable weights is a model's."""
    try:
        return directory.is_dir() and HEAD_JOINT.tensor in CheckpointReader(directory).names()
    except CheckpointError:
        return False


def _groups(
    reader: CheckpointReader, match: TensorMatch, renamed: Mapping[str, str]
) -> tuple[WeightGroup, ...]:
    title_of = {
        parameter: renamed.get(title, title) for title, row in _GROUPS.items() for parameter in row
    }
    by_title: dict[str, list[StoredWeight]] = {}
    for weight in match.weights.values():
        by_title.setdefault(title_of[weight.expected.parameter], []).append(weight)
    groups = [_group(title, weights, reader) for title, weights in by_title.items()]
    return tuple(sorted(groups, key=lambda group: -group.num_bytes))


def _group(title: str, weights: Iterable[StoredWeight], reader: CheckpointReader) -> WeightGroup:
    num_tensors = num_parameters = 0
    bytes_by_precision: Counter[str] = Counter()
    there = frozenset(reader.names())
    for weight in weights:
        tensors = [name for name in weight.tensors() if name in there]
        num_tensors += len(tensors)
        num_parameters += math.prod(weight.expected.shape) if weight.values in there else 0
        size = sum(reader.num_bytes(name) for name in tensors)
        bytes_by_precision[_precision(weight, reader)] += size
    return WeightGroup(
        title=title,
        precisions=tuple(name for name, _ in bytes_by_precision.most_common()),
        num_tensors=num_tensors,
        num_parameters=num_parameters,
        num_bytes=bytes_by_precision.total(),
    )


def _precision(weight: StoredWeight, reader: CheckpointReader) -> str:
    if weight.weight_format is WeightFormat.PLAIN:
        return reader.dtype_name(weight.values).lower()
    name: str = weight.weight_format.value
    return name
