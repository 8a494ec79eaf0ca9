"""What fits where: the bytes of every rank of a deployment against the memory there is. Pure.

The same arithmetic as the shards' own (tests hold the two together), so that a deployment can be
judged before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ostro.actors.model.device import choose_cache_dtype, choose_precision
from ostro.actors.model.draft_head import DraftHead
from ostro.actors.model.latent_cache import cache_page_bytes
from ostro.actors.model.stored_weights import StoredPlain
from ostro.actors.model.weight_bytes import expert_bytes
from ostro.cluster.human_numbers import format_bytes
from ostro.cluster.weight_plan import draft_head_bytes, experts_by_rank, rank_weight_bytes
from ostro.configs.deployment import DeploymentConfig, EngineConfig, Layout, LayoutConfig
from ostro.configs.model import ModelConfig
from ostro.configs.quantization import WeightFormat
from ostro.kernels.latent_cache import FP8_ROWS

_DEFAULT_CPU_CACHE_BYTES = 512 * 2**20
_PROCESS_BYTES = 256 * 2**20  # interpreter, torch and Ray in one CPU process, beside its weights
_SIDE_PROCESSES = 3  # router, ingress, Ray's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Memory of one device; `free_bytes` is what nobody uses now."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What one machine has."""

    host: Memory
    num_cores: int
    gpus: tuple[Memory, ...] = ()
    gpu_name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """What one rank holds.

    Attributes:
        role: "attention", "expert" or "attention+expert".
        num_experts: Routed experts it holds in every layer, copies included.
        num_pages: Pages of its latent cache: 0 without the attention role, None if they depend on
            a GPU that is not here.
        page_bytes: Bytes of one page over all layers, those of a draft head included.
        budget_bytes: What weights and cache may fill on its GPU; None on CPU or if not known.
    """

    rank: int
    role: str
    num_experts: int
    weight_bytes: int
    num_pages: int | None
    page_size: int
    page_bytes: int
    budget_bytes: int | None

    def num_cached_tokens(self) -> int | None:
        """Tokens that its latent cache holds; None if not known."""
        return None if self.num_pages is None else self.num_pages * self.page_size

    def cache_bytes(self) -> int:
        """Bytes of its latent cache, at least one page where the rest is not known."""
        return self.page_bytes * (1 if self.num_pages is None else self.num_pages)

    def need_bytes(self) -> int:
        """Weights and cache."""
        return self.weight_bytes + self.cache_bytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentPlan:
    """What every rank holds, and what stands against it.

    Attributes:
        dtype: What activations, and weights that are not in `precision`, are held in.
        cache_dtype: What latents are held in; `FP8_ROWS` or `dtype`.
        precision: What quantised weights are multiplied in; PLAIN if in `dtype`.
        problems: Why it cannot run, each with its way out; empty if it fits.
        notes: What it runs with all the same.
    """

    device: str
    dtype: torch.dtype
    cache_dtype: torch.dtype
    precision: WeightFormat
    ranks: tuple[RankPlan, ...]
    max_context: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def fits(self) -> bool:
        """Whether nothing stands against it."""
        return not self.problems


def plan_deployment(
    deployment: DeploymentConfig,
    config: ModelConfig,
    machine: Machine,
    *,
    device: str,
    dtype: torch.dtype,
    has_other_nodes: bool = False,
    plain: StoredPlain = frozenset(),
    head: DraftHead | None = None,
) -> DeploymentPlan:
    """Lay a model out over the ranks of a deployment and hold it against a machine.

    Args:
        deployment: What is to run.
        config: The model.
        machine: Where; GPU r is rank r's.
        device: "cpu" or "cuda".
        dtype: What the cache is held in, if not in FP8, and weights that are not multiplied as they
            are stored.
        has_other_nodes: Ranks may live on machines that are not looked at.
        plain: What the checkpoint leaves plain of what may be quantised; by default nothing.
        head: What drafts tokens, if a head does.

    Raises:
        ConfigError: The model's experts cannot be spread over the layout's ranks, or its latents
            not be held in FP8.
    """
    max_context = min(config.max_context, deployment.engine.max_context or config.max_context)
    precision = choose_precision(device, config)
    cache_dtype = choose_cache_dtype(deployment.engine, dtype, config)
    planner = _Planner(
        deployment, config, machine, device, dtype, cache_dtype, precision, plain, max_context, head
    )
    ranks = tuple(planner.rank(rank) for rank in range(deployment.layout.world_size()))
    problems: list[str] = []
    if not has_other_nodes:
        problems += planner.machine_problems(ranks)
    problems += planner.gpu_problems(ranks)
    return DeploymentPlan(
        device=device,
        dtype=dtype,
        cache_dtype=cache_dtype,
        precision=precision,
        ranks=ranks,
        max_context=max_context,
        problems=tuple(problems),
        notes=tuple(planner.notes(ranks, has_other_nodes=has_other_nodes)),
    )


