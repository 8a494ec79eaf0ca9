"""Conversion: the tensors that the official files have, their values kept, whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import checkpoint_variants
import checkpoints
import pictures
import pytest
import torch
from model_rig import ModelRig, load_image_oracle, oracle_image_logits
from safetensors.torch import load_file, save_file

from ostro.actors.errors import CheckpointError
from ostro.actors.model.checkpoint import CheckpointReader
from ostro.actors.model.conversion import official_format, plan_conversion, tensor_specs
from ostro.actors.model.converted_checkpoint import write_conversion
from ostro.actors.model.native_names import NATIVE_SCHEME
from ostro.actors.model.random_checkpoint import (
    SMALL_4,
    TINY_VISION,
    write_config,
)
from ostro.actors.model.stored_weights import stored_weight
from ostro.actors.model.weight_names import WRAPPER_SCHEME, NamingScheme
from ostro.actors.model.weights import check_checkpoint
from ostro.configs.checkpoint_layout import CheckpointLayout
from ostro.configs.model import load_model_config
from ostro.configs.quantization import Quantization, WeightFormat

Variant = Callable[[str, str], Path]
_WEIGHTS = {"hf": "model.safetensors", "mistral": "consolidated.safetensors"}
_CONFIGS = {"hf": "config.json", "mistral": "params.json"}
_KINDS = [(layout, precision) for layout in _WEIGHTS for precision in ("bf16", "fp8", "nvfp4")]
_INPUT_SCALES = ("activation_scale", "qscale_act", "input_global_scale")


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    made: dict[tuple[str, str], Path] = {}
    source = checkpoints.make_tiny_checkpoint(
        tmp_path_factory.mktemp("source"),
        num_layers=2,
        num_experts=8,
        vocab_size=384,
        vision=TINY_VISION,
        dtype="bfloat16",
    )

    def make(layout: str, precision: str) -> Path:
        if (layout, precision) not in made:
            target = tmp_path_factory.mktemp("variant") / f"{layout}_{precision}"
            checkpoint_variants.write_variant(source, target, layout, precision)
            made[layout, precision] = target
        return made[layout, precision]

    return make


def _convert(
    source: Path, target: Path, layout: str, precision: str, max_shard_bytes: int = 10**9
) -> Path:
    plan = plan_conversion(source, CheckpointLayout(layout), WeightFormat(precision))
    told: list[int] = []
    write_conversion(plan, target, progress=told.append, max_shard_bytes=max_shard_bytes)
    assert sum(told) == plan.num_bytes()
    return target


def _same_bytes(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(
            found[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)
        ), name


@pytest.mark.parametrize("precision", ["bf16", "fp8", "nvfp4"])
@pytest.mark.parametrize(("start", "end"), [("hf", "mistral"), ("mistral", "hf"), ("hf", "hf")])
def test_another_layout_holds_the_very_bytes_that_its_official_file_would(
    variant: Variant, tmp_path: Path, start: str, end: str, precision: str
) -> None:
    converted = _convert(variant(start, precision), tmp_path / "out", end, precision)
    wanted = load_file(variant(end, precision) / _WEIGHTS[end])
    _same_bytes(load_file(converted / _WEIGHTS[end]), wanted)
    assert check_checkpoint(converted) == check_checkpoint(variant(start, precision))


@pytest.mark.parametrize("layout", ["hf", "mistral"])
@pytest.mark.parametrize("precision", ["fp8", "nvfp4"])
def test_rounding_gives_the_values_of_the_official_rule_and_no_input_scales(
    variant: Variant, tmp_path: Path, layout: str, precision: str
) -> None:
    converted = _convert(variant("mistral", "bf16"), tmp_path / "out", layout, precision)
    wanted = {
        name: tensor
        for name, tensor in load_file(variant(layout, precision) / _WEIGHTS[layout]).items()
        if not name.endswith(_INPUT_SCALES)
    }
    found = load_file(converted / _WEIGHTS[layout])
    if (layout, precision) == ("mistral", "fp8"):  # here w1 and w3 take scales of their own
        experts = {name for name in wanted if ".experts." in name and ".w2." not in name}
        assert experts <= found.keys()
        found = {name: tensor for name, tensor in found.items() if name not in experts}
        wanted = {name: tensor for name, tensor in wanted.items() if name not in experts}
    _same_bytes(found, wanted)
    declared = check_checkpoint(converted).quantization
    wanted_format = WeightFormat(precision)
    assert declared == Quantization(weight_format=wanted_format, has_input_scales=False)


# Text before and behind an image, so that the tower's rows count too.
_TOKENS, _IMAGES = pictures.prompt_of([1, 100, pictures.make_image(56, 28, seed=1), 101, 102])


def _logits(directory: Path) -> torch.Tensor:
    rig = ModelRig(directory, dtype=torch.bfloat16)
    return rig.logits_in_chunks(_TOKENS, len(_TOKENS), _IMAGES)


@pytest.mark.parametrize(("start", "precision"), _KINDS)
@pytest.mark.parametrize("end", ["hf", "mistral"])
def test_bf16_of_any_checkpoint_gives_its_bf16_logits(
    variant: Variant, tmp_path: Path, start: str, precision: str, end: str
) -> None:
    source = variant(start, precision)
    converted = _convert(source, tmp_path / "out", end, "bf16")
    assert torch.equal(_logits(converted), _logits(source))


@pytest.mark.parametrize(("start", "end"), [("fp8", "nvfp4"), ("nvfp4", "fp8")])
def test_one_quantised_precision_becomes_the_other(
    variant: Variant, tmp_path: Path, start: str, end: str
) -> None:
    source = variant("mistral", start)
    converted = _convert(source, tmp_path / "out", "hf", end)
    logits = _logits(source)
    assert (_logits(converted) - logits).abs().max() < 0.3 * logits.abs().max()
    quantization = check_checkpoint(converted).quantization
    assert quantization is not None
    assert quantization.weight_format is WeightFormat(end)


@pytest.mark.parametrize(("layout", "precision"), _KINDS)
def test_a_large_result_is_cut_into_shards_with_an_index(
    variant: Variant, tmp_path: Path, layout: str, precision: str
) -> None:
    source = variant("hf", "bf16")
    most = 100_000
    cut = _convert(source, tmp_path / "cut", layout, precision, max_shard_bytes=most)
    whole = _convert(source, tmp_path / "whole", layout, precision)
    stem = _WEIGHTS[layout].removesuffix(".safetensors")
    shards = sorted(cut.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
    ]
    assert all(len(load_file(shard)) == 1 or shard.stat().st_size < 2 * most for shard in shards)
    assert (cut / f"{stem}.safetensors.index.json").is_file()
    reader, wanted = CheckpointReader(cut), load_file(whole / _WEIGHTS[layout])
    _same_bytes({name: reader.read(name) for name in reader.names()}, wanted)


@pytest.mark.parametrize("layout", ["hf", "mistral"])
def test_bare_text_models_convert_too(tmp_path: Path, layout: str) -> None:
    source = checkpoints.make_tiny_checkpoint(
        tmp_path / "text", num_layers=1, num_experts=4, dtype="bfloat16"
    )
    there = _convert(source, tmp_path / "there", layout, "bf16")
    back = _convert(there, tmp_path / "back", "hf", "bf16")
    _same_bytes(load_file(back / _WEIGHTS["hf"]), load_file(source / _WEIGHTS["hf"]))
    assert check_checkpoint(back) == check_checkpoint(source)


@pytest.mark.parametrize(
    ("scheme", "precision", "num_values", "num_bytes"),
    [
        # The count that Hugging Face shows of the official repository; scales are among it.
        (WRAPPER_SCHEME, WeightFormat.FP8, 119_401_317_952, 120.92e9),
        (NATIVE_SCHEME, WeightFormat.NVFP4, None, 70.80e9),
    ],
)
def test_formats_give_the_official_files_their_size(
    tmp_path: Path,
    scheme: NamingScheme,
    precision: WeightFormat,
    num_values: int | None,
    num_bytes: float,
) -> None:
    write_config(tmp_path, SMALL_4)
    specs = [
        spec
        for tensor in scheme.expected(load_model_config(tmp_path)).values()
        for spec in tensor_specs(
            stored_weight(tensor, scheme.layout, official_format(tensor, precision))
        )
    ]
    if num_values is not None:
        assert sum(math.prod(spec.shape) for spec in specs) == num_values
    assert sum(spec.num_bytes() for spec in specs) == pytest.approx(num_bytes, rel=1e-4)


def test_transformers_reads_the_config_and_the_weights_that_are_written(
    variant: Variant, tmp_path: Path
) -> None:
    converted = _convert(variant("mistral", "bf16"), tmp_path / "out", "hf", "bf16")
    wanted = oracle_image_logits(load_image_oracle(variant("hf", "bf16")), _TOKENS, _IMAGES)
    found = oracle_image_logits(load_image_oracle(converted), _TOKENS, _IMAGES)
    assert torch.equal(found, wanted)


def test_float32_becomes_bf16_and_says_so(tmp_path: Path) -> None:
    source = checkpoints.make_tiny_checkpoint(tmp_path / "text", num_layers=1, num_experts=4)
    converted = _convert(source, tmp_path / "out", "hf", "bf16")
    dtypes = {tensor.dtype for tensor in load_file(converted / _WEIGHTS["hf"]).values()}
    assert dtypes == {torch.bfloat16}
    assert check_checkpoint(converted) == replace(check_checkpoint(source), dtype="bfloat16")


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    source = checkpoints.make_tiny_checkpoint(
        tmp_path / "text", num_layers=1, num_experts=4, tie_word_embeddings=True
    )
    converted = _convert(source, tmp_path / "out", "mistral", "bf16")
    assert check_checkpoint(converted).tie_word_embeddings
    assert "output.weight" not in load_file(converted / _WEIGHTS["mistral"])


def test_other_files_are_carried_over_and_unknown_keys_of_the_config_stay(
    variant: Variant, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in variant("hf", "fp8").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    for name in ("tekken.json", "SYSTEM_PROMPT.txt", "old.bin"):
        (source / name).write_text(name)
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "surprise": 7}))
    converted = _convert(source, tmp_path / "out", "hf", "bf16")
    assert {file.name for file in converted.iterdir()} == {
        *("tekken.json", "SYSTEM_PROMPT.txt", "generation_config.json"),
        *("config.json", "model.safetensors"),
    }
    assert (converted / "tekken.json").read_text() == "tekken.json"
    written = json.loads((converted / "config.json").read_text())
    assert written["surprise"] == 7
    assert "quantization_config" not in written


@pytest.mark.parametrize(("layout", "precision"), [kind for kind in _KINDS if "bf16" not in kind])
def test_what_a_config_says_of_its_precision_stays_with_the_precision(
    variant: Variant, tmp_path: Path, layout: str, precision: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in variant(layout, precision).iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    values = json.loads((source / _CONFIGS[layout]).read_text())
    key = "quantization_config" if layout == "hf" else "quantization"
    values[key]["ignore"] = ["re:.*attention.*"]
    (source / _CONFIGS[layout]).write_text(json.dumps(values))
    converted = _convert(source, tmp_path / "out", layout, precision)
    assert json.loads((converted / _CONFIGS[layout]).read_text())[key] == values[key]


def test_token_ids_survive_the_layout_that_has_no_place_for_them(tmp_path: Path) -> None:
    source = checkpoints.make_tiny_checkpoint(tmp_path / "text", num_layers=1, num_experts=4)
    (source / "generation_config.json").unlink()
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "eos_token_id": [2, 9]}))
    converted = _convert(source, tmp_path / "out", "mistral", "bf16")
    assert check_checkpoint(converted).eos_token_ids == (2, 9)


# ---- whole or not at all


def test_what_the_other_config_cannot_say_is_refused(tmp_path: Path) -> None:
    source = checkpoints.make_tiny_checkpoint(tmp_path / "text", num_layers=1, num_experts=4)
    values = json.loads((source / "config.json").read_text())
    values["rope_parameters"]["mscale"] = 0.5
    (source / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"params\.json cannot say its rope"):
        _convert(source, tmp_path / "out", "mistral", "bf16")
    assert [file.name for file in tmp_path.iterdir()] == ["text"]


def test_a_target_that_holds_something_is_left_alone(variant: Variant, tmp_path: Path) -> None:
    (tmp_path / "note").touch()
    with pytest.raises(CheckpointError, match="not empty; name a new directory"):
        _convert(variant("hf", "bf16"), tmp_path, "hf", "fp8")
    assert [file.name for file in tmp_path.iterdir()] == ["note"]


def test_an_empty_target_is_filled(variant: Variant, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    number = target.stat().st_ino  # it may be a disk of its own, or where a shell stands
    check_checkpoint(_convert(variant("hf", "bf16"), target, "hf", "fp8"))
    assert target.stat().st_ino == number
    assert {file.name for file in target.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors")
    }


def test_a_target_may_be_a_link_or_the_directory_one_stands_in(
    variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("there", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "dangling").symlink_to("new")
    monkeypatch.chdir(tmp_path / "here")
    for target in (tmp_path / "link", tmp_path / "dangling", Path()):
        check_checkpoint(_convert(variant("hf", "bf16"), target, "hf", "bf16"))
    assert {file.name for file in tmp_path.iterdir()} == {
        *("there", "here", "link", "dangling", "new")
    }


def test_a_target_that_cannot_be_made_is_told(variant: Variant, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/out: cannot be written: .*/file'"):
        _convert(variant("hf", "bf16"), tmp_path / "file" / "out", "hf", "bf16")


def test_a_disk_that_fills_up_is_told_and_nothing_is_left(
    variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"out: cannot be written: .*No space left"):
        _convert(variant("hf", "bf16"), tmp_path / "out", "hf", "bf16")
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_refused_before_anything_is_written(
    variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"needs \d+ bytes, but .* has 1000 free"):
        _convert(variant("hf", "bf16"), tmp_path / "new" / "out", "hf", "bf16")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_breaks_on_the_way_leaves_nothing(variant: Variant, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in variant("hf", "bf16").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    plan = plan_conversion(source, CheckpointLayout.MISTRAL, WeightFormat.FP8)
    weights = source / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="ended early"):
        write_conversion(plan, tmp_path / "out", progress=lambda _: None)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def _broken(source: Path, target: Path, name: str, value: float) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = next(target.glob("*.safetensors"))
    tensors = load_file(weights)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, weights, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", ["hf", "mistral"])
@pytest.mark.parametrize("precision", ["fp8", "nvfp4"])
def test_values_that_are_not_finite_are_not_rounded_to_numbers(
    variant: Variant, tmp_path: Path, layout: str, precision: str, value: float
) -> None:
    name = "layers.1.experts.7.w2.weight"
    source = _broken(variant("mistral", "bf16"), tmp_path / "source", name, value)
    wanted = name if (layout, precision) == ("mistral", "fp8") else "layers.1."
    with pytest.raises(CheckpointError, match=rf"{wanted}.*: holds values that are not finite"):
        _convert(source, tmp_path / "out", layout, precision)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_scale_that_is_not_finite_is_told_by_name(variant: Variant, tmp_path: Path) -> None:
    name = "layers.1.experts.7.w2.qscale_weight"
    source = _broken(variant("mistral", "fp8"), tmp_path / "source", name, math.nan)
    with pytest.raises(CheckpointError, match=f"{name}: a scale must be finite"):
        _convert(source, tmp_path / "out", "hf", "bf16")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_broken_source_is_refused_before_anything_is_written(
    variant: Variant, tmp_path: Path
) -> None:
    for file in variant("mistral", "fp8").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps({**values, "n_layers": 3}))
    with pytest.raises(CheckpointError, match=r"missing: layers\.2"):
        plan_conversion(tmp_path, CheckpointLayout.HUGGING_FACE, WeightFormat.PLAIN)


def test_weights_that_nvfp4_has_no_groups_for_are_refused(tmp_path: Path) -> None:
    source = checkpoints.make_tiny_checkpoint(
        tmp_path, num_layers=1, num_experts=4, expert_hidden_size=24
    )
    with pytest.raises(CheckpointError, match="24 inputs do not divide by 16"):
        plan_conversion(source, CheckpointLayout.MISTRAL, WeightFormat.NVFP4)
