"""Random checkpoints: the same bytes everywhere, and transformers reads them too."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import load_file

from ostro.actors.model.random_checkpoint import (
    MID,
    TINY,
    TINY_VISION,
    RandomModel,
    write_config,
    write_random_checkpoint,
)
from ostro.actors.model.weight_names import TEXT_SCHEME
from ostro.actors.model.weights import check_checkpoint
from ostro.configs.model import load_model_config

_FILE = "model.safetensors"


def _digest(directory: Path) -> str:
    return hashlib.sha256((directory / _FILE).read_bytes()).hexdigest()[:16]


def test_write_random_checkpoint_gives_these_bytes_on_every_machine(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, replace(TINY, num_layers=1, vocab_size=64), seed=3)
    assert _digest(tmp_path) == "2dfe0d50241bd2b0"


def test_seed_changes_every_tensor(tmp_path: Path) -> None:
    one, two = (
        load_file(
            checkpoints.make_tiny_checkpoint(tmp_path / str(seed), seed=seed, num_layers=1) / _FILE
        )
        for seed in (1, 2)
    )
    assert not any(torch.equal(one[name], two[name]) for name in one)


def test_expert_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    few, many = (
        load_file(
            checkpoints.make_tiny_checkpoint(tmp_path / str(count), num_experts=count) / _FILE
        )
        for count in (8, 16)
    )
    name = TEXT_SCHEME.tensor("experts_down", 2)
    assert torch.equal(few[name], many[name][:8])


def test_values_have_the_spread_asked_for(tmp_path: Path) -> None:
    tensors = load_file(checkpoints.make_tiny_checkpoint(tmp_path) / _FILE)
    experts = tensors[TEXT_SCHEME.tensor("experts_gate_up", 0)]
    norm = tensors[TEXT_SCHEME.tensor("input_norm", 0)]
    assert experts.std().item() == pytest.approx(TINY.std, rel=0.02)
    assert abs(experts.mean().item()) < 0.002
    assert norm.mean().item() == pytest.approx(1.0, abs=0.05)
    assert norm.std().item() == pytest.approx(0.1, rel=0.3)


@pytest.mark.parametrize("model", [TINY, replace(TINY, dtype="bfloat16")], ids=["f32", "bf16"])
def test_checkpoint_passes_our_own_check(tmp_path: Path, model: RandomModel) -> None:
    write_random_checkpoint(tmp_path, model)
    config = check_checkpoint(tmp_path)
    assert config.dtype == model.dtype
    assert config.rope.factor == model.rope_factor
    assert not (tmp_path / "model.safetensors.partial").exists()


@pytest.mark.parametrize(
    "dims", [{}, {"num_experts": 128, "dtype": "bfloat16"}, {"tie_word_embeddings": True}], ids=str
)
def test_transformers_reads_it_with_nothing_missing_or_left(
    tmp_path: Path, dims: dict[str, int | str | bool]
) -> None:
    from transformers import Mistral4ForCausalLM

    directory = checkpoints.make_tiny_checkpoint(tmp_path, **dims)
    model, info = Mistral4ForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    ours = load_file(directory / _FILE)
    theirs = model.state_dict()
    assert set(theirs) - set(ours) <= {"lm_head.weight"}
    assert all(torch.equal(theirs[name], tensor.float()) for name, tensor in ours.items())


@pytest.mark.parametrize("hidden_act", ["silu", "gelu"])
def test_transformers_reads_one_with_a_vision_tower(tmp_path: Path, hidden_act: str) -> None:
    from transformers import Mistral3ForConditionalGeneration

    vision = replace(TINY_VISION, hidden_act=hidden_act)
    directory = checkpoints.make_tiny_checkpoint(tmp_path, num_layers=1, vision=vision)
    model, info = Mistral3ForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    ours = load_model_config(directory).vision
    theirs = model.config.vision_config
    assert ours is not None
    assert (ours.hidden_act, ours.head_dim) == (theirs.hidden_act, theirs.head_dim)
    assert ours.image_token_id == model.config.image_token_id
    assert check_checkpoint(directory).vision == ours


def test_transformers_and_our_config_read_the_same_numbers(tmp_path: Path) -> None:
    from transformers import Mistral4Config

    ours = load_model_config(checkpoints.make_tiny_checkpoint(tmp_path))
    theirs = Mistral4Config.from_pretrained(tmp_path)
    assert theirs.qk_head_dim == ours.qk_head_dim()
    assert theirs.n_routed_experts == ours.num_experts
    assert theirs.moe_intermediate_size == ours.expert_hidden_size
    assert theirs.max_position_embeddings == ours.max_context
    assert theirs.rope_parameters["factor"] == ours.rope.factor
    assert theirs.rope_parameters["llama_4_scaling_beta"] == ours.llama4_beta


def test_mid_has_the_dimensions_of_the_published_baselines(tmp_path: Path) -> None:
    write_config(tmp_path, MID)
    config = load_model_config(tmp_path)
    shapes = [tensor.shape for tensor in TEXT_SCHEME.expected(config).values()]
    assert sum(torch.Size(shape).numel() for shape in shapes) == 898_126_848
    assert (config.latent_width(), config.num_experts, config.vocab_size) == (320, 128, 32768)
