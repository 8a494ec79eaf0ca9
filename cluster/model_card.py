"""What the faces say of the served model, put together from its config and the deployment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ostro.actors.errors import NotFoundError
from ostro.configs.checkpoint_layout import find_layout
from ostro.configs.deployment import DeploymentConfig
from ostro.configs.model import ModelConfig
from ostro.configs.reasoning import EFFORTS


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What the faces say of the served model.

    Attributes:
        aliases: Other names that callers may use for it; answers say `name`.
        end_token_ids: They end a generation as `</s>` does.
        has_vision: Images are taken: the checkpoint has a tower, and the tokenizer knows of it.
        heeds_predictions: Answers that their callers predicted come sooner.
    """

    name: str
    description: str
    created_s: int
    max_context: int
    vocab_size: int
    num_layers: int
    num_experts: int
    num_experts_per_token: int
    weight_dtype: str
    kv_dtype: str
    efforts: tuple[str, ...]
    default_effort: str
    aliases: tuple[str, ...] = ()
    end_token_ids: tuple[int, ...] = ()
    has_vision: bool = False
    heeds_predictions: bool = False


def make_card(
    model_dir: Path,
    model_config: ModelConfig,
    deployment: DeploymentConfig,
    *,
    weight_dtype: str,
    kv_dtype: str | None = None,
) -> ModelCard:
    """The card of one deployment.

    Args:
        model_dir: Gives the name if the deployment has none.
        model_config: What its config says.
        deployment: May bound the context, also by the size of the cache.
        weight_dtype: What the shards hold the weights in, for example "bfloat16".
        kv_dtype: What the latent cache is held in; None if in `weight_dtype`.
    """
    config = model_config
    engine = deployment.engine
    bounds = [config.max_context]
    if engine.max_context is not None:
        bounds.append(engine.max_context)
    if engine.num_pages is not None:  # one request alone may fill the cache
        bounds.append(engine.num_pages * engine.page_size)
    max_context = min(bounds)
    return ModelCard(
        name=deployment.served_name or model_dir.resolve().name,
        description=(deployment.notice + " " if deployment.notice else "")
        + f"{config.num_layers} layers, {config.num_experts_per_token} of {config.num_experts} "
        f"experts per token, {max_context} tokens of context",
        created_s=int((model_dir / find_layout(model_dir).config_name).stat().st_mtime),
        max_context=max_context,
        vocab_size=config.vocab_size,
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        num_experts_per_token=config.num_experts_per_token,
        weight_dtype=weight_dtype,
        kv_dtype=kv_dtype or weight_dtype,
        efforts=EFFORTS,
        default_effort=deployment.reasoning.default_effort,
        aliases=deployment.aliases,
        end_token_ids=config.eos_token_ids,
        heeds_predictions=engine.speculation is not None,
    )


def check_model_name(card: ModelCard, name: str) -> None:
    """Let the names of the served model pass, and none at all.

    Raises:
        NotFoundError: It is another model's; `param` is "model".
    """
    if name not in ("", card.name, *card.aliases):
        raise NotFoundError(
            f"model {name[:100]!r} is not served here; {card.name!r} is",
            code="model_not_found",
            param="model",
        )
