"""Weights of each role: right values in the right places, only the bytes needed, damage named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple, fields
from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file

from ostro.actors.errors import CheckpointError
from ostro.actors.model.checkpoint import CheckpointReader
from ostro.actors.model.random_checkpoint import TINY_VISION
from ostro.actors.model.weight_bytes import attention_bytes, expert_bytes
from ostro.actors.model.weights import (
    AttentionLayerWeights,
    check_checkpoint,
    load_attention_weights,
    load_expert_weights,
)
from ostro.configs.errors import ConfigError

Tensors = dict[str, torch.Tensor]
_FILE = "model.safetensors"
_LAYER = "model.layers.1."


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return checkpoints.make_tiny_checkpoint(tmp_path / "tiny", num_layers=2, vocab_size=384)


@pytest.fixture
def tensors(tiny: Path) -> Tensors:
    return load_file(tiny / _FILE)


def test_attention_weights_are_the_checkpoints(tiny: Path, tensors: Tensors) -> None:
    config = check_checkpoint(tiny)
    weights = load_attention_weights(
        CheckpointReader(tiny), config, device="cpu", dtype=torch.float32
    )
    layer = weights.layers[1]
    assert len(weights.layers) == 2
    assert torch.equal(weights.embed_VD, tensors["model.embed_tokens.weight"])
    assert torch.equal(weights.lm_head_VD, tensors["lm_head.weight"])
    assert torch.equal(weights.final_norm_D, tensors["model.norm.weight"])
    for ours, theirs in (
        (layer.input_norm_D, "input_layernorm.weight"),
        (layer.post_norm_D, "post_attention_layernorm.weight"),
        (layer.q_a, "self_attn.q_a_proj.weight"),
        (layer.q_a_norm, "self_attn.q_a_layernorm.weight"),
        (layer.q_b, "self_attn.q_b_proj.weight"),
        (layer.kv_a, "self_attn.kv_a_proj_with_mqa.weight"),
        (layer.kv_a_norm, "self_attn.kv_a_layernorm.weight"),
        (layer.o_proj, "self_attn.o_proj.weight"),
        (layer.gate_ED, "mlp.gate.weight"),
        (layer.shared_down, "mlp.shared_experts.down_proj.weight"),
    ):
        assert torch.equal(ours, tensors[_LAYER + theirs]), theirs


def test_gate_and_up_of_the_shared_expert_are_stacked(tiny: Path, tensors: Tensors) -> None:
    layer = _attention_layer(tiny)
    shared = _LAYER + "mlp.shared_experts."
    assert torch.equal(layer.shared_gate_up[:32], tensors[shared + "gate_proj.weight"])
    assert torch.equal(layer.shared_gate_up[32:], tensors[shared + "up_proj.weight"])


def test_kv_b_is_split_head_by_head(tiny: Path, tensors: Tensors) -> None:
    layer = _attention_layer(tiny)
    kv_b = tensors[_LAYER + "self_attn.kv_b_proj.weight"]  # per head 16 nope rows, 32 value rows
    for head in range(4):
        assert torch.equal(layer.w_uk_HNC[head], kv_b[head * 48 : head * 48 + 16])
        assert torch.equal(layer.w_uv_HVC[head], kv_b[head * 48 + 16 : head * 48 + 48])


def _attention_layer(directory: Path) -> AttentionLayerWeights:
    config = check_checkpoint(directory)
    reader = CheckpointReader(directory)
    return load_attention_weights(reader, config, device="cpu", dtype=torch.float32).layers[1]


def test_weights_take_the_dtype_asked_for_but_the_gate_stays_f32(tiny: Path) -> None:
    reader, config = CheckpointReader(tiny), check_checkpoint(tiny)
    weights = load_attention_weights(reader, config, device="cpu", dtype=torch.bfloat16)
    for field in fields(AttentionLayerWeights):
        wanted = torch.float32 if field.name == "gate_ED" else torch.bfloat16
        assert getattr(weights.layers[0], field.name).dtype == wanted, field.name
    experts = load_expert_weights(reader, config, [0], device="cpu", dtype=torch.bfloat16)
    assert experts.layers[0].gate_up.dtype == torch.bfloat16


@pytest.mark.parametrize("local_to_logical", [[0, 1, 2, 3], [9, 4, 4, 15], []])
def test_expert_weights_are_those_of_the_local_slots(
    tiny: Path, tensors: Tensors, local_to_logical: list[int]
) -> None:
    weights = load_expert_weights(
        CheckpointReader(tiny),
        check_checkpoint(tiny),
        local_to_logical,
        device="cpu",
        dtype=torch.float32,
    )
    experts = _LAYER + "mlp.experts."
    gate_up, down = (tensors[experts + name] for name in ("gate_up_proj", "down_proj"))
    assert weights.local_to_logical == tuple(local_to_logical)
    assert torch.equal(weights.layers[1].gate_up, gate_up[local_to_logical])
    assert torch.equal(weights.layers[1].down, down[local_to_logical])


def test_expert_that_the_model_has_not_is_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match="16 experts exist"):
        load_expert_weights(
            CheckpointReader(tiny),
            check_checkpoint(tiny),
            [16],
            device="cpu",
            dtype=torch.float32,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_progress_adds_up_to_the_bytes_foretold(tiny: Path, dtype: torch.dtype) -> None:
    config, reader = check_checkpoint(tiny), CheckpointReader(tiny)
    attention: list[int] = []
    experts: list[int] = []
    load_attention_weights(reader, config, device="cpu", dtype=dtype, progress=attention.append)
    load_expert_weights(reader, config, [1, 5], device="cpu", dtype=dtype, progress=experts.append)
    assert sum(attention) == attention_bytes(config, dtype)
    assert sum(experts) == expert_bytes(config, 2, dtype)


def test_each_role_reads_its_own_bytes_and_no_others(tiny: Path) -> None:
    config = check_checkpoint(tiny)
    attention, experts = CheckpointReader(tiny), CheckpointReader(tiny)
    load_attention_weights(attention, config, device="cpu", dtype=torch.float32)
    load_expert_weights(experts, config, [3, 8, 9], device="cpu", dtype=torch.float32)
    assert attention.bytes_read == attention_bytes(config, torch.float32)
    assert experts.bytes_read == expert_bytes(config, 3, torch.float32)


def test_bytes_are_those_that_the_tensors_take(tiny: Path) -> None:
    config = check_checkpoint(tiny)
    weights = load_attention_weights(
        CheckpointReader(tiny), config, device="cpu", dtype=torch.bfloat16
    )
    tensors = [weights.embed_VD, weights.final_norm_D, weights.lm_head_VD]
    tensors += [tensor for layer in weights.layers for tensor in astuple(layer)]
    assert sum(tensor.nbytes for tensor in tensors) == attention_bytes(config, torch.bfloat16)


def test_tied_head_is_the_embedding_itself(tmp_path: Path) -> None:
    tied = checkpoints.make_tiny_checkpoint(tmp_path, num_layers=1, tie_word_embeddings=True)
    config = check_checkpoint(tied)
    reader = CheckpointReader(tied)
    weights = load_attention_weights(reader, config, device="cpu", dtype=torch.float32)
    assert weights.lm_head_VD is weights.embed_VD
    assert reader.bytes_read == attention_bytes(config, torch.float32)


def test_wrapper_without_a_vision_config_gives_the_same_weights_and_ignores_the_tower(
    tmp_path: Path, tiny: Path, tensors: Tensors
) -> None:
    wrapped = {"language_model." + name: tensor for name, tensor in tensors.items()}
    wrapped["vision_tower.ln_pre.weight"] = torch.ones(4)
    wrapped["multi_modal_projector.norm.weight"] = torch.ones(4)
    save_file(wrapped, tmp_path / _FILE)
    text = json.loads((tiny / "config.json").read_text())
    config = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(_attention_layer(tmp_path).q_b, _attention_layer(tiny).q_b)


@pytest.fixture
def seeing(tmp_path: Path) -> Path:
    return checkpoints.make_tiny_checkpoint(
        tmp_path / "seeing", num_layers=1, vocab_size=384, vision=TINY_VISION
    )


def test_vision_weights_are_the_checkpoints(seeing: Path) -> None:
    tensors, reader = load_file(seeing / _FILE), CheckpointReader(seeing)
    config = check_checkpoint(seeing)
    vision = load_attention_weights(reader, config, device="cpu", dtype=torch.float32).vision
    assert vision is not None
    block, projector = "vision_tower.transformer.layers.1.", "multi_modal_projector."
    layer, attention = vision.layers[1], block + "attention."
    assert len(vision.layers) == 2
    for ours, theirs in (
        (vision.patch_WP.view(32, 3, 14, 14), "vision_tower.patch_conv.weight"),
        (vision.pre_norm_W, "vision_tower.ln_pre.weight"),
        (layer.attention_norm_W, block + "attention_norm.weight"),
        (layer.qkv[:32], attention + "q_proj.weight"),
        (layer.qkv[32:64], attention + "k_proj.weight"),
        (layer.qkv[64:], attention + "v_proj.weight"),
        (layer.o_proj_WW, attention + "o_proj.weight"),
        (layer.mlp_norm_W, block + "ffn_norm.weight"),
        (layer.gate_up[:48], block + "feed_forward.gate_proj.weight"),
        (layer.gate_up[48:], block + "feed_forward.up_proj.weight"),
        (layer.down_WF, block + "feed_forward.down_proj.weight"),
        (vision.projector_norm_W, projector + "norm.weight"),
        (vision.merge, projector + "patch_merger.merging_layer.weight"),
        (vision.project_in_DW, projector + "linear_1.weight"),
        (vision.project_out_DD, projector + "linear_2.weight"),
    ):
        assert torch.equal(ours, tensors[theirs]), theirs
    assert reader.bytes_read == attention_bytes(config, torch.float32)


def test_expert_role_reads_nothing_of_the_tower(seeing: Path) -> None:
    reader, config = CheckpointReader(seeing), check_checkpoint(seeing)
    load_expert_weights(reader, config, [2], device="cpu", dtype=torch.float32)
    assert reader.bytes_read == expert_bytes(config, 1, torch.float32)


def test_what_a_tower_lacks_or_has_too_much_is_told(seeing: Path) -> None:
    tensors = load_file(seeing / _FILE)
    del tensors["vision_tower.ln_pre.weight"], tensors["multi_modal_projector.linear_2.weight"]
    tensors["vision_tower.surprise"] = torch.ones(1)
    save_file(tensors, seeing / _FILE)
    with pytest.raises(CheckpointError) as error:
        check_checkpoint(seeing)
    assert "2 missing: multi_modal_projector.linear_2.weight, vision_tower.ln" in str(error.value)
    assert "1 unknown: model.safetensors: vision_tower.surprise" in str(error.value)


def _drop_norm(tensors: Tensors) -> None:
    del tensors[_LAYER + "input_layernorm.weight"]


def _add_surprise(tensors: Tensors) -> None:
    tensors["model.layers.1.surprise"] = torch.ones(1)


def _cut_experts(tensors: Tensors) -> None:
    name = _LAYER + "mlp.experts.down_proj"
    tensors[name] = tensors[name][:15].contiguous()


def _quantize(tensors: Tensors) -> None:
    name = _LAYER + "self_attn.o_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def _add_layer(tensors: Tensors) -> None:
    for name in list(tensors):
        if name.startswith(_LAYER):
            tensors[name.replace(".1.", ".2.", 1)] = tensors[name].clone()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_drop_norm, r"1 missing: model\.layers\.1\.input_layernorm\.weight"),
        (_add_surprise, r"1 unknown: model\.safetensors: model\.layers\.1\.surprise"),
        (_cut_experts, r"experts\.down_proj is \[15, 64, 32\], not \[16, 64, 32\]"),
        (_quantize, r"1 not as the config says: .*o_proj\.weight is fp8, but config.json declares"),
        (_add_layer, r"15 unknown: .* and 9 more"),
    ],
)
def test_damage_is_named_before_anything_is_loaded(
    tiny: Path, tensors: Tensors, damage: Callable[[Tensors], None], told: str
) -> None:
    config = check_checkpoint(tiny)
    damage(tensors)
    save_file(tensors, tiny / _FILE)
    reader = CheckpointReader(tiny)
    with pytest.raises(CheckpointError, match=told):
        check_checkpoint(tiny)
    with pytest.raises(CheckpointError, match=told):
        load_attention_weights(reader, config, device="cpu", dtype=torch.float32)
    with pytest.raises(CheckpointError, match=told):
        load_expert_weights(reader, config, [0], device="cpu", dtype=torch.float32)
    assert reader.bytes_read == 0


def test_one_error_tells_all_that_is_wrong(tiny: Path, tensors: Tensors) -> None:
    _drop_norm(tensors)
    _add_surprise(tensors)
    save_file(tensors, tiny / _FILE)
    with pytest.raises(CheckpointError, match=r"tiny: tensors 1 missing: .*; 1 unknown: "):
        check_checkpoint(tiny)


def test_truncated_checkpoint_is_named_by_the_check(tiny: Path) -> None:
    data = (tiny / _FILE).read_bytes()
    (tiny / _FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated: .* tensor model\."):
        check_checkpoint(tiny)


def test_check_tells_config_errors_too(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "n_group": 4}))
    with pytest.raises(ConfigError, match="n_group"):
        check_checkpoint(tiny)
