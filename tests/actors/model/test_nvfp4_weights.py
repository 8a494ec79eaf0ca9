"""NVFP4 experts in their own precision: logits, values, bytes, what is apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import checkpoint_variants
import checkpoints
import pytest
import torch
from model_rig import ModelRig
from safetensors.torch import load_file, save_file

from ostro.actors.errors import CheckpointError
from ostro.actors.fabric.local_exchange import LocalExchange
from ostro.actors.fabric.placement import initial_placement
from ostro.actors.model.checkpoint import CheckpointReader
from ostro.actors.model.decoder import Decoder
from ostro.actors.model.experts import LocalExperts
from ostro.actors.model.stored_weights import StoredPlain, match_tensors, stored_plain
from ostro.actors.model.weight_bytes import attention_bytes, expert_bytes
from ostro.actors.model.weights import (
    AttentionWeights,
    ExpertWeights,
    can_stack_shared,
    check_checkpoint,
    load_attention_weights,
    load_expert_weights,
)
from ostro.configs.quantization import WeightFormat
from ostro.kernels.nvfp4_experts import Nvfp4Experts, down_values, gate_up_values
from ostro.kernels.nvfp4_linear import nvfp4_weight_values

PLAIN, NVFP4 = WeightFormat.PLAIN, WeightFormat.NVFP4
F32 = torch.float32
NUM_EXPERTS = 8
TOKENS = [1, *range(100, 140)]
FILE = "consolidated.safetensors"
_GATE = "layers.1.experts.3.w1"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_tiny_checkpoint(
        tmp_path_factory.mktemp("source"),
        num_layers=2,
        num_experts=NUM_EXPERTS,
        vocab_size=384,
        dtype="bfloat16",
    )


@pytest.fixture(scope="module")
def directory(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("variant") / "nvfp4"
    return checkpoint_variants.write_variant(source, target, "mistral", "nvfp4")


@pytest.fixture
def changed(directory: Path, tmp_path: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of a copy in `tmp_path`, which the test may change before it calls `save`."""
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return load_file(tmp_path / FILE)


def load_experts(path: Path, mine: Any, precision: WeightFormat = NVFP4, **options: Any):
    config, reader = check_checkpoint(path), CheckpointReader(path)
    options = {"device": "cpu", "dtype": F32, **options}
    return load_expert_weights(reader, config, mine, precision=precision, **options)


def load_attention(path: Path, precision: WeightFormat = NVFP4, **options: Any):
    config, reader = check_checkpoint(path), CheckpointReader(path)
    options = {"device": "cpu", "dtype": F32, **options}
    return load_attention_weights(reader, config, precision=precision, **options)


def load_stacked(path: Path, **options: Any) -> tuple[AttentionWeights, ExpertWeights]:
    experts = load_experts(path, range(NUM_EXPERTS), num_extra=1, **options)
    return load_attention(path, shared_into=experts, **options), experts


def logits(path: Path, precision: WeightFormat, **options: Any) -> torch.Tensor:
    rig = ModelRig(path, num_expert_shards=2, precision=precision, **options)
    return rig.logits_in_chunks(TOKENS, len(TOKENS))


