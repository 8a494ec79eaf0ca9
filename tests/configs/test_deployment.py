"""Deployment dataclasses refuse what cannot run."""

from __future__ import annotations

import pytest

from ostro.configs.deployment import EngineConfig, Layout, LayoutConfig, ServingConfig
from ostro.configs.errors import ConfigError
from ostro.configs.reasoning import ReasoningConfig


def test_split_puts_experts_behind_attention() -> None:
    layout = LayoutConfig(layout=Layout.SPLIT, num_attention_shards=3, num_expert_shards=2)
    assert layout.world_size() == 5
    assert list(layout.attention_ranks()) == [0, 1, 2]
    assert list(layout.expert_ranks()) == [3, 4]


def test_colocated_ranks_have_both_roles() -> None:
    layout = LayoutConfig(layout=Layout.COLOCATED, num_attention_shards=2, num_expert_shards=2)
    assert layout.world_size() == 2
    assert list(layout.attention_ranks()) == list(layout.expert_ranks()) == [0, 1]


@pytest.mark.parametrize(
    ("layout", "attention", "experts", "told"),
    [
        (Layout.SINGLE, 1, 2, "layout=single has one rank"),
        (Layout.COLOCATED, 1, 2, "must be equal"),
        (Layout.SPLIT, 0, 2, "num_attention_shards=0"),
    ],
)
def test_contradictory_layout_is_refused(
    layout: Layout, attention: int, experts: int, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        LayoutConfig(layout=layout, num_attention_shards=attention, num_expert_shards=experts)


def test_every_running_request_must_fit_the_step() -> None:
    with pytest.raises(ConfigError, match="needs one token a step"):
        EngineConfig(max_running_requests=8, max_tokens_per_step=4)


def test_effort_table_must_be_whole() -> None:
    with pytest.raises(ConfigError, match="missing"):
        ReasoningConfig(efforts={})


def test_layout_refuses_copies_of_experts_where_there_is_one_shard() -> None:
    with pytest.raises(ConfigError, match="num_redundant_experts=2"):
        LayoutConfig(
            layout=Layout.SPLIT,
            num_attention_shards=2,
            num_expert_shards=1,
            num_redundant_experts=2,
        )


@pytest.mark.parametrize("name", ["max_body_bytes", "max_image_bytes", "max_image_pixels"])
def test_serving_limits_must_be_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=0: must be a whole number of at least 1"):
        ServingConfig(**{name: 0})


def test_a_deployment_may_take_no_images() -> None:
    assert ServingConfig(max_images=0).max_images == 0
    with pytest.raises(ConfigError, match="max_images=-1"):
        ServingConfig(max_images=-1)
