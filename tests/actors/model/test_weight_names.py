"""The tables of weight names: real shapes, both prefixes, both layouts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest

from ostro.actors.errors import CheckpointError
from ostro.actors.model.native_names import NATIVE_SCHEME, choose_naming
from ostro.actors.model.random_checkpoint import SMALL_4, RandomVision, write_config
from ostro.actors.model.weight_names import (
    TEXT_SCHEME,
    TEXT_SINGLE_SCHEME,
    WRAPPER_SCHEME,
    WRAPPER_SINGLE_SCHEME,
    Role,
)
from ostro.configs.model import ModelConfig, load_model_config


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    directory = tmp_path_factory.mktemp("tiny")
    return load_model_config(checkpoints.make_tiny_checkpoint(directory, num_layers=2))


def _real(tmp_path: Path, vision: RandomVision | None = None) -> ModelConfig:
    write_config(tmp_path, replace(SMALL_4, vision=vision))
    return load_model_config(tmp_path)


def test_table_counts_every_parameter_of_the_real_text_model(tmp_path: Path) -> None:
    tensors = TEXT_SCHEME.expected(_real(tmp_path)).values()
    assert sum(math.prod(tensor.shape) for tensor in tensors) == 118_972_826_624


def test_table_counts_every_parameter_of_the_real_model_with_its_tower(tmp_path: Path) -> None:
    tensors = WRAPPER_SCHEME.expected(_real(tmp_path, RandomVision())).values()
    sizes = {tensor.name: math.prod(tensor.shape) for tensor in tensors}
    tower = sum(size for name, size in sizes.items() if name.startswith("vision_tower."))
    projector = sum(size for name, size in sizes.items() if name.startswith("multi_modal_"))
    assert (tower, projector) == (403_305_472, 25_166_848)
    assert sum(sizes.values()) == 119_401_298_944


def test_expert_role_is_the_routed_experts_only(tmp_path: Path) -> None:
    tensors = TEXT_SCHEME.expected(_real(tmp_path)).values()
    routed = sum(math.prod(tensor.shape) for tensor in tensors if tensor.role is Role.EXPERT)
    assert routed == 36 * 128 * 25_165_824


def test_prefix_is_the_only_difference_of_the_schemes(tiny: ModelConfig) -> None:
    bare = TEXT_SCHEME.expected(tiny)
    wrapped = WRAPPER_SCHEME.expected(tiny)
    assert ["language_model." + name for name in bare] == list(wrapped)


def test_tensor_names_a_parameter_of_a_layer() -> None:
    name = WRAPPER_SCHEME.tensor("q_a", 3)
    assert name == "language_model.model.layers.3.self_attn.q_a_proj.weight"


@pytest.mark.parametrize(
    "scheme",
    [TEXT_SCHEME, WRAPPER_SCHEME, TEXT_SINGLE_SCHEME, WRAPPER_SINGLE_SCHEME, NATIVE_SCHEME],
)
def test_choose_naming_goes_by_the_embedding(scheme: object, tiny: ModelConfig) -> None:
    assert isinstance(scheme, type(TEXT_SCHEME))
    assert choose_naming(list(scheme.expected(tiny))) is scheme


@pytest.mark.parametrize("vision", [None, RandomVision()], ids=["text", "wrapper"])
def test_native_names_hold_every_parameter_of_the_real_model(
    tmp_path: Path, vision: RandomVision | None
) -> None:
    tensors = NATIVE_SCHEME.expected(_real(tmp_path, vision))
    total = 118_972_826_624 if vision is None else 119_401_298_944
    assert sum(math.prod(tensor.shape) for tensor in tensors.values()) == total
    assert tensors["layers.35.experts.127.w2.weight"].shape == (4096, 2048)
    assert tensors["layers.0.experts.3.w1.weight"].expert == 3


def test_a_name_that_only_another_scheme_has_is_a_mistake() -> None:
    with pytest.raises(KeyError, match="expert_gate"):
        TEXT_SCHEME.tensor("expert_gate", 0, 0)


def test_choose_naming_refuses_other_names() -> None:
    with pytest.raises(CheckpointError, match="is among the 1 tensors"):
        choose_naming(["transformer.wte.weight"])


def test_vision_tensors_are_ignored_where_a_wrapper_has_no_vision_config(tiny: ModelConfig) -> None:
    for name in ("vision_tower.ln_pre.weight", "multi_modal_projector.norm.weight"):
        assert WRAPPER_SCHEME.is_ignored(name, tiny)
        assert not TEXT_SCHEME.is_ignored(name, tiny)
    assert not WRAPPER_SCHEME.is_ignored("language_model.surprise", tiny)
