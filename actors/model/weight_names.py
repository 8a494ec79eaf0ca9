"""Which checkpoint tensor fills which parameter, what shape it must have, and which role needs it.

One table serves the Hugging Face layout under both of its prefixes, with experts stacked or one by
one; `native_names` has Mistral's. Names are those of a weight that is not quantised: what stands in
its place if it is, `stored_weights` knows. Knows no tensors, only names and shapes.

Shape letters: D hidden, H heads, C latent, P rope dim, E experts, F expert hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from ostro.configs.checkpoint_layout import CheckpointLayout
from ostro.configs.model import ModelConfig
from ostro.configs.vision import VisionConfig

Shape = tuple[int, ...]


class Role(Enum):
    """Which shard needs a tensor."""

    ATTENTION = "attention"
    EXPERT = "expert"


@dataclass(frozen=True, slots=True)
class WeightName:
    """One row of the table.

    Attributes:
        parameter: Our name for it.
        tensor: The tensor's name behind the scheme's prefix; `{layer}` marks one per layer,
            `{expert}` one per routed expert.
        role: Who loads it.
        shape: Its shape under a config.
    """

    parameter: str
    tensor: str
    role: Role
    shape: Callable[[ModelConfig], Shape]


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """A tensor that a checkpoint must hold.

    Attributes:
        expert: Which routed expert it is; None if it is none, or all of a layer stacked.
    """

    name: str
    parameter: str
    layer: int | None
    role: Role
    shape: Shape
    expert: int | None = None


def _row(
    parameter: str, tensor: str, shape: Callable[[ModelConfig], Shape], role: Role = Role.ATTENTION
) -> WeightName:
    return WeightName(parameter, tensor, role, shape)


_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
_SHARED = _LAYER + "mlp.shared_experts."
_EXPERTS = _LAYER + "mlp.experts."

COMMON_TABLE = (
    _row("embed", "model.embed_tokens.weight", lambda c: (c.vocab_size, c.hidden_size)),
    _row("final_norm", "model.norm.weight", lambda c: (c.hidden_size,)),
    _row("lm_head", "lm_head.weight", lambda c: (c.vocab_size, c.hidden_size)),
    _row("input_norm", _LAYER + "input_layernorm.weight", lambda c: (c.hidden_size,)),
    _row("post_norm", _LAYER + "post_attention_layernorm.weight", lambda c: (c.hidden_size,)),
    _row("q_a", _ATTENTION + "q_a_proj.weight", lambda c: (c.q_lora_rank, c.hidden_size)),
    _row("q_a_norm", _ATTENTION + "q_a_layernorm.weight", lambda c: (c.q_lora_rank,)),
    _row(
        "q_b",
        _ATTENTION + "q_b_proj.weight",
        lambda c: (c.num_heads * c.qk_head_dim(), c.q_lora_rank),
    ),
    _row(
        "kv_a",
        _ATTENTION + "kv_a_proj_with_mqa.weight",
        lambda c: (c.latent_width(), c.hidden_size),
    ),
    _row("kv_a_norm", _ATTENTION + "kv_a_layernorm.weight", lambda c: (c.kv_lora_rank,)),
    _row(
        "kv_b",
        _ATTENTION + "kv_b_proj.weight",
        lambda c: (c.num_heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
    ),
    _row(
        "o_proj",
        _ATTENTION + "o_proj.weight",
        lambda c: (c.hidden_size, c.num_heads * c.v_head_dim),
    ),
    _row("gate", _LAYER + "mlp.gate.weight", lambda c: (c.num_experts, c.hidden_size)),
    _row(
        "shared_gate",
        _SHARED + "gate_proj.weight",
        lambda c: (c.shared_hidden_size(), c.hidden_size),
    ),
    _row(
        "shared_up", _SHARED + "up_proj.weight", lambda c: (c.shared_hidden_size(), c.hidden_size)
    ),
    _row(
        "shared_down",
        _SHARED + "down_proj.weight",
        lambda c: (c.hidden_size, c.shared_hidden_size()),
    ),
)

# All routed experts of a layer in one tensor, its first axis the expert.
STACKED_EXPERTS = (
    _row(
        "experts_gate_up",  # rows 0 .. F-1 gate, F .. 2F-1 up
        _EXPERTS + "gate_up_proj",
        lambda c: (c.num_experts, 2 * c.expert_hidden_size, c.hidden_size),
        Role.EXPERT,
    ),
    _row(
        "experts_down",
        _EXPERTS + "down_proj",
        lambda c: (c.num_experts, c.hidden_size, c.expert_hidden_size),
        Role.EXPERT,
    ),
)

# Each routed expert in three tensors of its own.
SINGLE_EXPERTS = (
    _row(
        "expert_gate",
        _EXPERTS + "{expert}.gate_proj.weight",
        lambda c: (c.expert_hidden_size, c.hidden_size),
        Role.EXPERT,
    ),
    _row(
        "expert_up",
        _EXPERTS + "{expert}.up_proj.weight",
        lambda c: (c.expert_hidden_size, c.hidden_size),
        Role.EXPERT,
    ),
    _row(
        "expert_down",
        _EXPERTS + "{expert}.down_proj.weight",
        lambda c: (c.hidden_size, c.expert_hidden_size),
        Role.EXPERT,
    ),
)


# Makes of a token's embedding and of the hidden state before it, in this order, one row.
HEAD_JOINT = _row("joint", "eagle_linear.weight", lambda c: (c.hidden_size, 2 * c.hidden_size))

_TOWER = "vision_tower."
_BLOCK = _TOWER + "transformer.layers.{layer}."
_PROJECTOR = "multi_modal_projector."


def _vision_row(
    parameter: str, tensor: str, shape: Callable[[VisionConfig, int], Shape]
) -> WeightName:
    """A row of a checkpoint with a vision tower; `shape` is given the text model's D too."""

    def under(config: ModelConfig) -> Shape:
        if config.vision is None:
            raise ValueError(f"the config has no vision tower that {tensor} could be part of")
        return shape(config.vision, config.hidden_size)

    return WeightName(parameter, tensor, Role.ATTENTION, under)


