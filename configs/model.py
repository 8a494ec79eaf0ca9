"""What the checkpoint says the model is: shapes and constants, read from its config, never assumed.

`config.json` and Mistral's `params.json` give the same `ModelConfig`.

Whatever the engine relies on and the file contradicts is an error that names file and field.
Knows no tensors: names and shapes of those are `actors.model.weight_names`.

Shape letters: D hidden, H heads, C latent, P rope dim, F expert hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ostro.configs.checkpoint_layout import CheckpointLayout, find_layout
from ostro.configs.config_sections import ConfigSections
from ostro.configs.errors import ConfigError
from ostro.configs.hugging_face_config import read_config_json
from ostro.configs.params_json import read_head_params, read_params_json
from ostro.configs.quantization import Quantization
from ostro.configs.section import Section, read_json
from ostro.configs.vision import MAX_LAYERS, VisionConfig, load_vision

_MAX_EXPERTS = 1024  # of a layer: eight times what is known, and names are made for each

# What the forward pass takes for granted: (key, the value it needs). An absent key is taken so.
_REQUIRED = (
    ("n_group", 1),
    ("topk_group", 1),
    ("first_k_dense_replace", 0),
    ("moe_layer_freq", 1),
    ("attention_bias", False),
    ("hidden_act", "silu"),
    ("norm_topk_prob", True),
    ("rope_interleave", True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding, with YaRN's stretching of it.

    Attributes:
        kind: "yarn" or "default" (plain rotary; the fields from `factor` on are then unused).
        theta: Base of the frequencies.
        factor: How many times `original_max_positions` the model was stretched to.
        original_max_positions: Positions before stretching.
        beta_fast: Rotations over the original range above which a frequency is left alone.
        beta_slow: Rotations below which a frequency is divided by `factor`.
        mscale: Numerator's weight in `cos_sin_factor`; 0 if the checkpoint has none.
        mscale_all_dim: Denominator's weight in it; 0 if the checkpoint has none.
        apply_scale: Whether the softmax scale is multiplied by YaRN's mscale squared. Only a
            checkpoint's own `apply_scale: true` sets it; mscale values do not mean it.
    """

    kind: str
    theta: float
    factor: float = 1.0
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    apply_scale: bool = False

    def cos_sin_factor(self) -> float:
        """What cos and sin are multiplied by; 1.0 for Mistral Small 4."""
        if self.kind != "yarn":
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return self._stretch(self.mscale) / self._stretch(self.mscale_all_dim)
        return self._stretch(1.0)

    def softmax_factor(self) -> float:
        """What the softmax scale is multiplied by; 1.0 unless `apply_scale`."""
        if self.kind != "yarn" or not self.apply_scale:
            return 1.0
        return self._stretch(self.mscale_all_dim or 1.0) ** 2

    def _stretch(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1.0 else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shapes and constants of one checkpoint; field comments give the shape letter.

    Attributes:
        architecture: Class name that the config declares, wrapper or bare text model.
        num_experts: Routed ones of a layer; a draft head has none, and then the shared expert is
            all of a layer's MLP.
        llama4_beta: Slope of the query scale 1 + beta * ln(1 + floor(position /
            llama4_original_max_positions)); 0 switches it off.
        eos_token_ids: Every id that ends a generation.
        vision: The tower that images pass through; None if the checkpoint takes text alone.
        dtype: The checkpoint's dtype by name; tensors may still differ, see their headers.
        quantization: Declared format of the quantised weights; None if all are bf16 or f32.
    """

    architecture: str
    num_layers: int
    hidden_size: int  # D
    num_heads: int  # H
    q_lora_rank: int
    kv_lora_rank: int  # C
    qk_nope_head_dim: int
    qk_rope_head_dim: int  # P
    v_head_dim: int
    num_experts: int
    num_experts_per_token: int  # K
    expert_hidden_size: int  # F
    num_shared_experts: int
    vocab_size: int  # V
    rms_norm_eps: float
    max_context: int
    rope: RopeConfig
    llama4_beta: float
    llama4_original_max_positions: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    tie_word_embeddings: bool
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    vision: VisionConfig | None
    dtype: str
    quantization: Quantization | None = None

    def is_draft_head(self) -> bool:
        """Whether these are the layers of a draft head, not of a model."""
        return self.num_experts == 0

    def qk_head_dim(self) -> int:
        """Width of one query head: nope part, then rope part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def latent_width(self) -> int:
        """Values cached per token and layer: C + P."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def shared_hidden_size(self) -> int:
        """Hidden width of the shared experts, which run as one."""
        return self.expert_hidden_size * self.num_shared_experts

    def softmax_scale(self) -> float:
        """qk_head_dim ** -0.5; 0.0884 for Mistral Small 4."""
        return math.pow(self.qk_head_dim(), -0.5) * self.rope.softmax_factor()


def load_model_config(directory: Path) -> ModelConfig:
    """Read a checkpoint directory's config, in the layout that `find_layout` takes.

    `generation_config.json` is read beside it, if it is there.

    Raises:
        ConfigError: No such file, a weight format that is not served, another architecture, or a
            value that the engine cannot honour; the text names file and field.
    """
    sections = _read_config(directory)
    text = sections.text
    return _config_of(
        sections,
        directory,
        num_experts=text.count("n_routed_experts", most=_MAX_EXPERTS),
        num_experts_per_token=text.count("num_experts_per_tok"),
    )


def load_head_config(directory: Path) -> ModelConfig:
    """Read the config of a draft head: `num_layers` layers without routed experts.

    Raises:
        ConfigError: As `load_model_config`; only Mistral's own layout is known.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such checkpoint directory")
    file = directory / CheckpointLayout.MISTRAL.config_name
    if not file.is_file():
        raise ConfigError(
            f"{file}: missing, so this is no draft head, which is {file.name} with "
            f"{CheckpointLayout.MISTRAL.weights_stem}*.safetensors"
        )
    sections = read_head_params(file)
    return _config_of(sections, directory, num_experts=0, num_experts_per_token=0)


def _config_of(
    sections: ConfigSections, directory: Path, *, num_experts: int, num_experts_per_token: int
) -> ModelConfig:
    text, rope_values = sections.text, sections.rope
    for key, needed in _REQUIRED:
        text.require(key, needed)
    rope = _load_rope(text, rope_values)
    ids = _token_ids(directory, text)
    config = ModelConfig(
        architecture=sections.architecture,
        num_layers=text.count("num_hidden_layers", most=MAX_LAYERS),
        hidden_size=text.count("hidden_size"),
        num_heads=text.count("num_attention_heads"),
        q_lora_rank=text.count("q_lora_rank"),
        kv_lora_rank=text.count("kv_lora_rank"),
        qk_nope_head_dim=text.count("qk_nope_head_dim"),
        qk_rope_head_dim=text.count("qk_rope_head_dim"),
        v_head_dim=text.count("v_head_dim"),
        num_experts=num_experts,
        num_experts_per_token=num_experts_per_token,
        expert_hidden_size=text.count("moe_intermediate_size"),
        num_shared_experts=text.count("n_shared_experts"),
        vocab_size=text.count("vocab_size"),
        rms_norm_eps=text.positive("rms_norm_eps"),
        max_context=text.count("max_position_embeddings"),
        rope=rope,
        llama4_beta=rope_values.number("llama_4_scaling_beta", 0.0),
        llama4_original_max_positions=rope_values.count(
            "llama_4_original_max_position_embeddings", rope.original_max_positions
        ),
        routed_scaling_factor=text.positive("routed_scaling_factor", 1.0),
        norm_topk_prob=True,
        tie_word_embeddings=_is_tied(sections.top, text),
        bos_token_id=ids["bos_token_id"][0],
        eos_token_ids=ids["eos_token_id"],
        pad_token_id=ids["pad_token_id"][0],
        vision=load_vision(sections.top, sections.tower),
        dtype=_dtype_name(sections.top, text),
        quantization=sections.quantization,
    )
    _check_shapes(text, config)
    return config


def _read_config(directory: Path) -> ConfigSections:
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such checkpoint directory")
    layout = find_layout(directory)
    file = directory / layout.config_name
    if not file.is_file():
        raise ConfigError(f"{file}: missing, so this is no checkpoint directory")
    if layout is CheckpointLayout.MISTRAL:
        return read_params_json(file)
    return read_config_json(file)


def _load_rope(text: Section, rope: Section) -> RopeConfig:
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind not in ("yarn", "default"):
        raise rope.error("rope_type", f"is {kind!r}; served are 'yarn' and 'default'")
    if rope.values.get("attention_factor") is not None:
        raise rope.error("attention_factor", "is not served; leave it out")
    if rope.values.get("truncate") is False:
        raise rope.error("truncate", "is false, but only true is served")
    holder = rope if "rope_theta" in rope.values else text
    theta = holder.positive("rope_theta")
    if kind == "default":
        positions = rope.count(
            "original_max_position_embeddings", text.count("max_position_embeddings")
        )
        return RopeConfig(kind=kind, theta=theta, original_max_positions=positions)
    return RopeConfig(
        kind=kind,
        theta=theta,
        factor=rope.positive("factor"),
        original_max_positions=rope.count("original_max_position_embeddings"),
        beta_fast=rope.positive("beta_fast", 32.0),
        beta_slow=rope.positive("beta_slow", 1.0),
        mscale=rope.number("mscale", 0.0),
        mscale_all_dim=rope.number("mscale_all_dim", 0.0),
        apply_scale=rope.flag("apply_scale"),
    )


def _token_ids(directory: Path, text: Section) -> dict[str, tuple[int, ...]]:
    """Begin, end and padding ids: generation_config.json first, then config.json, then 1/2/11."""
    file = directory / "generation_config.json"
    generation = Section(file, "", read_json(file) if file.is_file() else {})
    ids = {}
    for key, usual in (("bos_token_id", 1), ("eos_token_id", 2), ("pad_token_id", 11)):
        holder = generation if generation.values.get(key) is not None else text
        value = holder.values.get(key)
        value = usual if value is None else value
        listed = value if isinstance(value, list) else [value]
        if not listed or any(isinstance(i, bool) or not isinstance(i, int) for i in listed):
            raise holder.error(key, f"must be a token id, not {value!r}")
        ids[key] = tuple(listed)
    return ids


def _is_tied(top: Section, text: Section) -> bool:
    holder = top if "tie_word_embeddings" in top.values else text
    return holder.flag("tie_word_embeddings")


def _dtype_name(top: Section, text: Section) -> str:
    for section in (text, top):
        for key in ("dtype", "torch_dtype"):
            if section.values.get(key) is not None:
                return str(section.values[key])
    return "bfloat16"


def _check_shapes(text: Section, config: ModelConfig) -> None:
    if config.num_experts_per_token > config.num_experts:
        raise text.error(
            "num_experts_per_tok",
            f"is {config.num_experts_per_token}, more than n_routed_experts={config.num_experts}",
        )
    if config.qk_rope_head_dim % 2:
        raise text.error("qk_rope_head_dim", f"is {config.qk_rope_head_dim}; pairs need it even")
    kv_heads = text.values.get("num_key_value_heads")
    if kv_heads is not None and kv_heads != config.num_heads:
        raise text.error(
            "num_key_value_heads",
            f"is {kv_heads}, not num_attention_heads={config.num_heads}",
        )
