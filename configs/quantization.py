"""What a checkpoint declares about the precision of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from ostro.configs.section import Section

# The value of a key -> whether inputs have scales in the file; what an absent key means, too.
_ACTIVATION_SCHEMES = {"static": True, "dynamic": False, None: False}
_QSCHEMES = {"TENSOR": True, "NO_SCALES": False, None: True}


class WeightFormat(Enum):
    """How the values of one weight are stored.

    PLAIN is bf16, f16 or f32; FP8 is e4m3 with one scale for the tensor; NVFP4 is two e2m1 values
    a byte, an e4m3 scale for each 16 of a row and one f32 scale for the tensor.
    """

    PLAIN = "bf16"
    FP8 = "fp8"
    NVFP4 = "nvfp4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """The declared format of the quantised weights.

    Attributes:
        weight_format: FP8 or NVFP4.
        has_input_scales: Whether each weight brings a scale for its inputs too.
    """

    weight_format: WeightFormat
    has_input_scales: bool


def load_quantization(holder: Section, key: str) -> Quantization | None:
    """Read what stands under a key of a config; None where nothing does.

    Understood are `quant_method` fp8 and compressed-tensors, and `qformat_weight` of params.json.

    Raises:
        ConfigError: A format that is not served, with what it is.
    """
    if not holder.values.get(key):
        return None
    section = holder.section(key)
    if section.values.get("qformat_weight") is not None:
        section.require("qformat_weight", "fp8_e4m3")
        return _fp8(section, "qscheme_act", _QSCHEMES)
    method = section.values.get("quant_method")
    if method == "fp8":
        if section.values.get("weight_block_size") is not None:
            raise section.error("weight_block_size", "block scales are not served, only null is")
        return _fp8(section, "activation_scheme", _ACTIVATION_SCHEMES)
    if method == "compressed-tensors":
        return _compressed_tensors(section)
    raise section.error(
        "quant_method",
        f"{method!r} weights are not served; served are bf16, f32, fp8 with a scale per tensor, "
        f"and compressed-tensors nvfp4-pack-quantized",
    )


def _fp8(section: Section, key: str, choices: Mapping[str | None, bool]) -> Quantization:
    scheme = section.values.get(key)
    if scheme not in choices:
        raise section.error(key, f"is {scheme!r}; served are {[name for name in choices if name]}")
    return Quantization(weight_format=WeightFormat.FP8, has_input_scales=choices[scheme])


def _compressed_tensors(section: Section) -> Quantization:
    wanted = "nvfp4-pack-quantized"
    if section.values.get("format") != wanted:
        raise section.error(
            "format", f"is {section.values.get('format')!r}, but only {wanted!r} is served"
        )
    groups = section.section("config_groups") if "config_groups" in section.values else None
    return Quantization(
        weight_format=WeightFormat.NVFP4,
        has_input_scales=groups is not None
        and any(_scales_inputs(groups.section(name)) for name in groups.values),
    )


def _scales_inputs(group: Section) -> bool:
    """Whether the group's inputs have a scale in the file; "local" has one beside its own."""
    if group.values.get("input_activations") is None:
        return False
    return group.section("input_activations").values.get("dynamic") is not True