def _square(vision: VisionConfig, _: int) -> Shape:
    return vision.hidden_size, vision.hidden_size


def _widening(vision: VisionConfig, _: int) -> Shape:
    return vision.intermediate_size, vision.hidden_size


def _norm(vision: VisionConfig, _: int) -> Shape:
    return (vision.hidden_size,)


# These names stand under no prefix. Rows of the tower's layers count `VisionConfig.num_layers`.
VISION_TABLE = (
    _vision_row(
        "patch_conv",
        _TOWER + "patch_conv.weight",
        lambda v, _: (v.hidden_size, v.num_channels, v.patch_size, v.patch_size),
    ),
    _vision_row("vision_pre_norm", _TOWER + "ln_pre.weight", _norm),
    _vision_row("vision_attention_norm", _BLOCK + "attention_norm.weight", _norm),
    _vision_row("vision_q", _BLOCK + "attention.q_proj.weight", _square),
    _vision_row("vision_k", _BLOCK + "attention.k_proj.weight", _square),
    _vision_row("vision_v", _BLOCK + "attention.v_proj.weight", _square),
    _vision_row("vision_o", _BLOCK + "attention.o_proj.weight", _square),
    _vision_row("vision_mlp_norm", _BLOCK + "ffn_norm.weight", _norm),
    _vision_row("vision_gate", _BLOCK + "feed_forward.gate_proj.weight", _widening),
    _vision_row("vision_up", _BLOCK + "feed_forward.up_proj.weight", _widening),
    _vision_row(
        "vision_down",
        _BLOCK + "feed_forward.down_proj.weight",
        lambda v, _: (v.hidden_size, v.intermediate_size),
    ),
    _vision_row("projector_norm", _PROJECTOR + "norm.weight", _norm),
    _vision_row(
        "projector_merge",
        _PROJECTOR + "patch_merger.merging_layer.weight",
        lambda v, _: (v.hidden_size, v.hidden_size * v.spatial_merge_size**2),
    ),
    _vision_row(
        "projector_in", _PROJECTOR + "linear_1.weight", lambda v, hidden: (hidden, v.hidden_size)
    ),
    _vision_row(
        "projector_out", _PROJECTOR + "linear_2.weight", lambda _, hidden: (hidden, hidden)
    ),
)