@dataclass(frozen=True, slots=True)
class _Planner:
    """The arithmetic of one deployment on one machine."""

    deployment: DeploymentConfig
    config: ModelConfig
    machine: Machine
    device: str
    dtype: torch.dtype
    cache_dtype: torch.dtype
    precision: WeightFormat
    plain: StoredPlain
    max_context: int
    head: DraftHead | None

    def rank(self, rank: int) -> RankPlan:
        layout, engine = self.deployment.layout, self.deployment.engine
        num_experts = experts_by_rank(layout, self.config).get(rank, 0)
        weight_bytes = rank_weight_bytes(
            layout, self.config, self.dtype, self.precision, self.plain, rank, num_experts
        )
        budget_bytes = self._budget_bytes(rank)
        is_attention = rank in layout.attention_ranks()
        if is_attention:
            weight_bytes += draft_head_bytes(self.head, self.device, self.dtype)
        cached = [self.config, *([self.head.config] if self.head else [])]
        page_bytes = sum(
            cache_page_bytes(config, engine.page_size, self.cache_dtype) for config in cached
        )
        cache_bytes = self._cache_bytes(weight_bytes, budget_bytes)
        return RankPlan(
            rank=rank,
            role=_role(layout, rank),
            num_experts=num_experts,
            weight_bytes=weight_bytes,
            num_pages=self._num_pages(cache_bytes, page_bytes) if is_attention else 0,
            page_size=engine.page_size,
            page_bytes=page_bytes,
            budget_bytes=budget_bytes,
        )

    def machine_problems(self, ranks: Sequence[RankPlan]) -> list[str]:
        """What the machine as a whole lacks, if all ranks are to live on it."""
        if self.device == "cuda":
            have = len(self.machine.gpus)
            if have >= len(ranks):
                return []
            return [
                f"the layout has {len(ranks)} ranks with a GPU each and this machine has {have}: "
                f"join nodes to a Ray cluster and set RAY_ADDRESS, choose a smaller layout, or "
                f"set layout.device=cpu"
            ]
        need_bytes = sum(rank.need_bytes() for rank in ranks)
        need_bytes += (len(ranks) + _SIDE_PROCESSES) * _PROCESS_BYTES
        free_bytes = self.machine.host.free_bytes
        if need_bytes <= free_bytes:
            return []
        return [
            f"all ranks together need {format_bytes(need_bytes)} and {format_bytes(free_bytes)} of "
            f"this machine's memory are free: {self._way_out_on_host(ranks, free_bytes)}"
        ]

    def gpu_problems(self, ranks: Sequence[RankPlan]) -> list[str]:
        """Ranks that do not fit on their GPU; those alike are named together."""
        too_big: dict[tuple[str, int, int], list[int]] = {}
        for rank in ranks:
            if rank.budget_bytes is not None and rank.need_bytes() > rank.budget_bytes:
                key = (rank.role, rank.need_bytes(), rank.budget_bytes)
                too_big.setdefault(key, []).append(rank.rank)
        return [
            f"{_name_ranks(members)} ({role}) must hold {format_bytes(need_bytes)} and may fill "
            f"{format_bytes(max(budget_bytes, 0))} of the GPU "
            f"(gpu_memory_fraction={self.deployment.engine.gpu_memory_fraction:g}): "
            f"{self._way_out_on_gpu(ranks[members[0]])}"
            for (role, need_bytes, budget_bytes), members in too_big.items()
        ]

    def notes(self, ranks: Sequence[RankPlan], *, has_other_nodes: bool) -> list[str]:
        notes = []
        if has_other_nodes:
            notes.append("RAY_ADDRESS is set: the memory of other nodes was not looked at")
        tokens = ranks[0].num_cached_tokens()
        if tokens is not None and tokens < self.max_context:
            notes.append(
                f"the latent cache of an attention shard holds {tokens} tokens, fewer than the "
                f"context of {self.max_context}: longer requests fail; give it more memory or set "
                f"engine.max_context={tokens}"
            )
        if self.device == "cuda" and self._is_dequantized():
            notes.append(
                f"the checkpoint's quantised weights are dequantised to "
                f"{str(self.dtype).removeprefix('torch.')} on the GPU and take that memory: only "
                f"nvfp4, and fp8 with scales for inputs, are multiplied as they are stored"
            )
        if self.device == "cpu" and self.cache_dtype == FP8_ROWS:
            notes.append(
                "latent_cache_dtype=fp8 saves memory alone on CPU: every step converts the pages "
                "that it reads, and attention takes many times as long"
            )
        if self.device == "cuda" and any(rank.num_pages is None for rank in ranks):
            notes.append(
                f"GPUs of at least {format_bytes(self._least_gpu_bytes(ranks))} are needed"
            )
        if self.device == "cpu" and not has_other_nodes and len(ranks) > self.machine.num_cores:
            notes.append(
                f"{len(ranks)} ranks share {self.machine.num_cores} cores: "
                f"preset laptop_single is faster on this machine"
            )
        return notes

    def _is_dequantized(self) -> bool:
        return self.config.quantization is not None and self.precision is WeightFormat.PLAIN

    def _budget_bytes(self, rank: int) -> int | None:
        gpus = self.machine.gpus
        if self.device != "cuda" or not gpus:
            return None
        gpu = gpus[rank] if rank < len(gpus) else min(gpus, key=lambda gpu: gpu.free_bytes)
        kept_free = int(gpu.total_bytes * (1.0 - self.deployment.engine.gpu_memory_fraction))
        return gpu.free_bytes - kept_free

    def _cache_bytes(self, weight_bytes: int, budget_bytes: int | None) -> int | None:
        engine = self.deployment.engine
        if engine.cache_memory_bytes is not None:
            return engine.cache_memory_bytes
        if self.device == "cpu":
            return _DEFAULT_CPU_CACHE_BYTES
        return None if budget_bytes is None else budget_bytes - weight_bytes

    def _num_pages(self, cache_bytes: int | None, page_bytes: int) -> int | None:
        engine = self.deployment.engine
        if engine.num_pages is not None:
            return engine.num_pages
        if cache_bytes is None:
            return None
        return max(1, min(cache_bytes // page_bytes, _useful_pages(engine, self.max_context)))

    def _least_gpu_bytes(self, ranks: Sequence[RankPlan]) -> int:
        """The smallest GPU that takes the largest rank, with cache for one longest request."""
        engine = self.deployment.engine
        longest = -(-self.max_context // engine.page_size)
        needs = (
            rank.weight_bytes + (longest * rank.page_bytes if rank.num_pages != 0 else 0)
            for rank in ranks
        )
        return int(max(needs) / engine.gpu_memory_fraction)

    def _way_out_on_gpu(self, rank: RankPlan) -> str:
        budget_bytes = rank.budget_bytes or 0
        if rank.weight_bytes + rank.page_bytes <= budget_bytes:
            return f"set engine.num_pages to {self._most_pages(rank)} at most"
        layout = self.deployment.layout
        num_physical = self.config.num_experts + layout.num_redundant_experts
        expert_room = budget_bytes - (rank.weight_bytes - self._expert_bytes(rank.num_experts))
        most_experts = expert_room // self._expert_bytes(1)
        if rank.num_experts == 0 or most_experts < 1:
            return "take larger GPUs, or free what others hold on them"
        num_shards = -(-num_physical // most_experts)
        if num_shards <= layout.num_expert_shards:
            return "take larger GPUs, or free what others hold on them"
        if layout.layout is Layout.SPLIT:
            return f"num_expert_shards={num_shards} fits, or take larger GPUs"
        return (
            f"layout=colocated with num_attention_shards={num_shards} and "
            f"num_expert_shards={num_shards} fits, or take larger GPUs"
        )

    def _way_out_on_host(self, ranks: Sequence[RankPlan], free_bytes: int) -> str:
        processes = (len(ranks) + _SIDE_PROCESSES) * _PROCESS_BYTES
        weights = sum(rank.weight_bytes for rank in ranks)
        if weights + processes < free_bytes:
            return "lower engine.num_pages or engine.cache_memory_bytes"
        if self.dtype == torch.float32 and weights // 2 + processes < free_bytes:
            return "set engine.dtype=bfloat16, which halves the weights"
        return "free memory, take a larger machine, or join several to a Ray cluster"

    def _most_pages(self, rank: RankPlan) -> int:
        return ((rank.budget_bytes or 0) - rank.weight_bytes) // rank.page_bytes

    def _expert_bytes(self, num_local: int) -> int:
        return expert_bytes(self.config, num_local, self.dtype, self.precision, plain=self.plain)


def _useful_pages(engine: EngineConfig, max_context: int) -> int:
    """Pages that all running requests at their longest would fill."""
    return engine.max_running_requests * -(-max_context // engine.page_size)


def _role(layout: LayoutConfig, rank: int) -> str:
    roles = [
        name
        for name, members in (
            ("attention", layout.attention_ranks()),
            ("expert", layout.expert_ranks()),
        )
        if rank in members
    ]
    return "+".join(roles)


def _name_ranks(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
