"""Which of the two official layouts a checkpoint directory holds, told from its file names alone.

Hugging Face's is config.json with model.safetensors, or model-*.safetensors and an index; Mistral's
is params.json with consolidated.safetensors or consolidated-*.safetensors.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path


class CheckpointLayout(Enum):
    """A layout, by the name that the command line has for it."""

    HUGGING_FACE = "hf"
    MISTRAL = "mistral"

    @property
    def config_name(self) -> str:
        """The file that says what the model is."""
        return "config.json" if self is CheckpointLayout.HUGGING_FACE else "params.json"

    @property
    def weights_stem(self) -> str:
        """What the names of weight files begin with."""
        return "model" if self is CheckpointLayout.HUGGING_FACE else "consolidated"

    @property
    def index_name(self) -> str:
        """The file that says which shard holds which tensor."""
        return f"{self.weights_stem}.safetensors.index.json"

    def has_config(self, directory: Path) -> bool:
        """Whether the layout's config is there."""
        return (directory / self.config_name).is_file()

    def has_weights(self, directory: Path) -> bool:
        """Whether some file of weights, or the index of them, is there."""
        return (directory / self.index_name).is_file() or any(
            directory.glob(f"{self.weights_stem}*.safetensors")
        )

    def is_whole(self, directory: Path) -> bool:
        """Whether config and weights are both there, as far as names tell."""
        return self.has_config(directory) and self.has_weights(directory)


def find_layout(directory: Path) -> CheckpointLayout:
    """The layout that is read from a directory.

    Where both are whole, as in the official FP8 repository, it is Mistral's own: the two hold the
    same values, vLLM takes this one too, and only params.json says outright what YaRN must not
    scale. A part of the other layout alone never wins over a whole one.
    """
    hugging_face, mistral = CheckpointLayout.HUGGING_FACE, CheckpointLayout.MISTRAL
    if mistral.is_whole(directory):
        return mistral
    if hugging_face.has_config(directory) or hugging_face.has_weights(directory):
        return hugging_face
    if mistral.has_config(directory) or mistral.has_weights(directory):
        return mistral
    return hugging_face


def other_layout(directory: Path) -> CheckpointLayout | None:
    """The whole layout that stands beside the one `find_layout` gives; None without one."""
    taken = find_layout(directory)
    others = (layout for layout in CheckpointLayout if layout is not taken)
    return next((layout for layout in others if layout.is_whole(directory)), None)
