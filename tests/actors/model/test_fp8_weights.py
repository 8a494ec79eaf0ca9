"""FP8 checkpoints held as they are stored: values, scales, bytes, logits, and what cannot stay."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import checkpoint_variants
import checkpoints
import pytest
import torch
from model_rig import ModelRig
from safetensors.torch import load_file, save_file

from ostro.actors.errors import CheckpointError
from ostro.actors.model.checkpoint import CheckpointReader
from ostro.actors.model.device import choose_precision, weight_dtype
from ostro.actors.model.experts import LocalExperts
from ostro.actors.model.stored_weights import match_tensors, stored_plain
from ostro.actors.model.weight_bytes import attention_bytes, expert_bytes
from ostro.actors.model.weights import (
    AttentionWeights,
    ExpertLayerWeights,
    ExpertWeights,
    check_checkpoint,
    load_attention_weights,
    load_expert_weights,
)
from ostro.configs.quantization import WeightFormat
from ostro.kernels.fp8_experts import Fp8Experts, expert_mlp_fp8
from ostro.kernels.fp8_linear import Fp8Weight

PLAIN, FP8 = WeightFormat.PLAIN, WeightFormat.FP8
TOKENS = [1, *range(100, 140)]
_LINEAR = ("q_a", "q_b", "kv_a", "o_proj", "shared_down")
every_layout = pytest.mark.parametrize("layout", checkpoint_variants.LAYOUTS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_tiny_checkpoint(
        tmp_path_factory.mktemp("source"),
        num_layers=2,
        num_experts=8,
        vocab_size=384,
        dtype="bfloat16",
    )


@pytest.fixture(scope="module")
def variant(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[str, str], Path] = {}

    def make(layout: str, precision: str = "fp8") -> Path:
        if (layout, precision) not in made:
            target = tmp_path_factory.mktemp("variant") / f"{layout}_{precision}"
            made[layout, precision] = checkpoint_variants.write_variant(
                source, target, layout, precision
            )
        return made[layout, precision]

    return make


def load_attention(directory: Path, precision: WeightFormat = FP8, **options: Any):
    config, reader = check_checkpoint(directory), CheckpointReader(directory)
    options = {"device": "cpu", "dtype": torch.bfloat16, **options}
    return load_attention_weights(reader, config, precision=precision, **options)


def load_experts(
    directory: Path, mine: list[int], precision: WeightFormat = FP8, **options: Any
) -> ExpertWeights:
    config, reader = check_checkpoint(directory), CheckpointReader(directory)
    options = {"device": "cpu", "dtype": torch.float32, **options}
    return load_expert_weights(reader, config, mine, precision=precision, **options)


def logits(directory: Path, precision: WeightFormat, **options: Any) -> torch.Tensor:
    rig = ModelRig(directory, num_expert_shards=2, precision=precision, **options)
    return rig.logits_in_chunks(TOKENS, len(TOKENS))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ---- the model


@every_layout
def test_logits_are_those_of_the_dequantised_weights_but_for_rounded_activations(
    variant: Callable[..., Path], layout: str
) -> None:
    dequantised = logits(variant(layout), PLAIN)
    assert 0.01 < relative(logits(variant(layout), FP8), dequantised) < 0.1


def test_both_layouts_give_the_same_logits(variant: Callable[..., Path]) -> None:
    assert torch.equal(logits(variant("hf"), FP8), logits(variant("mistral"), FP8))


@pytest.mark.gpu
def test_a_gpu_gives_the_logits_of_the_reference(variant: Callable[..., Path]) -> None:
    bfloat16 = {"dtype": torch.bfloat16}
    found = logits(variant("hf"), FP8, device="cuda", **bfloat16)
    assert relative(found.cpu(), logits(variant("hf"), FP8, **bfloat16)) < 0.1


# ---- values and scales


@every_layout
def test_linear_weights_keep_values_and_scales(variant: Callable[..., Path], layout: str) -> None:
    kept = load_attention(variant(layout)).layers[1]
    plain = load_attention(variant(layout), PLAIN, dtype=torch.float32).layers[1]
    for name in _LINEAR:
        weight = getattr(kept, name)
        assert isinstance(weight, Fp8Weight), name
        assert weight.scale.dtype == weight.input_scale.dtype == torch.float32
        assert torch.equal(weight.values_OI.float() * weight.scale, getattr(plain, name)), name
        assert weight.input_scale.item() == pytest.approx(checkpoint_variants.INPUT_SCALE, rel=0.01)


def test_gate_and_up_of_the_shared_expert_are_one_weight(variant: Callable[..., Path]) -> None:
    kept = load_attention(variant("hf")).layers[1].shared_gate_up
    plain = load_attention(variant("hf"), PLAIN, dtype=torch.float32).layers[1].shared_gate_up
    assert isinstance(kept, Fp8Weight)
    # Their scales differ here, so one of them was rounded once more.
    assert relative(kept.values_OI.float() * kept.scale, plain) < 0.04


def test_what_is_not_multiplied_row_by_row_is_in_the_models_dtype(
    variant: Callable[..., Path],
) -> None:
    kept, plain = (load_attention(variant("hf"), each) for each in (FP8, PLAIN))
    for field in fields(kept.layers[0]):
        if field.name not in (*_LINEAR, "shared_gate_up"):
            ours = getattr(kept.layers[0], field.name)
            assert torch.equal(ours, getattr(plain.layers[0], field.name)), field.name
    assert torch.equal(kept.lm_head_VD, plain.lm_head_VD)


@every_layout
@pytest.mark.parametrize("mine", [[6, 2], [3, 3, 0], []])
def test_experts_keep_values_and_scales(
    variant: Callable[..., Path], layout: str, mine: list[int]
) -> None:
    kept = load_experts(variant(layout), mine).layers[1]
    plain = load_experts(variant(layout), mine, PLAIN).layers[1]
    assert isinstance(kept, Fp8Experts)
    assert isinstance(plain, ExpertLayerWeights)
    gate_up = kept.gate_up_EHD.float() * kept.gate_up_scale_E[:, None, None]
    down = kept.down_EDF.float() * kept.down_scale_E[:, None, None]
    assert torch.equal(gate_up, plain.gate_up)
    assert torch.equal(down, plain.down)
    for input_scale_E in (kept.gate_up_input_scale_E, kept.down_input_scale_E):
        assert input_scale_E.shape == (len(mine),)
        assert input_scale_E.tolist() == pytest.approx([0.02] * len(mine), rel=0.01)


def test_gate_and_up_of_different_scales_are_rounded_to_one_and_told(
    variant: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = copy(variant("mistral"), tmp_path)
    tensors = load_file(directory / "consolidated.safetensors")
    tensors["layers.1.experts.3.w3.qscale_weight"] *= 1.5
    tensors["layers.1.experts.3.w3.qscale_act"] *= 2
    save_file(tensors, directory / "consolidated.safetensors")
    with caplog.at_level(logging.WARNING):
        kept = load_experts(directory, [3, 4]).layers[1]
    plain = load_experts(directory, [3, 4], PLAIN).layers[1]
    gate_up = kept.gate_up_EHD.float() * kept.gate_up_scale_E[:, None, None]
    assert torch.equal(gate_up[1], plain.gate_up[1])
    assert 0 < relative(gate_up[0], plain.gate_up[0]) < 0.04
    assert kept.gate_up_input_scale_E.tolist() == pytest.approx([0.04, 0.02], rel=0.01)
    assert "different scales in 1 weights of the expert role" in caplog.text


def test_local_experts_multiply_what_was_loaded_and_count_it(
    variant: Callable[..., Path],
) -> None:
    config = check_checkpoint(variant("hf"))
    weights = load_experts(variant("hf"), [6, 2])
    experts = LocalExperts(config, weights)
    rows_RD = torch.randn(3, config.hidden_size, generator=torch.Generator().manual_seed(0))
    expert_RK = torch.tensor([[0, -1, 1, -1], [-1, -1, 1, -1], [-1, -1, -1, -1]])
    found_RD = experts.forward(1, rows_RD, expert_RK, torch.ones(3, 4))
    wanted_RD = expert_mlp_fp8(rows_RD, expert_RK, torch.ones(3, 4), weights.layers[1])
    assert torch.equal(found_RD, wanted_RD)
    assert experts.take_counts() == [[0, 0], [1, 2]]


# ---- bytes


@every_layout
def test_bytes_filled_are_those_foretold_and_those_taken(
    variant: Callable[..., Path], layout: str
) -> None:
    told: list[int] = []
    attention = load_attention(variant(layout), progress=told.append)
    config = check_checkpoint(variant(layout))
    foretold = attention_bytes(config, torch.bfloat16, FP8)
    assert sum(told) == sum(tensor.nbytes for tensor in tensors_of(attention)) == foretold
    told.clear()
    experts = load_experts(variant(layout), [1, 5, 1], progress=told.append)
    taken = sum(tensor.nbytes for layer in experts.layers for tensor in astuple(layer))
    assert sum(told) == taken == expert_bytes(config, 3, torch.bfloat16, FP8)


def tensors_of(weights: AttentionWeights) -> list[torch.Tensor]:
    tensors = [weights.embed_VD, weights.final_norm_D, weights.lm_head_VD]
    for layer in weights.layers:
        for found in astuple(layer):  # an FP8 weight comes out as a tuple of its own
            tensors += found if isinstance(found, tuple) else (found,)
    return tensors


@every_layout
def test_an_expert_shard_reads_its_own_experts_and_no_other_byte(
    variant: Callable[..., Path], layout: str
) -> None:
    config, reader = check_checkpoint(variant(layout)), CheckpointReader(variant(layout))
    load_expert_weights(reader, config, [6, 2], device="cpu", dtype=torch.float32, precision=FP8)
    experts = [name for name in reader.names() if ".experts." in name]
    all_bytes = sum(reader.num_bytes(name) for name in experts)
    assert reader.bytes_read == all_bytes * 2 // config.num_experts


# ---- what cannot stay


@pytest.mark.parametrize(
    ("device", "stored", "chosen"),
    [
        ("cuda", "fp8", FP8),
        ("cuda", "bf16", PLAIN),
        ("cuda", "nvfp4", WeightFormat.NVFP4),
        ("cpu", "fp8", PLAIN),
        ("cpu", "nvfp4", PLAIN),
    ],
)
def test_a_gpu_chooses_the_precision_that_there_are_kernels_for(
    variant: Callable[..., Path], device: str, stored: str, chosen: WeightFormat
) -> None:
    assert choose_precision(device, check_checkpoint(variant("mistral", stored))) is chosen


def test_weight_dtype_names_the_format_that_stays() -> None:
    assert weight_dtype("bfloat16", FP8) == "fp8"
    assert weight_dtype("bfloat16", PLAIN) == "bfloat16"


def without_input_scales(directory: Path) -> Path:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["activation_scheme"] = "dynamic"
    (directory / "config.json").write_text(json.dumps(config))
    tensors = load_file(directory / "model.safetensors")
    kept = {name: each for name, each in tensors.items() if "activation_scale" not in name}
    save_file(kept, directory / "model.safetensors")
    return directory


def test_weights_without_scales_for_inputs_are_dequantised_only(
    variant: Callable[..., Path], tmp_path: Path
) -> None:
    directory = without_input_scales(copy(variant("hf"), tmp_path))
    with pytest.raises(ValueError, match="has no fp8 weights with scales for their inputs"):
        load_attention(directory)
    assert choose_precision("cuda", check_checkpoint(directory)) is PLAIN
    assert torch.equal(logits(directory, PLAIN), logits(variant("hf"), PLAIN))


@pytest.mark.parametrize("precision", ["bf16", "nvfp4"])
def test_other_formats_are_not_taken_for_fp8(variant: Callable[..., Path], precision: str) -> None:
    with pytest.raises(ValueError, match=r"precision=fp8, but .* has no fp8 weights"):
        load_experts(variant("mistral", precision), [0])


def test_a_linear_weight_that_is_stored_plain_stays_plain(
    variant: Callable[..., Path], tmp_path: Path
) -> None:
    directory = copy(variant("hf"), tmp_path)
    tensors = load_file(directory / "model.safetensors")
    o_proj = "language_model.model.layers.1.self_attn.o_proj."
    o_proj = o_proj if o_proj + "weight" in tensors else o_proj.removeprefix("language_model.")
    values, scale = tensors[o_proj + "weight"], tensors.pop(o_proj + "weight_scale_inv")
    del tensors[o_proj + "activation_scale"]
    tensors[o_proj + "weight"] = (values.float() * scale.float()).bfloat16()
    save_file(tensors, directory / "model.safetensors")
    told: list[int] = []
    layer = load_attention(directory, progress=told.append).layers[1]
    assert torch.equal(layer.o_proj, tensors[o_proj + "weight"])
    assert isinstance(layer.q_a, Fp8Weight)
    config = check_checkpoint(directory)
    plain = stored_plain(match_tensors(CheckpointReader(directory), config))
    assert plain == {("o_proj", 1)}
    assert sum(told) == attention_bytes(config, torch.bfloat16, FP8, plain=plain)


def copy(source: Path, target: Path) -> Path:
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def broken(directory: Path, name: str, index: int, value: float) -> Path:
    """With one value of the tensors whose names end so that is another."""
    file = next(directory.glob("*.safetensors"))
    tensors = load_file(file)
    for tensor in (tensor for full, tensor in tensors.items() if full.endswith(name)):
        tensor.view(-1)[index] = value
    save_file(tensors, file)
    return directory


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("precision", [FP8, PLAIN])
@pytest.mark.parametrize(
    ("layout", "name", "index"),
    [
        ("hf", "layers.1.mlp.experts.down_proj_scale_inv", 3),
        ("mistral", "layers.1.experts.3.w3.qscale_weight", 0),
    ],
)
def test_a_scale_that_is_not_finite_is_told_by_name(
    variant: Callable[..., Path],
    tmp_path: Path,
    layout: str,
    name: str,
    index: int,
    precision: WeightFormat,
    value: float,
) -> None:
    directory = broken(copy(variant(layout), tmp_path), name, index, value)
    load_experts(directory, [2, 4], precision)
    with pytest.raises(CheckpointError, match=f"{name}: a scale must be finite"):
        load_experts(directory, [3], precision)


@pytest.mark.parametrize(
    ("layout", "name", "index"),
    [
        ("hf", "layers.1.mlp.experts.down_proj_activation_scale", 3),
        ("mistral", "layers.1.experts.3.w2.qscale_act", 0),
    ],
)
def test_inputs_are_not_divided_by_zero(
    variant: Callable[..., Path], tmp_path: Path, layout: str, name: str, index: int
) -> None:
    directory = broken(copy(variant(layout), tmp_path), name, index, 0.0)
    told = f"{name}: a scale must be finite and not zero.*--precision bf16"
    with pytest.raises(CheckpointError, match=told):
        load_experts(directory, [3])
    load_experts(directory, [3], PLAIN)  # which leaves scales of inputs aside


def test_a_linear_weight_with_a_broken_scale_is_told_by_name(
    variant: Callable[..., Path], tmp_path: Path
) -> None:
    name = "layers.0.attention.wkv_b.qscale_weight"
    directory = broken(copy(variant("mistral"), tmp_path), name, 0, torch.nan)
    with pytest.raises(CheckpointError, match=f"{name}: a scale must be finite"):
        load_attention(directory)
