"""NVFP4 linear layers in their own precision: logits, values, bytes, what is stored otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import checkpoint_variants
import checkpoints
import pytest
import torch
from model_rig import ModelRig, make_progress
from safetensors.torch import load_file, save_file

from ostro.actors.errors import CheckpointError
from ostro.actors.model.batch import build_batches
from ostro.actors.model.checkpoint import CheckpointReader
from ostro.actors.model.cuda_graphs import GraphedDecoder
from ostro.actors.model.stored_weights import match_tensors, stored_plain
from ostro.actors.model.weight_bytes import attention_bytes
from ostro.actors.model.weights import (
    AttentionWeights,
    check_checkpoint,
    load_attention_weights,
)
from ostro.configs.quantization import WeightFormat
from ostro.kernels.nvfp4_linear import Nvfp4Weight, nvfp4_weight_values

PLAIN, NVFP4 = WeightFormat.PLAIN, WeightFormat.NVFP4
F32 = torch.float32
TOKENS = [1, *range(100, 140)]
FILE = "consolidated.safetensors"
LINEARS = ("q_a", "q_b", "kv_a", "o_proj", "shared_gate_up", "shared_down")
_OUT = "layers.1.attention.wo"
_GATE, _UP = "layers.1.shared_experts.w1", "layers.1.shared_experts.w3"

every_layout = pytest.mark.parametrize("layout", checkpoint_variants.LAYOUTS)


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root = tmp_path_factory.mktemp("variants")
    source = checkpoints.make_tiny_checkpoint(
        root / "source", num_layers=2, num_experts=8, vocab_size=384, dtype="bfloat16"
    )

    def make(layout: str, precision: str = "nvfp4_linears") -> Path:
        target = root / f"{layout}_{precision}"
        if not target.exists() and layout == "twin":
            checkpoint_variants.write_twin(source, target, precision)
        elif not target.exists():
            checkpoint_variants.write_variant(source, target, layout, precision)
        return target

    return make


@pytest.fixture
def changed(variant: Callable[..., Path], tmp_path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a copy in `tmp_path`, which the test may change before it saves them."""
    for file in variant("mistral").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return load_file(tmp_path / FILE)


def make_plain(tensors: dict[str, torch.Tensor], module: str, weight: torch.Tensor) -> None:
    for name in [name for name in tensors if name.startswith(module + ".")]:
        del tensors[name]
    tensors[module + ".weight"] = weight.bfloat16()


def load(path: Path, precision: WeightFormat = NVFP4, **options: Any) -> AttentionWeights:
    config, reader = check_checkpoint(path), CheckpointReader(path)
    options = {"device": "cpu", "dtype": F32, **options}
    return load_attention_weights(reader, config, precision=precision, **options)


def make_rig(path: Path, precision: WeightFormat, **options: Any) -> ModelRig:
    return ModelRig(path, num_expert_shards=2, precision=precision, **options)


def logits(path: Path, precision: WeightFormat, **options: Any) -> torch.Tensor:
    return make_rig(path, precision, **options).logits_in_chunks(TOKENS, len(TOKENS))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ---- the model


@every_layout
@pytest.mark.parametrize("precision", ["nvfp4", "nvfp4_linears"])
def test_logits_are_those_of_the_dequantised_twin(
    variant: Callable[..., Path], layout: str, precision: str
) -> None:
    expected = logits(variant("twin", precision), PLAIN)
    assert relative(logits(variant(layout, precision), NVFP4), expected) < 1e-5
    assert torch.equal(logits(variant(layout, precision), PLAIN), expected)


def test_attention_in_nvfp4_changes_the_logits(variant: Callable[..., Path]) -> None:
    official, everywhere = (
        logits(variant("mistral", each), NVFP4) for each in ("nvfp4", "nvfp4_linears")
    )
    assert relative(everywhere, official) > 0.01


@pytest.mark.gpu
def test_a_gpu_gives_the_logits_of_the_reference(variant: Callable[..., Path]) -> None:
    expected = logits(variant("hf"), NVFP4, dtype=torch.bfloat16)
    found = logits(variant("hf"), NVFP4, device="cuda", dtype=torch.bfloat16)
    assert relative(found.cpu(), expected) < 0.05


@pytest.mark.gpu
def test_a_graph_gives_what_single_launches_give(variant: Callable[..., Path]) -> None:
    rig = make_rig(variant("hf"), NVFP4, device="cuda", dtype=torch.bfloat16)
    graphed = GraphedDecoder(rig.decoder, rig.exchange)
    graphed.capture(max_requests=4, max_context=256, num_pages=256)
    progress = [make_progress(str(i), TOKENS[: 20 + i]) for i in range(3)]
    logits_BV = rig.step([rig.entry(one, one.num_tokens) for one in progress])
    for one, token_id in zip(progress, logits_BV.argmax(dim=1).tolist(), strict=True):
        one.output_token_ids.append(token_id)
    entries = [rig.entry(one, 1) for one in progress]
    batches = build_batches(entries, page_size=rig.cache.page_size, num_micro_batches=1)
    expected_BV = rig.step(entries)
    (logits_BV,) = graphed.forward(batches, rig.exchange)
    assert graphed.seconds["graph"] > 0.0
    torch.testing.assert_close(logits_BV, expected_BV, rtol=2e-2, atol=2e-2)


