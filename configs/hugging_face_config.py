"""The parts of a `config.json`: which section describes the text model, its rope, its tower."""

from __future__ import annotations

from pathlib import Path

from ostro.configs.config_sections import ConfigSections
from ostro.configs.quantization import Quantization, load_quantization
from ostro.configs.section import Section, read_json

WRAPPER_ARCHITECTURE = "Mistral3ForConditionalGeneration"
TEXT_ARCHITECTURE = "Mistral4ForCausalLM"


def read_config_json(file: Path) -> ConfigSections:
    """Read a `config.json`, of the wrapper or of the bare text model.

    Raises:
        ConfigError: No such file, another architecture, or no rope parameters.
    """
    top = Section(file, "", read_json(file))
    architecture, text = _text_section(top)
    is_wrapper = text is not top
    has_tower = is_wrapper and top.values.get("vision_config") is not None
    return ConfigSections(
        architecture=architecture,
        top=top,
        text=text,
        rope=_rope_section(text),
        tower=top.section("vision_config") if has_tower else None,
        quantization=_quantization(top, text),
    )


def _text_section(top: Section) -> tuple[str, Section]:
    """The declared architecture and the part of the config that describes the text model."""
    declared = top.values.get("architectures")
    model_type = top.values.get("model_type")
    if not isinstance(declared, list) or not declared:
        by_type = {"mistral3": WRAPPER_ARCHITECTURE, "mistral4": TEXT_ARCHITECTURE}
        declared = [by_type.get(str(model_type), model_type)]
    architecture = str(declared[0])
    if architecture == WRAPPER_ARCHITECTURE and isinstance(top.values.get("text_config"), dict):
        text = top.section("text_config")
    elif architecture == TEXT_ARCHITECTURE:
        text = top
    else:
        raise top.error(
            "architectures",
            f"is {architecture}; served are {WRAPPER_ARCHITECTURE} with a mistral4 text_config "
            f"and {TEXT_ARCHITECTURE}",
        )
    if text.values.get("model_type") != "mistral4":
        raise text.error("model_type", f"is {text.values.get('model_type')!r}, not 'mistral4'")
    return architecture, text


def _quantization(top: Section, text: Section) -> Quantization | None:
    found = [load_quantization(section, "quantization_config") for section in (top, text)]
    return found[0] or found[1]


def _rope_section(text: Section) -> Section:
    for key in ("rope_parameters", "rope_scaling"):
        if text.values.get(key) is not None:
            return text.section(key)
    raise text.error("rope_parameters", "missing")
