"""Draft heads from disk: read whole, refused with what is wrong and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from eagle_oracle import write_fp8_head
from safetensors.torch import load_file, save_file

from ostro.actors.errors import CheckpointError
from ostro.actors.model.draft_head import (
    DraftHead,
    configured_head,
    find_draft_head,
    load_head_weights,
)
from ostro.actors.model.random_checkpoint import TINY, write_random_head
from ostro.configs.deployment import EngineConfig
from ostro.configs.errors import ConfigError
from ostro.configs.model import ModelConfig, load_head_config, load_model_config
from ostro.configs.quantization import WeightFormat
from ostro.configs.speculation import DraftMethod, SpeculationConfig
from ostro.kernels.fp8_linear import Fp8Weight


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return load_model_config(checkpoints.make_tiny_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture
def directory(tmp_path: Path, model: ModelConfig) -> Path:
    write_random_head(tmp_path / "head", TINY, model)
    return tmp_path / "head"


def change_params(directory: Path, **values: Any) -> None:
    """None takes a key away."""
    file = directory / "params.json"
    params = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in params.items() if value is not None}))


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = directory / "consolidated.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_a_head_has_its_own_layers_and_no_experts(directory: Path, model: ModelConfig) -> None:
    config = find_draft_head(directory, model).config
    assert config.is_draft_head()
    assert not model.is_draft_head()
    assert config.num_layers == 2
    assert config.shared_hidden_size() == 3 * model.hidden_size
    assert config.rope == replace(model.rope, mscale=1.0, mscale_all_dim=1.0)


def test_every_tensor_is_read_once_and_its_bytes_are_foretold(
    directory: Path, model: ModelConfig
) -> None:
    head, told = find_draft_head(directory, model), []
    weights = load_head_weights(head, device="cpu", dtype=torch.bfloat16, progress=told.append)
    assert sum(told) == head.num_bytes(torch.bfloat16, WeightFormat.PLAIN)
    stored = load_file(directory / "consolidated.safetensors")
    assert isinstance(weights.joint, torch.Tensor)
    assert torch.equal(weights.joint, stored["eagle_linear.weight"].bfloat16())
    w1, w3 = (stored[f"layers.1.feed_forward.{name}.weight"] for name in ("w1", "w3"))
    gate_up = weights.layers[1].shared_gate_up
    assert isinstance(gate_up, torch.Tensor)
    assert torch.equal(gate_up, torch.cat((w1, w3)).bfloat16())


def test_fp8_weights_stay_as_they_are_stored_where_that_is_multiplied(
    directory: Path, model: ModelConfig, tmp_path: Path
) -> None:
    head = find_draft_head(write_fp8_head(directory, tmp_path / "fp8"), model)
    told: list[int] = []
    weights = load_head_weights(
        head,
        device="cpu",
        dtype=torch.bfloat16,
        precision=WeightFormat.FP8,
        progress=told.append,
    )
    assert sum(told) == head.num_bytes(torch.bfloat16, WeightFormat.FP8)
    assert isinstance(weights.joint, Fp8Weight)
    assert isinstance(weights.layers[0].shared_down, Fp8Weight)
    assert weights.layers[0].w_uk_HNC.dtype == torch.bfloat16


def test_a_head_that_leaves_a_weight_plain_is_counted_so(
    directory: Path, model: ModelConfig, tmp_path: Path
) -> None:
    fp8 = write_fp8_head(directory, tmp_path / "fp8")
    plain = load_file(directory / "consolidated.safetensors")["eagle_linear.weight"]

    def leave_plain(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("qscale_weight", "qscale_act"):
            del tensors[f"eagle_linear.{name}"]
        tensors["eagle_linear.weight"] = plain.bfloat16()

    change_tensors(fp8, leave_plain)
    head, told = find_draft_head(fp8, model), []
    weights = load_head_weights(
        head,
        device="cpu",
        dtype=torch.bfloat16,
        precision=WeightFormat.FP8,
        progress=told.append,
    )
    assert isinstance(weights.joint, torch.Tensor)
    assert sum(told) == head.num_bytes(torch.bfloat16, WeightFormat.FP8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dim": 128}, r"params.json: dim: is 128, and the model's hidden_size is 64"),
        ({"vocab_size": 512}, r"params.json: vocab_size: is 512, and the model's .* is 1024"),
        ({"moe": {"num_experts": 4}}, r"params.json: moe: is there, but .* have no experts"),
        ({"hidden_dim": None}, r"params.json: hidden_dim: missing"),
        ({"llama_4_scaling": None}, r"params.json: llama_4_scaling: missing"),
        ({"n_layers": 0}, r"params.json: n_layers: must be a whole number"),
        ({"n_kv_heads": 1}, r"params.json: n_kv_heads: is 1, not"),
        ({"quantization": {"qformat_weight": "int8"}}, r"qformat_weight: is 'int8'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_does_not_fit_is_refused(
    directory: Path, model: ModelConfig, values: dict[str, Any], message: str
) -> None:
    change_params(directory, **values)
    with pytest.raises(ConfigError, match=message):
        find_draft_head(directory, model)


def test_a_head_whose_latents_fill_no_fp8_rows_is_named(
    directory: Path, model: ModelConfig
) -> None:
    write_random_head(directory, TINY, replace(model, kv_lora_rank=33))
    drafting = SpeculationConfig(method=DraftMethod.EAGLE, draft_model=str(directory))
    plain = EngineConfig(speculation=drafting)
    head = configured_head(plain, model)
    assert head is not None
    assert head.config.kv_lora_rank == 33
    with pytest.raises(ConfigError, match=r"head: latent_cache_dtype='fp8': .*=33 .*'auto'"):
        configured_head(replace(plain, latent_cache_dtype="fp8"), model)


def test_only_a_deployment_that_names_a_head_has_one(model: ModelConfig) -> None:
    assert configured_head(EngineConfig(), model) is None
    ngram = SpeculationConfig(method=DraftMethod.NGRAM)
    assert configured_head(EngineConfig(speculation=ngram), model) is None
    auto = SpeculationConfig(method=DraftMethod.AUTO)
    with pytest.raises(ConfigError, match=r"method=auto: name a head in draft_model"):
        configured_head(EngineConfig(speculation=auto), model)


def test_a_directory_without_a_head_is_refused(model: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: no such checkpoint directory"):
        find_draft_head(tmp_path / "nowhere", model)
    with pytest.raises(ConfigError, match=r"params.json: missing, so this is no draft head"):
        find_draft_head(tmp_path, model)


def test_missing_unknown_and_misshapen_tensors_are_told_together(
    directory: Path, model: ModelConfig
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["eagle_linear.weight"]
        tensors["layers.0.gate.weight"] = torch.zeros(4, 64)
        tensors["norm.weight"] = torch.zeros(65)

    change_tensors(directory, spoil)
    with pytest.raises(CheckpointError) as caught:
        find_draft_head(directory, model)
    assert "1 missing: eagle_linear.weight" in str(caught.value)
    assert "1 unknown: consolidated.safetensors: layers.0.gate.weight" in str(caught.value)
    assert "norm.weight is [65], not [64]" in str(caught.value)


def test_a_head_is_not_served_as_a_model(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"params.json: moe: missing"):
        load_model_config(directory)
    assert load_head_config(directory).is_draft_head()


def test_a_heads_layers_need_not_be_those_of_the_model(directory: Path, model: ModelConfig) -> None:
    write_random_head(directory, TINY, replace(model, kv_lora_rank=64, num_heads=2), num_layers=1)
    found: DraftHead = find_draft_head(directory, model)
    assert (found.config.num_layers, found.config.kv_lora_rank) == (1, 64)


def test_the_same_seed_gives_the_same_bytes(
    directory: Path, model: ModelConfig, tmp_path: Path
) -> None:
    write_random_head(tmp_path / "again", TINY, model)
    write_random_head(tmp_path / "other", TINY, model, seed=1)
    first, again, other = (
        (path / "consolidated.safetensors").read_bytes()
        for path in (directory, tmp_path / "again", tmp_path / "other")
    )
    assert first == again
    assert first != other
