"""Tokenizer files for the tests of prompts and faces."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from ostro.cluster.tekken import write_tekken

IMAGE = {"image_patch_size": 14, "max_image_size": 1540, "spatial_merge_size": 2}


def write_tokenizer(
    directory: Path, vocab_size: int = 1024, *, image: dict[str, int] | None = IMAGE
) -> Path:
    """A small v15 tokenizer, with or without images."""
    path = directory / "tekken.json"
    write_tekken(path, vocab_size)
    tekken = json.loads(path.read_text())
    _set_image(tekken, image)
    path.write_text(json.dumps(tekken))
    return directory


def write_real_tokenizer(directory: Path) -> Path:
    """A tokenizer with the ids of Mistral Small 4: mistral-common's own, with v15's specials."""
    path = write_tokenizer(directory) / "tekken.json"
    small = json.loads(path.read_text())
    tekken = json.loads((files("mistral_common") / "data" / "tekken_240911.json").read_bytes())
    tekken["config"]["version"] = small["config"]["version"]
    tekken["special_tokens"] = small["special_tokens"]
    tekken["model_settings_builder"] = small["model_settings_builder"]
    _set_image(tekken, IMAGE)
    path.write_text(json.dumps(tekken))
    return directory


def _set_image(tekken: dict[str, Any], image: dict[str, int] | None) -> None:
    tekken.pop("image", None)
    if image is not None:
        tekken["image"] = image
