"""What the checkpoint says its vision tower is, and how an image becomes tokens of the prompt.

The tower is Pixtral's: patches, transformer layers with a two-dimensional rotary embedding, then a
projector that merges squares of patches into one embedding of the text model each.
"""

from __future__ import annotations

from dataclasses import dataclass

from ostro.configs.section import Section

ACTIVATIONS = ("gelu", "silu")
MAX_LAYERS = 1024  # a wrong number in a file must not make names without end

# What the projector takes for granted: (key of config.json, the value it needs).
_REQUIRED = (
    ("vision_feature_layer", -1),
    ("multimodal_projector_bias", False),
    ("projector_hidden_act", "gelu"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """Shapes and constants of the vision tower and its projector.

    Attributes:
        patch_size: Side of a patch in pixels.
        image_size: Longest side of an image in pixels.
        hidden_act: "gelu" (exact) or "silu", in the tower's MLPs; the projector has gelu.
        norm_eps: Of the tower's norms; the projector's is the text model's `rms_norm_eps`.
        spatial_merge_size: Side in patches of the square that becomes one image token.
        image_token_id: The prompt token whose embeddings images replace.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    head_dim: int
    intermediate_size: int
    patch_size: int
    image_size: int
    num_channels: int
    rope_theta: float
    hidden_act: str
    norm_eps: float = 1e-5
    spatial_merge_size: int
    image_token_id: int

    def token_side(self) -> int:
        """Side of the square that one image token covers, in pixels; 28 for Mistral Small 4."""
        return self.patch_size * self.spatial_merge_size

    def longest_side(self) -> int:
        """Longest side of an image that is served, in pixels: `image_size` in whole tokens."""
        return -(-self.image_size // self.token_side()) * self.token_side()


def load_vision(top: Section, tower: Section | None) -> VisionConfig | None:
    """Read a config's vision tower and what stands beside it in `top`; None without a tower.

    Raises:
        ConfigError: A value that the engine cannot honour.
    """
    if tower is None:
        return None
    for key, needed in _REQUIRED:
        top.require(key, needed)
    tower.require("model_type", "pixtral")
    hidden_size, num_heads = tower.count("hidden_size"), tower.count("num_attention_heads")
    config = VisionConfig(
        num_layers=tower.count("num_hidden_layers", most=MAX_LAYERS),
        hidden_size=hidden_size,
        num_heads=num_heads,
        head_dim=tower.count("head_dim", max(hidden_size // num_heads, 1)),
        intermediate_size=tower.count("intermediate_size"),
        patch_size=tower.count("patch_size"),
        image_size=tower.count("image_size"),
        num_channels=tower.count("num_channels", 3),
        rope_theta=_rope_theta(tower),
        hidden_act=str(tower.values.get("hidden_act", "gelu")),
        spatial_merge_size=top.count("spatial_merge_size", 2),
        image_token_id=top.count("image_token_index", 10),
    )
    _check(tower, config)
    return config


def _rope_theta(tower: Section) -> float:
    if tower.values.get("rope_parameters") is None:
        return tower.positive("rope_theta", 10000.0)
    rope = tower.section("rope_parameters")
    kind = rope.values.get("rope_type", "axial")
    if kind not in ("axial", "default"):  # two names of the same thing
        raise rope.error("rope_type", f"is {kind!r}, but only 'axial' is served")
    return rope.positive("rope_theta", 10000.0)


def _check(tower: Section, config: VisionConfig) -> None:
    if config.hidden_act not in ACTIVATIONS:
        raise tower.error("hidden_act", f"is {config.hidden_act!r}; served are {ACTIVATIONS}")
    if config.num_heads * config.head_dim != config.hidden_size:
        raise tower.error(
            "head_dim",
            f"is {config.head_dim}; times num_attention_heads={config.num_heads} it must be "
            f"hidden_size={config.hidden_size}",
        )
    if config.head_dim % 4:
        raise tower.error("head_dim", f"is {config.head_dim}; rotation in two dimensions needs 4n")
    if config.num_channels != 3:
        raise tower.error("num_channels", f"is {config.num_channels}, but only 3 is served")
