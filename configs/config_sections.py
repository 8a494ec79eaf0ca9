"""A model's config file, cut into the parts that every layout of it has."""

from __future__ import annotations

from dataclasses import dataclass

from ostro.configs.quantization import Quantization
from ostro.configs.section import Section


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigSections:
    """The parts of a config file, whichever layout it belongs to.

    Attributes:
        architecture: Class name that the file declares or means.
        top: What stands outside the text model.
        text: The text model.
        rope: Its rotary embedding.
        tower: The vision tower; None if the checkpoint takes text alone.
        quantization: The declared format of quantised weights; None if there are none.
    """

    architecture: str
    top: Section
    text: Section
    rope: Section
    tower: Section | None
    quantization: Quantization | None
