"""The shared expert as one more routed one: the same layer, bytes and counts as apart from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import checkpoint_variants
import checkpoints
import pytest
import torch
from model_rig import ModelRig, make_progress, relative_error

from ostro.actors.attention_shard import stacks_shared
from ostro.actors.fabric.local_exchange import LocalExchange
from ostro.actors.fabric.placement import Placement, initial_placement
from ostro.actors.model.batch import build_batches
from ostro.actors.model.checkpoint import CheckpointReader
from ostro.actors.model.cuda_graphs import GraphedDecoder
from ostro.actors.model.decoder import Decoder
from ostro.actors.model.experts import LocalExperts
from ostro.actors.model.weight_bytes import attention_bytes, expert_bytes
from ostro.actors.model.weights import (
    AttentionWeights,
    ExpertWeights,
    can_stack_shared,
    load_attention_weights,
    load_expert_weights,
)
from ostro.actors.rank import RankSpec
from ostro.configs.deployment import DeploymentConfig, Layout, LayoutConfig
from ostro.configs.model import load_model_config
from ostro.configs.quantization import WeightFormat
from ostro.kernels.grouped_gemm import mlp

PLAIN, FP8 = WeightFormat.PLAIN, WeightFormat.FP8
BF16, F32 = torch.bfloat16, torch.float32
NUM_EXPERTS = 8
TOKENS = [1, *range(100, 140)]

each_precision = pytest.mark.parametrize("precision", [PLAIN, FP8], ids=lambda each: each.value)
every_layout = pytest.mark.parametrize("layout", checkpoint_variants.LAYOUTS)


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
def directory(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def make(layout: str = "hf") -> Path:
        """An FP8 checkpoint, which may also be dequantised."""
        if layout not in made:
            target = tmp_path_factory.mktemp("variant") / layout
            made[layout] = checkpoint_variants.write_variant(source, target, layout, "fp8")
        return made[layout]

    return make


def load_stacked(
    path: Path, precision: WeightFormat, told: list[int], device: str = "cpu", dtype=BF16
) -> tuple[AttentionWeights, ExpertWeights]:
    config, reader = load_model_config(path), CheckpointReader(path)
    held = {"device": device, "dtype": dtype, "precision": precision, "progress": told.append}
    experts = load_expert_weights(reader, config, range(NUM_EXPERTS), num_extra=1, **held)
    return load_attention_weights(reader, config, shared_into=experts, **held), experts


def load_apart(path: Path, precision: WeightFormat, dtype=BF16) -> AttentionWeights:
    config, reader = load_model_config(path), CheckpointReader(path)
    return load_attention_weights(reader, config, device="cpu", dtype=dtype, precision=precision)


def stacked_rig(
    path: Path, precision: WeightFormat, device: str, dtype: torch.dtype
) -> tuple[ModelRig, LocalExperts]:
    """A rig whose shared experts stand among the routed ones."""
    rig = ModelRig(path, precision=precision, device=device, dtype=dtype)
    attention, experts = load_stacked(path, precision, [], device, dtype)
    rig.decoder = Decoder(rig.config, attention, rig.cache)
    local = LocalExperts(rig.config, experts)
    placement = initial_placement(NUM_EXPERTS, [0])
    rig.exchange = LocalExchange(local.forward, placement, device, has_shared=local.has_shared)
    return rig, local


# ---- the model


@each_precision
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_models_logits_are_those_of_a_shared_expert_apart(
    directory: Callable[..., Path], precision: WeightFormat, chunk: int
) -> None:
    rig, _ = stacked_rig(directory(), precision, "cpu", F32)
    found = rig.logits_in_chunks(TOKENS, chunk)
    expected = ModelRig(directory(), precision=precision).logits_in_chunks(TOKENS, chunk)
    assert relative_error(found, expected) < 1e-4


@each_precision
def test_a_layers_experts_add_up_with_the_shared_one(
    directory: Callable[..., Path], precision: WeightFormat
) -> None:
    config = load_model_config(directory())
    _, with_shared = load_stacked(directory(), precision, [], dtype=F32)
    stacked = LocalExperts(config, with_shared)
    reader = CheckpointReader(directory())
    routed = LocalExperts(
        config,
        load_expert_weights(
            reader, config, range(NUM_EXPERTS), device="cpu", dtype=F32, precision=precision
        ),
    )
    shared = load_apart(directory(), precision, F32).layers[1]
    assert shared.shared_gate_up is not None
    assert shared.shared_down is not None
    generator = torch.Generator().manual_seed(0)
    rows_RD = torch.randn(5, config.hidden_size, generator=generator)
    expert_RK = torch.rand(5, NUM_EXPERTS, generator=generator).argsort(1)[:, :4]
    weight_RK = torch.rand(5, 4, generator=generator)
    always_R1 = torch.full((5, 1), NUM_EXPERTS)
    found_RD = stacked.forward(
        1,
        rows_RD,
        torch.cat((expert_RK, always_R1), dim=1),
        torch.cat((weight_RK, torch.ones(5, 1)), dim=1),
    )
    expected_RD = routed.forward(1, rows_RD, expert_RK, weight_RK)
    expected_RD = expected_RD + mlp(rows_RD, shared.shared_gate_up, shared.shared_down)
    torch.testing.assert_close(found_RD, expected_RD, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@each_precision
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_gpu_gives_the_logits_of_a_shared_expert_apart(
    directory: Callable[..., Path], precision: WeightFormat, chunk: int
) -> None:
    rig, local = stacked_rig(directory(), precision, "cuda", BF16)
    found = rig.logits_in_chunks(TOKENS, chunk)
    apart = ModelRig(directory(), precision=precision, device="cuda", dtype=BF16)
    expected = apart.logits_in_chunks(TOKENS, chunk)
    assert float((found - expected).norm() / expected.norm()) < 0.1
    assert {sum(layer) for layer in local.take_counts()} == {4 * len(TOKENS)}


@pytest.mark.gpu
@each_precision
def test_a_graph_gives_what_single_launches_give(
    directory: Callable[..., Path], precision: WeightFormat
) -> None:
    rig, local = stacked_rig(directory(), precision, "cuda", BF16)
    graphed = GraphedDecoder(rig.decoder, rig.exchange)
    graphed.capture(max_requests=4, max_context=256, num_pages=256)
    progress = [make_progress(str(i), TOKENS[: 20 + i]) for i in range(3)]
    logits_BV = rig.step([rig.entry(one, one.num_tokens) for one in progress])
    for one, token_id in zip(progress, logits_BV.argmax(dim=1).tolist(), strict=True):
        one.output_token_ids.append(token_id)
    entries = [rig.entry(one, 1) for one in progress]
    batches = build_batches(entries, page_size=rig.cache.page_size, num_micro_batches=1)
    expected_BV = rig.step(entries)
    local.take_counts()
    (logits_BV,) = graphed.forward(batches, rig.exchange)  # of four requests, one of them padding
    assert graphed.seconds["graph"] > 0.0
    torch.testing.assert_close(logits_BV, expected_BV, rtol=2e-2, atol=2e-2)
    assert {sum(layer) for layer in local.take_counts()} == {4 * len(progress)}


# ---- weights


@every_layout
@each_precision
def test_the_last_slot_holds_the_shared_expert(
    directory: Callable[..., Path], precision: WeightFormat, layout: str
) -> None:
    apart = load_apart(directory(layout), precision)
    attention, experts = load_stacked(directory(layout), precision, [])
    for layer, stack, own in zip(attention.layers, experts.layers, apart.layers, strict=True):
        assert layer.shared_gate_up is None
        assert layer.shared_down is None
        shared = own.shared_gate_up, own.shared_down
        found = [tensor[-1] for tensor in astuple(stack)]
        if precision is FP8:
            shared = [each for weight in shared for each in astuple(weight)]
        for one, other in zip(found, shared, strict=True):
            assert torch.equal(one.float(), other.float())


@every_layout
@each_precision
def test_routed_experts_stand_where_they_stand_without_it(
    directory: Callable[..., Path], precision: WeightFormat, layout: str
) -> None:
    config, reader = load_model_config(directory(layout)), CheckpointReader(directory(layout))
    expected = load_expert_weights(
        reader, config, range(NUM_EXPERTS), device="cpu", dtype=BF16, precision=precision
    )
    _, found = load_stacked(directory(layout), precision, [])
    for stack, other in zip(found.layers, expected.layers, strict=True):
        for with_shared, without in zip(astuple(stack), astuple(other), strict=True):
            assert torch.equal(with_shared[:-1].float(), without.float())


@every_layout
@each_precision
def test_bytes_are_those_of_a_shared_expert_apart(
    directory: Callable[..., Path], precision: WeightFormat, layout: str
) -> None:
    config, told = load_model_config(directory(layout)), []
    attention, experts = load_stacked(directory(layout), precision, told)
    planned = attention_bytes(config, BF16, precision)
    planned += expert_bytes(config, NUM_EXPERTS, BF16, precision)
    tensors = [attention.embed_VD, attention.final_norm_D, attention.lm_head_VD]
    for layer in (*attention.layers, *experts.layers):
        for found in astuple(layer):
            if found is not None:
                tensors += found if isinstance(found, tuple) else (found,)
    assert sum(told) == sum(tensor.nbytes for tensor in tensors) == planned


def test_a_stack_without_a_slot_to_spare_is_refused(directory: Callable[..., Path]) -> None:
    config, reader = load_model_config(directory()), CheckpointReader(directory())
    full = load_expert_weights(reader, config, [0, 1], device="cpu", dtype=BF16)
    with pytest.raises(ValueError, match="num_extra=1"):
        load_attention_weights(reader, config, device="cpu", dtype=BF16, shared_into=full)


def test_shared_and_routed_experts_of_different_formats_do_not_mix(
    directory: Callable[..., Path],
) -> None:
    config, reader = load_model_config(directory()), CheckpointReader(directory())
    held = {"device": "cpu", "dtype": BF16}
    plain = load_expert_weights(reader, config, [0], num_extra=1, **held)
    narrow = load_expert_weights(reader, config, [0], num_extra=1, precision=FP8, **held)
    with pytest.raises(TypeError, match="routed ones are not"):
        load_attention_weights(reader, config, precision=FP8, shared_into=plain, **held)
    with pytest.raises(TypeError, match="the shared one is not"):
        load_attention_weights(reader, config, shared_into=narrow, **held)


# ---- where


@every_layout
@each_precision
def test_a_shared_expert_of_a_routed_ones_shape_and_format_can_be_stacked(
    directory: Callable[..., Path], precision: WeightFormat, layout: str
) -> None:
    config, reader = load_model_config(directory(layout)), CheckpointReader(directory(layout))
    assert can_stack_shared(reader, config, precision)


def test_two_shared_experts_are_wider_than_a_routed_one(tmp_path: Path) -> None:
    path = checkpoints.make_tiny_checkpoint(tmp_path, num_layers=1, num_shared_experts=2)
    assert not can_stack_shared(CheckpointReader(path), load_model_config(path))


def test_experts_stored_plain_beside_an_fp8_shared_one_are_not_stacked(source: Path) -> None:
    assert not can_stack_shared(CheckpointReader(source), load_model_config(source), FP8)


def test_counts_leave_the_shared_expert_out(directory: Callable[..., Path]) -> None:
    rig, local = stacked_rig(directory(), PLAIN, "cpu", F32)
    rig.logits_in_chunks(TOKENS, 1000)
    counts_LE = local.take_counts()
    assert [len(counts) for counts in counts_LE] == [NUM_EXPERTS] * 2
    assert [sum(counts) for counts in counts_LE] == [4 * len(TOKENS)] * 2


def test_an_exchange_refuses_a_shared_expert_behind_experts_in_other_slots() -> None:
    placement = Placement(0, (1, 0), (0, 0))
    LocalExchange(_no_experts, placement)
    with pytest.raises(ValueError, match="needs expert i in slot i"):
        LocalExchange(_no_experts, placement, has_shared=True)


def _no_experts(*_: object) -> torch.Tensor:
    raise AssertionError


@pytest.mark.parametrize(
    ("device", "layout", "slots", "stacks"),
    [
        ("cuda", Layout.SINGLE, (0, 1, 2, 3, 4, 5, 6, 7), True),
        ("cuda", Layout.SINGLE, (1, 0, 2, 3, 4, 5, 6, 7), False),
        ("cuda", Layout.COLOCATED, (0, 1, 2, 3, 4, 5, 6, 7), False),
        ("cpu", Layout.SINGLE, (0, 1, 2, 3, 4, 5, 6, 7), False),
    ],
)
def test_a_shard_stacks_where_it_is_alone_on_a_gpu(
    source: Path, device: str, layout: Layout, slots: tuple[int, ...], stacks: bool
) -> None:
    shards = LayoutConfig(layout=layout, num_attention_shards=1, num_expert_shards=1)
    spec = RankSpec(
        rank=0,
        model_dir=str(source),
        deployment=DeploymentConfig(model=str(source), layout=shards),
        placement=Placement(0, slots, (0,) * NUM_EXPERTS),
        device=device,
        dtype="bfloat16",
    )
    assert stacks_shared(spec, load_model_config(source)) is stacks