# ---- values


@every_layout
def test_linear_layers_keep_codes_and_scales(variant: Callable[..., Path], layout: str) -> None:
    kept, plain = load(variant(layout)).layers[1], load(variant(layout), PLAIN).layers[1]
    for name in LINEARS:
        weight = getattr(kept, name)
        assert isinstance(weight, Nvfp4Weight), name
        torch.testing.assert_close(nvfp4_weight_values(weight), getattr(plain, name))


def test_kv_b_is_dequantised_for_absorption(variant: Callable[..., Path]) -> None:
    kept, plain = (load(variant("hf"), each).layers[1] for each in (NVFP4, PLAIN))
    assert torch.equal(kept.w_uk_HNC, plain.w_uk_HNC)
    assert torch.equal(kept.w_uv_HVC, plain.w_uv_HVC)


def test_gate_and_up_keep_global_scales_of_their_own(
    changed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    changed[_GATE + ".weight_global_scale"].fill_(3.0)
    changed[_UP + ".weight_global_scale"].fill_(5.0)
    save_file(changed, tmp_path / FILE)
    kept, plain = (load(tmp_path, each).layers[1].shared_gate_up for each in (NVFP4, PLAIN))
    gate_unit_F, up_unit_F = kept.unit_O.chunk(2)
    assert set(gate_unit_F.tolist()) == {torch.tensor(1 / 3).item()}
    assert set(up_unit_F.tolist()) == {torch.tensor(1 / 5).item()}
    torch.testing.assert_close(nvfp4_weight_values(kept), plain)


# ---- what is stored otherwise


def test_official_attention_stays_plain_and_the_shared_expert_nvfp4(
    variant: Callable[..., Path],
) -> None:
    layer = load(variant("mistral", "nvfp4")).layers[1]
    packed = {name for name in LINEARS if isinstance(getattr(layer, name), Nvfp4Weight)}
    assert packed == {"shared_gate_up", "shared_down"}


def test_gate_and_up_are_dequantised_where_one_of_them_is_plain(
    changed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    up = load(tmp_path, PLAIN).layers[1].shared_gate_up.chunk(2)[1]
    make_plain(changed, _UP, up)
    save_file(changed, tmp_path / FILE)
    kept, plain = (load(tmp_path, each).layers[1] for each in (NVFP4, PLAIN))
    assert torch.equal(kept.shared_gate_up, plain.shared_gate_up)
    assert isinstance(kept.shared_down, Nvfp4Weight)


@pytest.mark.parametrize(
    ("part", "value"),
    [("weight_scale", torch.nan), ("weight_global_scale", 0.0), ("weight_global_scale", torch.inf)],
)
def test_a_broken_scale_is_told_by_name(
    changed: dict[str, torch.Tensor], tmp_path: Path, part: str, value: float
) -> None:
    changed[f"{_UP}.{part}"].view(-1)[0] = value
    save_file(changed, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=rf"{_UP}.{part}: a scale must be finite"):
        load(tmp_path)


# ---- bytes


def tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    for leaf in tree:
        if isinstance(leaf, tuple):
            yield from tensors_of(leaf)
        elif isinstance(leaf, torch.Tensor):
            yield leaf


def assert_bytes_are_foretold(path: Path) -> int:
    """Those filled, those taken and those foretold are the same."""
    config, told = check_checkpoint(path), []
    attention = load(path, progress=told.append)
    taken = sum(tensor.nbytes for tensor in tensors_of(astuple(attention)))
    plain = stored_plain(match_tensors(CheckpointReader(path), config))
    assert sum(told) == taken == attention_bytes(config, F32, NVFP4, plain=plain)
    return taken


def test_bytes_filled_are_those_foretold_and_those_taken(
    variant: Callable[..., Path], changed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    everywhere = assert_bytes_are_foretold(variant("mistral"))
    assert everywhere == assert_bytes_are_foretold(variant("hf"))
    assert everywhere == attention_bytes(check_checkpoint(variant("hf")), F32, NVFP4)
    layer = load(variant("hf"), PLAIN).layers[1]
    make_plain(changed, _UP, layer.shared_gate_up.chunk(2)[1])
    make_plain(changed, _OUT, layer.o_proj)
    save_file(changed, tmp_path / FILE)
    mixed = assert_bytes_are_foretold(tmp_path)
    official = assert_bytes_are_foretold(variant("mistral", "nvfp4"))
    assert everywhere < mixed < official
