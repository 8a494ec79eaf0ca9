"""What fits where: the real model's published numbers, and the shards' own arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ostro.actors.attention_shard import num_pages
from ostro.actors.fabric.placement import initial_placement
from ostro.actors.model.draft_head import DraftHead
from ostro.actors.model.native_names import HEAD_SCHEME
from ostro.actors.model.weight_bytes import attention_bytes, expert_bytes
from ostro.actors.rank import RankSpec
from ostro.cluster.deployment_plan import Machine, Memory, plan_deployment
from ostro.cluster.weight_plan import plan_weights
from ostro.configs.deployment import DeploymentConfig, EngineConfig, Layout, LayoutConfig
from ostro.configs.errors import ConfigError
from ostro.configs.load import load_deployment
from ostro.configs.model import ModelConfig, RopeConfig
from ostro.configs.quantization import Quantization, WeightFormat

KIB, MIB, GIB = 2**10, 2**20, 2**30

SMALL_4 = ModelConfig(
    architecture="Mistral3ForConditionalGeneration",
    num_layers=36,
    hidden_size=4096,
    num_heads=32,
    q_lora_rank=1024,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=128,
    num_experts=128,
    num_experts_per_token=4,
    expert_hidden_size=2048,
    num_shared_experts=1,
    vocab_size=131072,
    rms_norm_eps=1e-6,
    max_context=1_048_576,
    rope=RopeConfig(kind="yarn", theta=10000.0, factor=128.0, original_max_positions=8192),
    llama4_beta=0.1,
    llama4_original_max_positions=8192,
    routed_scaling_factor=1.0,
    norm_topk_prob=True,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
    pad_token_id=11,
    vision=None,
    dtype="bfloat16",
)
SMALL_4_FP8 = replace(
    SMALL_4, quantization=Quantization(weight_format=WeightFormat.FP8, has_input_scales=True)
)
SMALL_4_NVFP4 = replace(
    SMALL_4, quantization=Quantization(weight_format=WeightFormat.NVFP4, has_input_scales=True)
)
# What the official NVFP4 checkpoint leaves plain.
PLAIN_ATTENTION = frozenset(
    (name, layer) for name in ("q_a", "q_b", "kv_a", "kv_b", "o_proj") for layer in range(36)
)
TINY = replace(
    SMALL_4,
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=32,
    num_experts=16,
    expert_hidden_size=32,
    vocab_size=1024,
    max_context=4096,
)


def machine(*gpus_gib: float, host_gib: float = 64, free_gib: float | None = None) -> Machine:
    return Machine(
        host=Memory(total_bytes=int(host_gib * GIB), free_bytes=int(host_gib * GIB)),
        num_cores=8,
        gpus=tuple(
            Memory(total_bytes=int(size * GIB), free_bytes=int((free_gib or size) * GIB))
            for size in gpus_gib
        ),
        gpu_name="GPU",
    )


def plan(preset: str, where: Machine, *overrides: str, config: ModelConfig = SMALL_4, **options):
    deployment = load_deployment(preset, overrides)
    return plan_deployment(
        deployment, config, where, device="cuda", dtype=torch.bfloat16, **options
    )


def split(num_attention: int, num_expert: int, **fields) -> LayoutConfig:
    return LayoutConfig(
        layout=Layout.SPLIT,
        num_attention_shards=num_attention,
        num_expert_shards=num_expert,
        device="cpu",
        **fields,
    )


def plan_on_cpu(
    layout: LayoutConfig, where: Machine, engine: EngineConfig | None = None, **options
):
    deployment = DeploymentConfig(model="m", layout=layout, engine=engine or EngineConfig())
    return plan_deployment(deployment, TINY, where, device="cpu", dtype=torch.float32, **options)


# ---- the real model's numbers


def test_plan_puts_108_gib_of_experts_on_each_of_two_expert_ranks():
    ranks = plan("2xh200", machine(140, 140)).ranks
    own_bytes = attention_bytes(SMALL_4, torch.bfloat16)
    assert [rank.weight_bytes - own_bytes for rank in ranks] == [108 * GIB, 108 * GIB]


def test_plan_gives_an_attention_rank_all_but_the_routed_experts():
    num_values = 118_972_826_624 - 36 * 3_221_225_472
    gate_bytes = 36 * 524_288 * 2  # the gate is held in float32
    assert plan("4xh100", machine()).ranks[0].weight_bytes == num_values * 2 + gate_bytes


@pytest.mark.parametrize(("preset", "per_rank"), [("4xh100", [43, 43, 42]), ("8xh200_split", [24])])
def test_plan_spreads_experts_of_48_mib_a_layer(preset, per_rank):
    experts = [rank for rank in plan(preset, machine()).ranks if rank.role == "expert"]
    expected = per_rank * (len(experts) // len(per_rank))
    assert [rank.num_experts for rank in experts] == expected
    assert [rank.weight_bytes for rank in experts] == [36 * n * 48 * MIB for n in expected]


def test_plan_caches_a_token_in_22_5_kib():
    rank = plan("1xh200", machine()).ranks[0]
    assert rank.page_bytes / rank.page_size == 22.5 * KIB


def test_plan_of_two_h200_leaves_the_cache_what_gpu_memory_fraction_allows():
    rank = plan("2xh200", machine(140, 140)).ranks[0]
    room = 140 * GIB * 0.92 - rank.weight_bytes
    assert room - rank.page_bytes < rank.cache_bytes() <= room
    assert rank.num_cached_tokens() == rank.num_pages * 64


@pytest.mark.parametrize(
    ("preset", "gpus"),
    [
        ("2xh200", [140] * 2),
        ("4xh100", [79.6] * 4),
        ("8xh200_split", [140] * 8),
        ("multinode", [79.6] * 16),
    ],
)
def test_plan_of_a_preset_fits_the_gpus_it_is_made_for(preset, gpus):
    assert plan(preset, machine(*gpus)).problems == ()


# ---- quantised checkpoints


def test_plan_holds_fp8_experts_in_54_gib_on_each_of_two_expert_ranks():
    result = plan("2xh200", machine(140, 140), config=SMALL_4_FP8)
    own_bytes = attention_bytes(SMALL_4, torch.bfloat16, WeightFormat.FP8)
    scale_bytes = 36 * 64 * 16  # four float32 for an expert
    assert [rank.weight_bytes - own_bytes for rank in result.ranks] == [54 * GIB + scale_bytes] * 2
    assert result.precision is WeightFormat.FP8


def test_plan_puts_the_whole_fp8_model_on_one_h200():
    result = plan("1xh200", machine(140), config=SMALL_4_FP8)
    assert result.problems == ()
    # Everything in FP8 but embeddings, head, kv_b, norms and the float32 gate.
    assert 111.7 < result.ranks[0].weight_bytes / GIB < 112.1


def test_plan_puts_the_whole_nvfp4_model_on_one_h200():
    result = plan("1xh200", machine(140), config=SMALL_4_NVFP4, plain=PLAIN_ATTENTION)
    assert result.problems == result.notes == ()
    assert result.precision is WeightFormat.NVFP4
    # The official file: 70.8 GB, of which 0.8 GB are the vision tower, which this config lacks.
    assert 69.9e9 < result.ranks[0].weight_bytes < 70.1e9


def test_plan_puts_the_whole_nvfp4_model_on_two_h100():
    result = plan("2xh200", machine(80, 80), config=SMALL_4_NVFP4, plain=PLAIN_ATTENTION)
    assert result.problems == ()
    # Experts in halves; attention, in bf16, and shared experts on each.
    assert [round(rank.weight_bytes / GIB, 1) for rank in result.ranks] == [34.8, 34.8]


def test_plan_counts_nvfp4_linear_layers_as_they_are_held():
    bf16, nvfp4 = torch.bfloat16, WeightFormat.NVFP4
    official = attention_bytes(SMALL_4, bf16, nvfp4, plain=PLAIN_ATTENTION)
    values, outputs = 3 * 2048 * 4096, 2 * 2048 + 4096
    shared = values * 9 // 16 + outputs * 4
    assert attention_bytes(SMALL_4, bf16) - official == 36 * (values * 2 - shared)
    everywhere = attention_bytes(SMALL_4, bf16, nvfp4)
    values = 4096 * 1024 + 1024 * 32 * 128 + 4096 * 320 + 32 * 128 * 4096  # kv_b is not among them
    outputs = 1024 + 32 * 128 + 320 + 4096
    assert official - everywhere == 36 * (values * 2 - values * 9 // 16 - outputs * 4)


def test_plan_counts_a_stacked_nvfp4_shared_expert_as_a_routed_one():
    bf16, nvfp4 = torch.bfloat16, WeightFormat.NVFP4
    options = {"stacks_shared": True, "plain": PLAIN_ATTENTION}
    stacked = attention_bytes(SMALL_4, bf16, nvfp4, **options)
    apart = attention_bytes(SMALL_4, bf16, nvfp4, plain=PLAIN_ATTENTION)
    assert apart - stacked == 36 * 4 * (2 * 2048 + 4096 - 3)  # a unit an output, or a matrix
    routed = expert_bytes(SMALL_4, 128, bf16, nvfp4)
    (rank,) = plan("1xh200", machine(140), config=SMALL_4_NVFP4, plain=PLAIN_ATTENTION).ranks
    assert rank.weight_bytes == stacked + routed


def test_plan_counts_what_a_checkpoint_leaves_plain_in_bf16():
    attention = ("q_a", "q_b", "kv_a", "o_proj")
    plain = frozenset((name, layer) for name in attention for layer in range(36))
    official, mixed = (
        plan("1xh200", machine(140), config=SMALL_4_FP8, plain=each).ranks[0].weight_bytes
        for each in (frozenset(), plain)
    )
    values = 4096 * 1024 + 1024 * 32 * 128 + 4096 * 320 + 32 * 128 * 4096
    assert mixed - official == 36 * (values - len(attention) * 2 * 4)
    names = ("q_a", "q_b", "kv_a", "o_proj", "shared_up", "shared_down", "expert_up")
    most = frozenset((name, layer) for name in names for layer in range(36))
    result = plan("1xh200", machine(140), config=SMALL_4_NVFP4, plain=most)
    assert result.ranks == plan("1xh200", machine(140)).ranks
    assert not result.fits()


def test_plan_counts_dequantised_weights_where_there_are_no_kernels():
    dynamic = Quantization(weight_format=WeightFormat.FP8, has_input_scales=False)
    result = plan("2xh200", machine(140, 140), config=replace(SMALL_4, quantization=dynamic))
    assert result.precision is WeightFormat.PLAIN
    assert result.ranks == plan("2xh200", machine(140, 140)).ranks
    assert any("dequantised to bfloat16 on the GPU" in note for note in result.notes)


def test_plan_on_cpu_dequantises_fp8():
    result = plan_deployment(
        load_deployment("laptop"), SMALL_4_FP8, machine(), device="cpu", dtype=torch.bfloat16
    )
    assert result.precision is WeightFormat.PLAIN
    assert not any("dequantised" in note for note in result.notes)


# ---- what does not fit, and the way out


def test_plan_names_the_shards_that_would_fit_when_one_gpu_is_too_small():
    (problem,) = plan("1xh200", machine(140)).problems
    assert problem.startswith("rank 0 (attention+expert) must hold 222 GiB and may fill 129 GiB")
    assert "layout=colocated with num_attention_shards=2 and num_expert_shards=2 fits" in problem


def test_plan_names_ranks_alike_together_and_the_number_of_expert_shards_that_fits():
    problems = plan("4xh100", machine(*[60] * 4)).problems
    assert [problem.split(" (")[0] for problem in problems] == ["ranks 1, 2", "rank 3"]
    assert all("num_expert_shards=4 fits" in problem for problem in problems)
    fixed = plan("4xh100", machine(*[60] * 5), "layout.num_expert_shards=4")
    assert fixed.problems == ()


def test_plan_counts_what_others_hold_on_a_gpu():
    assert plan("2xh200", machine(140, 140, free_gib=120)).problems


def test_plan_says_how_many_pages_fit_when_too_many_are_asked_for():
    where = machine(140, 140)
    (problem,) = plan("2xh200", where, "engine.num_pages=100000").problems
    most = int(problem.split("set engine.num_pages to ")[1].split()[0])
    assert plan("2xh200", where, f"engine.num_pages={most}").fits()
    assert not plan("2xh200", where, f"engine.num_pages={most + 1}").fits()


def test_plan_asks_for_larger_gpus_when_not_even_attention_fits():
    problems = plan("4xh100", machine(4, 80, 80, 80)).problems
    assert "take larger GPUs" in problems[0]


def test_plan_misses_gpus_and_tells_how_large_they_must_be():
    result = plan("2xh200", machine())
    assert "2 ranks with a GPU each and this machine has 0" in result.problems[0]
    assert result.ranks[0].num_pages is None
    assert any("GPUs of at least 130 GiB" in note for note in result.notes)


def test_plan_does_not_miss_gpus_that_other_nodes_may_have():
    result = plan("multinode", machine(*[79.6] * 8), has_other_nodes=True)
    assert result.fits()
    assert any("other nodes" in note for note in result.notes)


def test_plan_notes_a_cache_smaller_than_the_context():
    result = plan("2xh200", machine(140, 140), "engine.num_pages=100")
    assert any("holds 6400 tokens" in note for note in result.notes)


def test_plan_refuses_more_expert_ranks_than_experts():
    layout = split(1, 17)
    with pytest.raises(ConfigError, match="leave a rank without experts"):
        plan_on_cpu(layout, machine())


def test_plan_holds_five_thirds_of_the_tokens_in_fp8():
    plain, fp8 = (
        plan("1xh200", machine(140), f"engine.latent_cache_dtype={dtype}", config=SMALL_4_FP8)
        for dtype in ("auto", "fp8")
    )
    plain, fp8 = plain.ranks[0], fp8.ranks[0]
    assert (plain.page_bytes, fp8.page_bytes) == (64 * 22.5 * KIB, 64 * 13.5 * KIB)
    assert fp8.num_cached_tokens() / plain.num_cached_tokens() == pytest.approx(5 / 3, rel=1e-3)
    assert fp8.weight_bytes == plain.weight_bytes


# ---- CPU


def test_plan_on_cpu_notes_that_an_fp8_cache_saves_memory_alone():
    notes = plan_on_cpu(split(1, 2), machine(), EngineConfig(latent_cache_dtype="fp8")).notes
    assert any("latent_cache_dtype=fp8 saves memory alone" in note for note in notes)


def test_plan_refuses_an_fp8_cache_of_latents_that_do_not_fill_its_rows():
    deployment = DeploymentConfig(
        model="m", layout=split(1, 2), engine=EngineConfig(latent_cache_dtype="fp8")
    )
    config = replace(TINY, kv_lora_rank=33)
    with pytest.raises(ConfigError, match=r"latent_cache_dtype='fp8'.*kv_lora_rank=33.*'auto'"):
        plan_deployment(deployment, config, machine(), device="cpu", dtype=torch.float32)


def test_plan_on_cpu_adds_up_all_ranks_of_the_machine():
    assert plan_on_cpu(split(1, 2), machine(host_gib=4)).fits()
    (problem,) = plan_on_cpu(split(2, 2), machine(host_gib=2.5)).problems
    assert "lower engine.num_pages or engine.cache_memory_bytes" in problem


def test_plan_on_cpu_notes_ranks_that_share_cores():
    notes = plan_on_cpu(split(1, 2), replace(machine(), num_cores=2)).notes
    assert any("3 ranks share 2 cores" in note for note in notes)


@pytest.mark.parametrize(
    "engine",
    [
        EngineConfig(),
        EngineConfig(num_pages=77),
        EngineConfig(cache_memory_bytes=3 * MIB),
        EngineConfig(cache_memory_bytes=3 * MIB, latent_cache_dtype="fp8"),
        EngineConfig(max_running_requests=2, max_context=100),
    ],
    ids=["default", "pages", "bytes", "fp8", "few requests"],
)
def test_plan_gives_as_many_pages_as_an_attention_shard_takes(engine):
    layout = split(1, 2)
    deployment = DeploymentConfig(model="m", layout=layout, engine=engine)
    spec = RankSpec(
        rank=0,
        model_dir="m",
        deployment=deployment,
        placement=initial_placement(16, [1, 2]),
        device="cpu",
        dtype="float32",
    )
    planned = plan_on_cpu(layout, machine(), engine).ranks[0].num_pages
    assert planned == num_pages(spec, TINY)
    head = replace(HEAD, config=replace(TINY, num_experts=0, quantization=None))
    with_head = plan_on_cpu(layout, machine(), engine, head=head).ranks[0].num_pages
    assert with_head == num_pages(spec, TINY, head)
    assert with_head <= planned


@pytest.mark.parametrize("config", [SMALL_4, SMALL_4_FP8], ids=["bf16", "fp8"])
def test_plan_weights_are_those_of_the_plan(config):
    deployment = load_deployment("8xh200_split")
    weights = plan_weights(deployment, config, device="cuda", dtype=torch.bfloat16)
    ranks = plan("8xh200_split", machine(), config=config).ranks
    assert weights == {rank.rank: rank.weight_bytes for rank in ranks}


# ---- a draft head

HEAD = DraftHead(
    directory=Path("head"),
    config=replace(
        SMALL_4,
        num_layers=2,
        num_experts=0,
        num_experts_per_token=0,
        expert_hidden_size=12288,
        vision=None,
        quantization=Quantization(weight_format=WeightFormat.FP8, has_input_scales=True),
    ),
    plain=frozenset(),
)


def test_a_head_has_as_many_values_as_the_official_one():
    shapes = [tensor.shape for tensor in HEAD_SCHEME.expected(HEAD.config).values()]
    assert sum(map(math.prod, shapes)) == 391_666_176


def test_every_attention_shard_holds_the_head_and_its_latents():
    without = plan("8xh200_split", machine(*[141] * 8))
    drafting = plan("8xh200_split", machine(*[141] * 8), head=HEAD)
    head_bytes = HEAD.num_bytes(torch.bfloat16, WeightFormat.FP8)
    assert head_bytes == pytest.approx(392e6, rel=0.02)
    for before, after in zip(without.ranks, drafting.ranks, strict=True):
        if before.role == "expert":
            assert after.need_bytes() == before.need_bytes()
            continue
        assert after.weight_bytes == before.weight_bytes + head_bytes
        per_token = [rank.page_bytes / rank.page_size / KIB for rank in (before, after)]
        assert per_token == [22.5, 22.5 + 1.25]


def test_weights_of_a_plan_count_the_head():
    deployment = load_deployment("8xh200_split")
    weights = plan_weights(deployment, SMALL_4, device="cuda", dtype=torch.bfloat16, head=HEAD)
    ranks = plan("8xh200_split", machine(), head=HEAD).ranks
    assert weights == {rank.rank: rank.weight_bytes for rank in ranks}
