"""Every official layout and precision of one model gives the logits of its dequantised twin."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import checkpoint_variants
import checkpoints
import pictures
import pytest
import torch
from model_rig import ModelRig
from safetensors.torch import load_file, save_file

from ostro.actors.errors import CheckpointError
from ostro.actors.model.checkpoint import CheckpointReader
from ostro.actors.model.random_checkpoint import TINY_VISION
from ostro.actors.model.weight_bytes import attention_bytes, expert_bytes
from ostro.actors.model.weights import check_checkpoint, load_attention_weights, load_expert_weights

Tensors = dict[str, torch.Tensor]
_QUANTIZED = ("fp8", "nvfp4")
_WEIGHTS = {"hf": "model.safetensors", "mistral": "consolidated.safetensors"}
every_variant = pytest.mark.parametrize(
    ("layout", "precision"),
    [(layout, precision) for layout in ("hf", "mistral") for precision in ("bf16", "fp8", "nvfp4")],
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_tiny_checkpoint(
        tmp_path_factory.mktemp("source"),
        num_layers=2,
        num_experts=8,
        vocab_size=384,
        vision=TINY_VISION,
        dtype="bfloat16",
    )


@pytest.fixture(scope="module")
def variant(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}

    def make(layout: str, precision: str) -> Path:
        if (layout, precision) not in made:
            target = tmp_path_factory.mktemp("variant") / f"{layout}_{precision}"
            if layout == "twin":
                checkpoint_variants.write_twin(source, target, precision)
            else:
                checkpoint_variants.write_variant(source, target, layout, precision)
            made[layout, precision] = target
        return made[layout, precision]

    return make


# Text before, between and behind two images, so that the tower's rows count too.
TOKENS, IMAGES = pictures.prompt_of(
    [
        *(1, 100, 101),
        pictures.make_image(84, 56, seed=1),
        *(102, 103),
        pictures.make_image(28, 84, seed=2),
        *(104, 105, 106),
    ]
)


def _logits(directory: Path, dtype: torch.dtype) -> torch.Tensor:
    rig = ModelRig(directory, dtype=dtype, num_expert_shards=2)
    return rig.logits_in_chunks(TOKENS, len(TOKENS), IMAGES)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_those_of_the_dequantised_twin(
    variant: Callable[[str, str], Path], layout: str, precision: str, dtype: torch.dtype
) -> None:
    found = _logits(variant(layout, precision), dtype)
    assert torch.equal(found, _logits(variant("twin", precision), dtype))


@pytest.mark.parametrize("precision", _QUANTIZED)
def test_quantising_changes_the_logits(
    variant: Callable[[str, str], Path], source: Path, precision: str
) -> None:
    plain = _logits(source, torch.float32)
    difference = (_logits(variant("hf", precision), torch.float32) - plain).abs().max()
    assert 0.01 < difference / plain.abs().max() < 0.5


@pytest.mark.parametrize("precision", ["bf16", "fp8", "nvfp4"])
def test_both_layouts_give_the_same_config(
    variant: Callable[[str, str], Path], precision: str
) -> None:
    hugging_face = check_checkpoint(variant("hf", precision))
    assert check_checkpoint(variant("mistral", precision)) == hugging_face
    assert (hugging_face.quantization is None) == (precision == "bf16")


@every_variant
def test_progress_adds_up_to_the_bytes_foretold(
    variant: Callable[[str, str], Path], layout: str, precision: str
) -> None:
    directory = variant(layout, precision)
    config, reader = check_checkpoint(directory), CheckpointReader(directory)
    told: list[int] = []
    common = {"device": "cpu", "dtype": torch.bfloat16, "progress": told.append}
    load_attention_weights(reader, config, **common)
    load_expert_weights(reader, config, [1, 5], **common)
    foretold = attention_bytes(config, torch.bfloat16) + expert_bytes(config, 2, torch.bfloat16)
    assert sum(told) == foretold


@every_variant
def test_an_expert_shard_reads_its_own_experts_and_no_other_byte(
    variant: Callable[[str, str], Path], layout: str, precision: str
) -> None:
    directory = variant(layout, precision)
    config, reader = check_checkpoint(directory), CheckpointReader(directory)
    load_expert_weights(reader, config, [6, 2], device="cpu", dtype=torch.float32)
    experts = [name for name in reader.names() if ".experts." in name]
    all_bytes = sum(reader.num_bytes(name) for name in experts)
    assert reader.bytes_read == all_bytes * 2 // config.num_experts


def test_where_both_layouts_are_whole_the_native_one_is_read(
    variant: Callable[[str, str], Path], tmp_path: Path
) -> None:
    for layout, precision in (("hf", "bf16"), ("mistral", "fp8")):
        for file in variant(layout, precision).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert check_checkpoint(tmp_path).quantization is not None
    assert "tok_embeddings.weight" in CheckpointReader(tmp_path).names()


def test_a_lone_params_json_does_not_hide_the_other_layout(
    variant: Callable[[str, str], Path], tmp_path: Path
) -> None:
    for file in variant("hf", "bf16").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "params.json").write_text("{}")
    assert check_checkpoint(tmp_path).quantization is None


@pytest.mark.gpu
@pytest.mark.parametrize("precision", _QUANTIZED)
def test_a_gpu_dequantises_to_the_same_values_and_says_so(
    variant: Callable[[str, str], Path], precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = variant("mistral", precision)
    config, reader = check_checkpoint(directory), CheckpointReader(directory)
    with caplog.at_level(logging.WARNING):
        found = load_expert_weights(reader, config, [3], device="cuda", dtype=torch.bfloat16)
    wanted = load_expert_weights(reader, config, [3], device="cpu", dtype=torch.bfloat16)
    assert torch.equal(found.layers[1].gate_up.cpu(), wanted.layers[1].gate_up)
    told = f"{precision} weights of the expert role are dequantised to bfloat16"
    assert len(caplog.records) == 1
    assert told in caplog.text


# ---- what is refused

_HF_SCALE = "language_model.model.layers.1.mlp.experts.gate_up_proj_scale_inv"
_HF_INPUT = "language_model.model.layers.0.self_attn.o_proj.activation_scale"
_W1 = "layers.1.experts.3.w1."


def _drop(name: str) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        del tensors[name]

    return damage


def _put(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        tensors[name] = tensor

    return damage


@pytest.mark.parametrize(
    ("layout", "precision", "damage", "told"),
    [
        ("hf", "fp8", _drop(_HF_SCALE), f"1 missing: {_HF_SCALE}"),
        ("hf", "fp8", _drop(_HF_INPUT), f"1 missing: {_HF_INPUT}"),
        ("hf", "fp8", _put(_HF_SCALE, torch.ones(7)), f"{_HF_SCALE} is [7], not [8] or [8, 1, 1]"),
        ("hf", "fp8", _put(_HF_INPUT, torch.ones(64)), f"{_HF_INPUT} is [64], not [] or [1]"),
        (
            "hf",
            "fp8",
            _put("language_model.model.layers.0.self_attn.o_proj.weight_scale_2", torch.ones(1)),
            "1 unknown: model.safetensors: language_model.model.layers.0.self_attn.o_proj.weight_",
        ),
        (
            "hf",
            "fp8",
            _put("language_model.lm_head.weight", torch.ones(384, 64).to(torch.float8_e4m3fn)),
            "lm_head.weight is F8_E4M3, not BF16 or F32 or F16",
        ),
        ("mistral", "fp8", _drop(_W1 + "qscale_weight"), f"1 missing: {_W1}qscale_weight"),
        ("mistral", "fp8", _drop(_W1 + "weight"), f"1 missing: {_W1}weight"),
        (
            "mistral",
            "fp8",
            _put("layers.0.attention.k_fake_quantizer.qscale_act", torch.ones(1)),
            "1 unknown: consolidated.safetensors: layers.0.attention.k_fake_quantizer.qscale_act",
        ),
        ("mistral", "nvfp4", _drop(_W1 + "weight_scale"), f"1 missing: {_W1}weight_scale"),
        ("mistral", "nvfp4", _drop(_W1 + "weight_packed"), f"1 missing: {_W1}weight_packed"),
        ("mistral", "nvfp4", _drop(_W1 + "input_global_scale"), f"1 missing: {_W1}input_global"),
        (
            "mistral",
            "nvfp4",
            _put(_W1 + "weight_packed", torch.zeros(32, 64, dtype=torch.uint8)),
            f"{_W1}weight_packed is [32, 64], not [32, 32]",
        ),
        (
            "mistral",
            "nvfp4",
            _put(_W1 + "weight_scale", torch.ones(32, 4)),
            f"{_W1}weight_scale is F32, not F8_E4M3",
        ),
        ("mistral", "bf16", _drop("norm.weight"), "1 missing: norm.weight"),
        (
            "mistral",
            "bf16",
            _put("layers.0.router_biases", torch.ones(8)),
            "1 unknown: consolidated.safetensors: layers.0.router_biases",
        ),
    ],
)
def test_damage_is_named_before_anything_is_loaded(
    variant: Callable[[str, str], Path],
    tmp_path: Path,
    layout: str,
    precision: str,
    damage: Callable[[Tensors], None],
    told: str,
) -> None:
    directory = _copy(variant(layout, precision), tmp_path)
    file = directory / _WEIGHTS[layout]
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as error:
        check_checkpoint(directory)
    assert told in error.value.message


@pytest.mark.parametrize("layout", ["hf", "mistral"])
def test_quantised_weights_that_the_config_does_not_declare_are_refused(
    variant: Callable[[str, str], Path], tmp_path: Path, layout: str
) -> None:
    directory = _copy(variant(layout, "fp8"), tmp_path)
    name = "config.json" if layout == "hf" else "params.json"
    config = json.loads((directory / name).read_text())
    del config["quantization_config" if layout == "hf" else "quantization"]
    (directory / name).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"is fp8, but {name} declares bf16"):
        check_checkpoint(directory)


def _copy(source: Path, target: Path) -> Path:
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target
