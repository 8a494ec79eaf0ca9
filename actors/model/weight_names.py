"""Which checkpoint tensor fills which parameter, what shape it must have, and which role needs it.

One table serves the Hugging Face layout under both of its prefixes; another layout is another
`NamingScheme`. Knows no tensors, only names and shapes.

Shape letters: D hidden, H heads, C latent, P rope dim, E experts, F expert hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum

from ostro.actors.errors import CheckpointError
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
        tensor: The tensor's name behind the scheme's prefix; `{layer}` marks one per layer.
        role: Who loads it.
        shape: Its shape under a config.
    """

    parameter: str
    tensor: str
    role: Role
    shape: Callable[[ModelConfig], Shape]


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """A tensor that a checkpoint must hold."""

    name: str
    parameter: str
    layer: int | None
    role: Role
    shape: Shape


def _row(
    parameter: str, tensor: str, shape: Callable[[ModelConfig], Shape], role: Role = Role.ATTENTION
) -> WeightName:
    return WeightName(parameter, tensor, role, shape)


_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
_SHARED = _LAYER + "mlp.shared_experts."
_EXPERTS = _LAYER + "mlp.experts."

HUGGING_FACE_TABLE = (
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
        prefix: Stands before every tensor of the table.
        unserved_prefixes: Tensors that are known and, where the config has no use for them, not
            loaded.
        table: The rows of the text model.
        vision_table: The rows of a vision tower and its projector.
    """

    prefix: str
    unserved_prefixes: tuple[str, ...]
    table: tuple[WeightName, ...] = HUGGING_FACE_TABLE
    vision_table: tuple[WeightName, ...] = VISION_TABLE

    def tensor(self, parameter: str, layer: int | None = None) -> str:
        """The tensor that fills a parameter.

        Example:
            ("q_a", 3) -> "language_model.model.layers.3.self_attn.q_a_proj.weight"
        """
        row = next(row for row in (*self.table, *self.vision_table) if row.parameter == parameter)
        return self._name(row, layer)

    def expected(self, config: ModelConfig) -> dict[str, ExpectedTensor]:
        """Every tensor that a checkpoint of this config must hold, by name."""
        rows = [(row, config.num_layers) for row in self.table]
        if config.vision is not None:
            rows += [(row, config.vision.num_layers) for row in self.vision_table]
        tensors: dict[str, ExpectedTensor] = {}
        for row, num_layers in rows:
            if row.parameter == "lm_head" and config.tie_word_embeddings:
                continue
            for layer in range(num_layers) if "{layer}" in row.tensor else [None]:
                name = self._name(row, layer)
                tensors[name] = ExpectedTensor(
                    name, row.parameter, layer, row.role, row.shape(config)
                )
        return tensors

    def is_ignored(self, name: str, config: ModelConfig) -> bool:
        """Whether a tensor is known and not loaded.

        Those are the head of a tied checkpoint, and a tower that the config does not describe.
        """
        if config.tie_word_embeddings and name == self.tensor("lm_head"):
            return True
        return config.vision is None and name.startswith(self.unserved_prefixes)

    def _name(self, row: WeightName, layer: int | None) -> str:
        prefix = "" if row in self.vision_table else self.prefix
        return prefix + row.tensor.format(layer=layer)


WRAPPER_SCHEME = NamingScheme("language_model.", (_TOWER, _PROJECTOR))
TEXT_SCHEME = NamingScheme("", ())


def choose_naming(names: Collection[str]) -> NamingScheme:
    """The scheme that a checkpoint's tensor names follow.

    Raises:
        CheckpointError: No known scheme, or one that is not served yet.
    """
    if "tok_embeddings.weight" in names:
        raise CheckpointError(
            "tensor tok_embeddings.weight: native layout is not served yet; "
            "use the Hugging Face layout"
        )
    for scheme in (WRAPPER_SCHEME, TEXT_SCHEME):
        if scheme.tensor("embed") in names:
            return scheme
    raise CheckpointError(
        f"neither {WRAPPER_SCHEME.tensor('embed')} nor {TEXT_SCHEME.tensor('embed')} is among "
        f"the {len(names)} tensors"
    )