def stacked_logits(path: Path, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Of a rig whose shared experts stand among the routed ones."""
    rig = ModelRig(path, precision=NVFP4, device=device, dtype=dtype)
    attention, experts = load_stacked(path, device=device, dtype=dtype)
    rig.decoder = Decoder(rig.config, attention, rig.cache)
    local = LocalExperts(rig.config, experts)
    placement = initial_placement(NUM_EXPERTS, [0])
    rig.exchange = LocalExchange(local.forward, placement, device, has_shared=local.has_shared)
    found = rig.logits_in_chunks(TOKENS, len(TOKENS))
    assert {sum(layer) for layer in local.take_counts()} == {4 * len(TOKENS)}
    return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ---- the model


def test_logits_are_those_of_the_dequantised_twin(
    source: Path, directory: Path, tmp_path: Path
) -> None:
    twin = checkpoint_variants.write_twin(source, tmp_path / "twin", "nvfp4")
    expected = logits(twin, PLAIN)
    assert relative(logits(directory, NVFP4), expected) < 1e-5
    assert relative(stacked_logits(directory, "cpu", F32), expected) < 1e-5
    assert relative(logits(source, PLAIN), expected) > 0.01  # rounding to NVFP4 shows


@pytest.mark.gpu
def test_a_gpu_gives_the_logits_of_the_reference(directory: Path) -> None:
    expected = logits(directory, NVFP4, dtype=torch.bfloat16)
    found = logits(directory, NVFP4, device="cuda", dtype=torch.bfloat16)
    assert relative(found.cpu(), expected) < 0.05
    stacked = stacked_logits(directory, "cuda", torch.bfloat16)
    assert relative(stacked.cpu(), expected) < 0.05


# ---- values


@pytest.mark.parametrize("mine", [[6, 2], [3, 3, 0], []])
def test_experts_keep_codes_and_scales(directory: Path, mine: list[int]) -> None:
    for kept, plain in zip(
        load_experts(directory, mine).layers,
        load_experts(directory, mine, PLAIN).layers,
        strict=True,
    ):
        assert isinstance(kept, Nvfp4Experts)
        assert len(kept.down_unit_E) == len(mine)
        for slot in range(len(mine)):
            torch.testing.assert_close(gate_up_values(kept, slot), plain.gate_up[slot])
            torch.testing.assert_close(down_values(kept, slot), plain.down[slot])


def test_gate_and_up_keep_global_scales_of_their_own(
    changed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    changed[_GATE + ".weight_global_scale"] *= 3
    save_file(changed, tmp_path / FILE)
    kept, plain = (load_experts(tmp_path, [3], each).layers[1] for each in (NVFP4, PLAIN))
    torch.testing.assert_close(kept.up_unit_E, kept.gate_unit_E * 3)
    torch.testing.assert_close(gate_up_values(kept, 0), plain.gate_up[0])


def test_the_last_slot_holds_the_shared_expert(directory: Path) -> None:
    attention, experts = load_stacked(directory)
    for layer, kept, apart in zip(
        attention.layers, experts.layers, load_attention(directory).layers, strict=True
    ):
        assert isinstance(kept, Nvfp4Experts)
        assert layer.shared_gate_up is None
        assert layer.shared_down is None
        gate_up, down = map(nvfp4_weight_values, (apart.shared_gate_up, apart.shared_down))
        assert torch.equal(gate_up_values(kept, NUM_EXPERTS), gate_up)
        assert torch.equal(down_values(kept, NUM_EXPERTS), down)


# ---- bytes


def tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    for leaf in tree:
        if isinstance(leaf, tuple):
            yield from tensors_of(leaf)
        elif isinstance(leaf, torch.Tensor):
            yield leaf


def test_bytes_filled_are_those_foretold_and_those_taken(directory: Path) -> None:
    config, told = check_checkpoint(directory), []
    experts = load_experts(directory, [1, 5, 1], progress=told.append)
    taken = sum(tensor.nbytes for layer in experts.layers for tensor in tensors_of(astuple(layer)))
    assert sum(told) == taken == expert_bytes(config, 3, F32, NVFP4)


def plain_of(path: Path) -> StoredPlain:
    return stored_plain(match_tensors(CheckpointReader(path), check_checkpoint(path)))


def test_bytes_with_stacked_shared_experts_are_those_foretold(directory: Path) -> None:
    config, plain, told = check_checkpoint(directory), plain_of(directory), []
    attention, experts = load_stacked(directory, progress=told.append)
    taken = sum(tensor.nbytes for tensor in tensors_of(astuple(attention)))
    taken += sum(tensor.nbytes for layer in experts.layers for tensor in tensors_of(astuple(layer)))
    foretold = attention_bytes(config, F32, NVFP4, stacks_shared=True, plain=plain)
    foretold += expert_bytes(config, NUM_EXPERTS, F32, NVFP4, plain=plain)
    assert sum(told) == taken == foretold


def test_a_layer_with_a_plain_expert_is_foretold_as_plain(
    changed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    plain_gate = load_experts(tmp_path, [3], PLAIN).layers[1].gate_up[0].chunk(2)[0]
    for name in [name for name in changed if name.startswith(_GATE)]:
        del changed[name]
    changed[_GATE + ".weight"] = plain_gate.bfloat16()
    save_file(changed, tmp_path / FILE)
    config, told, plain = check_checkpoint(tmp_path), [], plain_of(tmp_path)
    experts = load_experts(tmp_path, [1, 5], progress=told.append)
    assert [isinstance(layer, Nvfp4Experts) for layer in experts.layers] == [True, False]
    assert sum(told) == expert_bytes(config, 2, F32, NVFP4, plain=plain)
    apart = attention_bytes(config, F32, NVFP4, stacks_shared=True, plain=plain)
    assert apart == attention_bytes(config, F32, NVFP4, plain=plain)


def test_an_expert_shard_reads_its_own_experts_and_no_other_byte(directory: Path) -> None:
    config, reader = check_checkpoint(directory), CheckpointReader(directory)
    load_expert_weights(reader, config, [6, 2], device="cpu", dtype=F32, precision=NVFP4)
    experts = [name for name in reader.names() if ".experts." in name]
    all_bytes = sum(reader.num_bytes(name) for name in experts if "input" not in name)
    read_bytes = reader.bytes_read - 2 * config.num_layers * 3 * 4  # scales of inputs, unused
    assert read_bytes == all_bytes * 2 // config.num_experts


# ---- what does not fit


@pytest.mark.parametrize(
    ("part", "value"), [("weight_scale", torch.nan), ("weight_global_scale", 0.0)]
)
@pytest.mark.parametrize("precision", [NVFP4, PLAIN])
def test_a_broken_scale_is_told_by_name(
    changed: dict[str, torch.Tensor],
    tmp_path: Path,
    part: str,
    value: float,
    precision: WeightFormat,
) -> None:
    changed[f"{_GATE}.{part}"].view(-1)[0] = value
    save_file(changed, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=rf"{_GATE}.{part}: a scale must be finite"):
        load_experts(tmp_path, [3], precision)


def test_a_plain_shared_expert_stands_apart(
    changed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    shared = load_attention(tmp_path, PLAIN).layers[1].shared_down
    module = "layers.1.shared_experts.w2."
    for name in [name for name in changed if name.startswith(module)]:
        del changed[name]
    changed[module + "weight"] = shared.bfloat16()
    save_file(changed, tmp_path / FILE)
    reader, config = CheckpointReader(tmp_path), check_checkpoint(tmp_path)
    assert not can_stack_shared(reader, config, NVFP4)
    assert load_attention(tmp_path).layers[1].shared_down is not None
    with pytest.raises(TypeError, match="load it apart"):
        load_stacked(tmp_path)


def test_inputs_that_fill_no_groups_are_told(
    changed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    params = json.loads((tmp_path / "params.json").read_text())
    params["moe"]["expert_hidden_dim"] = 24
    (tmp_path / "params.json").write_text(json.dumps(params))
    for name, tensor in changed.items():
        if ".w2.weight_" in name and "global" not in name:
            changed[name] = tensor[:, : 24 * tensor.shape[1] // 32].contiguous()
        elif (".w1.weight_" in name or ".w3.weight_" in name) and "global" not in name:
            changed[name] = tensor[:24].contiguous()
    save_file(changed, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"w2.weight_packed has 24 inputs, .* groups of 16"):
        check_checkpoint(tmp_path)


def test_official_experts_can_be_stacked(directory: Path) -> None:
    assert can_stack_shared(CheckpointReader(directory), check_checkpoint(directory), NVFP4)


def test_other_formats_are_not_taken_for_nvfp4(source: Path) -> None:
    with pytest.raises(ValueError, match=r"precision=nvfp4, but .* has no nvfp4 weights$"):
        load_experts(source, [0])
