"""A draft head's checkpoint: whether it can be loaded, whether it fits a model, and its weights.

The official head of Mistral Small 4 is EAGLE-1: one linear layer over the embedding of a token and
the hidden state before it, and two layers of the model's kind with an MLP in place of experts.
Embedding and vocabulary matrix are the model's.

Shape letters: D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ostro.actors.model.checkpoint import CheckpointReader, ReadProgress
from ostro.actors.model.device import choose_cache_dtype
from ostro.actors.model.stored_weights import StoredPlain, match_tensors, stored_plain
from ostro.actors.model.weight_bytes import attention_bytes
from ostro.actors.model.weight_names import Role
from ostro.actors.model.weight_source import WeightSource
from ostro.actors.model.weights import LayerWeights, take_layer
from ostro.configs.checkpoint_layout import CheckpointLayout
from ostro.configs.deployment import EngineConfig
from ostro.configs.errors import ConfigError
from ostro.configs.model import ModelConfig, load_head_config
from ostro.configs.quantization import WeightFormat
from ostro.configs.speculation import DraftMethod
from ostro.kernels.linear import LinearWeight

# What a head shares with its model: (field of the config, its key in params.json).
_SHARED = (("hidden_size", "dim"), ("vocab_size", "vocab_size"))


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftHead:
    """A head that was found fit for a model.

    Attributes:
        config: Of its layers; it has no experts.
        plain: What its checkpoint leaves plain of what may be quantised.
    """

    directory: Path
    config: ModelConfig
    plain: StoredPlain

    def num_bytes(self, dtype: torch.dtype, precision: WeightFormat) -> int:
        """Memory that `load_head_weights` fills."""
        return attention_bytes(self.config, dtype, precision, plain=self.plain)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadWeights:
    """What a head has of its own.

    Attributes:
        joint: [D, 2D]; the first D inputs are the embedding, the others the hidden state.
    """

    joint: LinearWeight
    layers: tuple[LayerWeights, ...]
    final_norm_D: torch.Tensor


def find_draft_head(directory: Path, model: ModelConfig) -> DraftHead:
    """Check a head as far as headers tell, taking no memory for weights.

    Raises:
        ConfigError: There is no head, or it was not made for this model.
        CheckpointError: As `weights.check_checkpoint`.
    """
    config = load_head_config(directory)
    for field, key in _SHARED:
        own, wanted = getattr(config, field), getattr(model, field)
        if own != wanted:
            file = directory / CheckpointLayout.MISTRAL.config_name
            raise ConfigError(
                f"{file}: {key}: is {own}, and the model's {field} is {wanted}: set "
                f"speculation.draft_model to a head that was trained for this model"
            )
    match = match_tensors(CheckpointReader(directory), config)
    match.check(directory)
    return DraftHead(directory=directory, config=config, plain=stored_plain(match))


def configured_head(engine: EngineConfig, model: ModelConfig) -> DraftHead | None:
    """The head that a deployment drafts with, checked; None if it drafts without one.

    Raises:
        ConfigError: As `find_draft_head`, or its latents do not fill the rows of the cache, or
            `auto` has not been settled for this model by whoever launches it.
        CheckpointError: Likewise.
    """
    speculation = engine.speculation
    if speculation is None or speculation.method is DraftMethod.NGRAM:
        return None
    if speculation.draft_model is None:
        raise ConfigError(f"speculation.method={speculation.method}: name a head in draft_model")
    head = find_draft_head(Path(speculation.draft_model), model)
    try:
        choose_cache_dtype(engine, torch.float32, head.config)
    except ConfigError as error:
        raise ConfigError(f"{head.directory}: {error}") from None
    return head


def load_head_weights(
    head: DraftHead,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    precision: WeightFormat = WeightFormat.PLAIN,
    progress: ReadProgress | None = None,
) -> HeadWeights:
    """Read a head; arguments as `weights.load_attention_weights`'s.

    Raises:
        CheckpointError: As `find_draft_head`.
        ValueError: Its weights cannot be multiplied in `precision`.
    """
    source = WeightSource(
        CheckpointReader(head.directory),
        head.config,
        Role.ATTENTION,
        device=device,
        precision=precision,
        progress=progress,
    )
    source.tell_dequantized(dtype)
    weights = HeadWeights(
        joint=source.take_linear(("joint",), None, dtype),
        layers=tuple(take_layer(source, i, dtype) for i in range(head.config.num_layers)),
        final_norm_D=source.take("final_norm", None, dtype),
    )
    source.verify()
    return weights
