"""The model card: the checkpoint's shapes, bounded and named by the deployment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import make_tiny_checkpoint

from ostro.cluster.model_card import make_card
from ostro.configs.deployment import DeploymentConfig, EngineConfig, Layout, LayoutConfig
from ostro.configs.model import load_model_config
from ostro.configs.reasoning import EFFORTS

DEPLOYMENT = DeploymentConfig(
    model="embedded",
    layout=LayoutConfig(layout=Layout.SINGLE, num_attention_shards=1, num_expert_shards=1),
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def test_card_shows_the_checkpoint(model_dir: Path) -> None:
    config = load_model_config(model_dir)
    card = make_card(model_dir, config, DEPLOYMENT, weight_dtype="float32")
    assert card.name == "tiny"
    assert (card.max_context, card.vocab_size) == (config.max_context, config.vocab_size)
    assert card.num_experts_per_token == config.num_experts_per_token
    assert (card.weight_dtype, card.kv_dtype) == ("float32", "float32")
    assert (card.efforts, card.default_effort) == (EFFORTS, "none")
    assert card.created_s > 0


def test_card_takes_name_and_context_from_the_deployment(model_dir: Path) -> None:
    deployment = replace(
        DEPLOYMENT, served_name="small", aliases=("s",), engine=EngineConfig(max_context=300)
    )
    card = make_card(
        model_dir, load_model_config(model_dir), deployment, weight_dtype="bfloat16", kv_dtype="f8"
    )
    assert (card.name, card.aliases) == ("small", ("s",))
    assert (card.max_context, card.kv_dtype) == (300, "f8")
    assert "300 tokens of context" in card.description


def test_card_begins_with_the_notice(model_dir: Path) -> None:
    noted = replace(DEPLOYMENT, notice="A teaching model.")
    card = make_card(model_dir, load_model_config(model_dir), noted, weight_dtype="float32")
    assert card.description.startswith("A teaching model. 3 layers")