@dataclass(frozen=True, slots=True)
class NamingScheme:
    """How one checkpoint layout names its tensors.

    Attributes:
        layout: Which layout that is.
        prefix: Stands before every tensor of the text model.
        unserved_prefixes: Tensors that are known and, where the config has no use for them, not
            loaded.
        table: The rows of the text model.
        vision_table: The rows of a vision tower and its projector.
    """

    layout: CheckpointLayout
    prefix: str
    unserved_prefixes: tuple[str, ...]
    table: tuple[WeightName, ...]
    vision_table: tuple[WeightName, ...]

    def stacks_experts(self) -> bool:
        """Whether the routed experts of a layer stand in one tensor."""
        return any(row.parameter == "experts_down" for row in self.table)

    def tensor(self, parameter: str, layer: int | None = None, expert: int | None = None) -> str:
        """The tensor that fills a parameter.

        Example:
            ("q_a", 3) -> "language_model.model.layers.3.self_attn.q_a_proj.weight"
        """
        for prefix, rows in ((self.prefix, self.table), ("", self.vision_table)):
            for row in rows:
                if row.parameter == parameter:
                    return prefix + row.tensor.format(layer=layer, expert=expert)
        raise KeyError(f"no parameter {parameter}")

    def expected(self, config: ModelConfig) -> dict[str, ExpectedTensor]:
        """Every tensor that a checkpoint of this config must hold, by name."""
        tensors = [
            tensor
            for row in self.table
            if not (row.parameter == "lm_head" and config.tie_word_embeddings)
            for tensor in _expand(row, self.prefix, config, config.num_layers)
        ]
        if config.vision is not None:
            num_layers = config.vision.num_layers
            tensors += [
                tensor
                for row in self.vision_table
                for tensor in _expand(row, "", config, num_layers)
            ]
        return {tensor.name: tensor for tensor in tensors}

    def is_ignored(self, name: str, config: ModelConfig) -> bool:
        """Whether a tensor is known and not loaded.

        Those are the head of a tied checkpoint, and a tower that the config does not describe.
        """
        if config.tie_word_embeddings and name == self.tensor("lm_head"):
            return True
        return config.vision is None and name.startswith(self.unserved_prefixes)


def _expand(
    row: WeightName, prefix: str, config: ModelConfig, num_layers: int
) -> Iterator[ExpectedTensor]:
    """The tensors of a row: one, one per layer, or one per layer and expert."""
    shape = row.shape(config)
    experts = range(config.num_experts) if "{expert}" in row.tensor else (None,)
    for layer in range(num_layers) if "{layer}" in row.tensor else (None,):
        for expert in experts:
            name = prefix + row.tensor.format(layer=layer, expert=expert)
            yield ExpectedTensor(name, row.parameter, layer, row.role, shape, expert)


def _hugging_face(
    prefix: str, unserved_prefixes: tuple[str, ...], experts: tuple[WeightName, ...]
) -> NamingScheme:
    return NamingScheme(
        layout=CheckpointLayout.HUGGING_FACE,
        prefix=prefix,
        unserved_prefixes=unserved_prefixes,
        table=COMMON_TABLE + experts,
        vision_table=VISION_TABLE,
    )


WRAPPER_SCHEME = _hugging_face("language_model.", (_TOWER, _PROJECTOR), STACKED_EXPERTS)
TEXT_SCHEME = _hugging_face("", (), STACKED_EXPERTS)
WRAPPER_SINGLE_SCHEME = _hugging_face("language_model.", (_TOWER, _PROJECTOR), SINGLE_EXPERTS)
TEXT_SINGLE_SCHEME = _hugging_face("", (), SINGLE_EXPERTS)
