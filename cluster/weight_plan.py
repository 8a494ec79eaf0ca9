"""Which experts, and how many bytes of weights, each rank of a layout holds. Pure."""

from __future__ import annotations

import torch

from ostro.actors.fabric.placement import initial_placement
from ostro.actors.model.device import choose_precision
from ostro.actors.model.draft_head import DraftHead
from ostro.actors.model.stored_weights import StoredPlain
from ostro.actors.model.weight_bytes import attention_bytes, expert_bytes
from ostro.configs.deployment import DeploymentConfig, Layout, LayoutConfig
from ostro.configs.errors import ConfigError
from ostro.configs.model import ModelConfig
from ostro.configs.quantization import WeightFormat


def plan_weights(
    deployment: DeploymentConfig,
    config: ModelConfig,
    *,
    device: str,
    dtype: torch.dtype,
    plain: StoredPlain = frozenset(),
    head: DraftHead | None = None,
) -> dict[int, int]:
    """Bytes of weights that each rank loads; arguments as `deployment_plan.plan_deployment`'s.

    Raises:
        ConfigError: The model's experts cannot be spread over the layout's ranks.
    """
    layout, num_experts = deployment.layout, experts_by_rank(deployment.layout, config)
    precision = choose_precision(device, config)
    head_bytes = draft_head_bytes(head, device, dtype)
    return {
        rank: rank_weight_bytes(
            layout, config, dtype, precision, plain, rank, num_experts.get(rank, 0)
        )
        + head_bytes * (rank in layout.attention_ranks())
        for rank in range(layout.world_size())
    }


def draft_head_bytes(head: DraftHead | None, device: str, dtype: torch.dtype) -> int:
    """Bytes of a draft head, all of which every attention shard holds; 0 without one."""
    if head is None:
        return 0
    return head.num_bytes(dtype, choose_precision(device, head.config))


def experts_by_rank(layout: LayoutConfig, config: ModelConfig) -> dict[int, int]:
    """Routed experts that each rank holds in every layer, copies included; others are left out.

    Raises:
        ConfigError: The model's experts cannot be spread over the layout's ranks.
    """
    try:
        placement = initial_placement(
            config.num_experts, list(layout.expert_ranks()), layout.num_redundant_experts
        )
    except ValueError as error:
        raise ConfigError(f"layout: {error}") from error
    return {rank: len(placement.local_slots(rank)) for rank in placement.ranks()}


def rank_weight_bytes(
    layout: LayoutConfig,
    config: ModelConfig,
    dtype: torch.dtype,
    precision: WeightFormat,
    plain: StoredPlain,
    rank: int,
    num_experts: int,
) -> int:
    """Bytes of the model's weights on one rank that holds so many experts."""
    own_bytes = 0
    if rank in layout.attention_ranks():
        stacks = _stacks_shared(layout, config)
        own_bytes = attention_bytes(config, dtype, precision, stacks_shared=stacks, plain=plain)
    return own_bytes + expert_bytes(config, num_experts, dtype, precision, plain=plain)


def _stacks_shared(layout: LayoutConfig, config: ModelConfig) -> bool:
    """Whether a GPU holds shared experts among the routed ones, as `AttentionShard` does."""
    is_single = layout.layout is Layout.SINGLE
    return is_single and config.shared_hidden_size() == config.expert_hidden_size
