"""Mistral Small 4 whole on one GPU, with random weights: decode steps as graphs, beside floors.

The product's decoder, experts and graphs; only the weights are drawn on the GPU instead of read, so
that 119 GB of FP8 take seconds. A step's floor is the bytes that it must read, at the rate at which
this GPU reads: the experts that the batch really hit, everything else once, and the latents.

Shape letters: B requests, L layers, E experts, D hidden, F expert hidden, V vocabulary.
"""

from __future__ import annotations

import math
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ostro.actors.fabric.local_exchange import LocalExchange
from ostro.actors.fabric.placement import initial_placement
from ostro.actors.model.batch import Batch, PrefillSpan
from ostro.actors.model.cuda_graphs import GraphedDecoder
from ostro.actors.model.decoder import Decoder
from ostro.actors.model.experts import LocalExperts
from ostro.actors.model.latent_cache import LatentCache, cached_token_bytes
from ostro.actors.model.random_checkpoint import SMALL_4, write_config
from ostro.cluster.bench_random_weights import random_weights
from ostro.configs.model import ModelConfig, load_model_config
from ostro.configs.quantization import WeightFormat
from ostro.kernels.batch_sampling import Draws, sample_rows
from ostro.kernels.bench.measure import Ceilings
from ostro.kernels.bench.sizes import fill_cache
from ostro.kernels.gpu.dependent_launch import dependent_launch
from ostro.kernels.mla_decode import DecodePlan
from ostro.kernels.sampling import Draw

PAGE_SIZE = 64
# Bytes of a weight of experts and of attention, and what its products are bound by.
_OF_PRECISION = {
    WeightFormat.FP8: (1.0, 1.0, "fp8"),
    WeightFormat.NVFP4: (9 / 16, 2.0, "bf16"),
}
_WARM_STEPS, _STEPS = 3, 20


def mistral_small_4(num_layers: int = 36) -> ModelConfig:
    """The config of its text model, with fewer layers where a GPU does not hold all."""
    shape = replace(SMALL_4, num_layers=num_layers, vision=None)
    with tempfile.TemporaryDirectory() as directory:
        write_config(Path(directory), shape)
        return load_model_config(Path(directory))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigure:
    """One size of a decode step, or of a prefill chunk.

    Attributes:
        kind: "decode" or "prefill".
        num_requests: Of a decode step; 1 of a prefill chunk.
        num_tokens: That the step computes.
        context: Keys that each request sees before it.
        graph_ms: Median time on the GPU.
        step_ms: Likewise with the host's part of it: a plan of chunks and inputs made from lists,
            launch, a draw, its ids on the host; no scheduler.
        floor_ms: What the bytes and FLOPs take at the GPU's measured rates.
        experts_hit: Experts that a layer's rows went to, on average.
        pdl_ms: As `graph_ms`, by dependent launches (`kernels.gpu.dependent_launch`); NaN where
            they gave other logits, None where that was not asked for.
    """

    kind: str
    num_requests: int
    num_tokens: int
    context: int
    graph_ms: float
    step_ms: float
    floor_ms: float
    experts_hit: float
    pdl_ms: float | None = None

    def tokens_per_s(self) -> float:
        """Of whole steps."""
        return self.num_tokens / self.step_ms * 1e3


class WholeModel:
    """Decoder, experts and cache on one GPU, in `single`, in FP8 or NVFP4."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        cache_tokens: int,
        cache_dtype: torch.dtype = torch.bfloat16,
        precision: WeightFormat = WeightFormat.FP8,
    ) -> None:
        """Take the GPU's memory: weights first, then pages for so many tokens."""
        self.config, self.precision = config, precision
        attention, experts = random_weights(config, precision)
        self.cache = LatentCache(
            config,
            num_pages=cache_tokens // PAGE_SIZE,
            page_size=PAGE_SIZE,
            device="cuda",
            dtype=cache_dtype,
        )
        for layer_NSW in self.cache.layers:
            fill_cache(layer_NSW, config.kv_lora_rank)
        self.decoder = Decoder(config, attention, self.cache)
        self.experts = LocalExperts(config, experts)
        placement = initial_placement(config.num_experts, [0])
        self.exchange = LocalExchange(
            self.experts.forward_pairs, placement, "cuda", has_shared=self.experts.has_shared
        )

    def decode_batches(self, num_requests: int, context: int) -> Callable[[], Batch]:
        """A step of requests of this context, each with pages of its own; made anew at each call.

        Raises:
            ValueError: The cache does not hold them.
        """
        pages_each = -(-context // PAGE_SIZE)
        if num_requests * pages_each > self.cache.num_pages:
            raise ValueError(f"{num_requests} x {context} tokens do not fit in the cache")
        shuffled = torch.randperm(self.cache.num_pages).tolist()
        tables = [
            array("i", shuffled[start : start + pages_each])
            for start in range(0, num_requests * pages_each, pages_each)
        ]
        last = context - 1
        slots = [table[last // PAGE_SIZE] * PAGE_SIZE + last % PAGE_SIZE for table in tables]
        tokens = torch.randint(self.config.vocab_size, (num_requests,)).tolist()

        def make() -> Batch:
            lengths = [context] * num_requests
            return Batch(
                tokens_T=torch.tensor(tokens),
                positions_T=torch.tensor([last] * num_requests),
                slots_T=torch.tensor(slots),
                last_position=last,
                decode_rows=slice(0, num_requests),
                decode_plan=DecodePlan(tables, lengths, PAGE_SIZE, torch.device("cpu")),
                prefill_spans=(),
                sample_rows=torch.tensor(list(range(num_requests))),
                image_spans=(),
            )

        return make

    def prefill_batch(self, num_tokens: int, context: int) -> Batch:
        """The last `num_tokens` of one request of this context."""
        pages_n = torch.randperm(self.cache.num_pages)[: -(-context // PAGE_SIZE)]
        start = context - num_tokens
        positions_T = torch.arange(start, context)
        slots_T = pages_n[positions_T // PAGE_SIZE] * PAGE_SIZE + positions_T % PAGE_SIZE
        return Batch(
            tokens_T=torch.randint(self.config.vocab_size, (num_tokens,)),
            positions_T=positions_T,
            slots_T=slots_T,
            last_position=context - 1,
            decode_rows=slice(0, 0),
            decode_plan=None,
            prefill_spans=(PrefillSpan(slice(0, num_tokens), start, pages_n),),
            sample_rows=torch.tensor([num_tokens - 1]),
            image_spans=(),
        )

    def _graphed(self, num_requests: int, context: int) -> GraphedDecoder:
        """A graph of exactly this size."""
        graphed = GraphedDecoder(self.decoder, self.exchange)
        graphed.capture(
            max_requests=num_requests,
            max_context=context,
            num_pages=self.cache.num_pages,
            only_largest=True,
        )
        return graphed

    def _pdl_ms(self, num_requests: int, batch: Batch) -> float:
        """The GPU's time for a batch by dependent launches; NaN if its logits are not the same."""
        (usual_BV,) = self.decoder.forward([batch], self.exchange)
        with dependent_launch(True):
            graphed = self._graphed(num_requests, batch.last_position + 1)
        (logits_BV,) = graphed.forward([batch], self.exchange)
        is_same = torch.equal(logits_BV, usual_BV)
        return _median_ms(graphed.replay_last, on_host=False) if is_same else math.nan

    def measure_decode(
        self, num_requests: int, context: int, ceilings: Ceilings, *, with_pdl: bool = False
    ) -> StepFigure:
        """A graph of exactly this batch, replayed; another by dependent launches, if asked."""
        make_batch = self.decode_batches(num_requests, context)
        graphed = self._graphed(num_requests, context)

        def step() -> None:
            (logits_BV,) = graphed.forward([make_batch()], self.exchange)
            sample_rows(logits_BV, _draws(num_requests)).tolist()

        self.experts.take_counts()
        step()
        counts_LE = self.experts.take_counts()
        hit = sum(count > 0 for layer in counts_LE for count in layer) / len(counts_LE)
        step_ms = _median_ms(step, on_host=True)
        graph_ms = _median_ms(graphed.replay_last, on_host=False)
        return StepFigure(
            kind="decode",
            num_requests=num_requests,
            num_tokens=num_requests,
            context=context,
            graph_ms=graph_ms,
            step_ms=step_ms,
            floor_ms=decode_floor_ms(
                self.config,
                num_requests,
                context,
                hit,
                ceilings,
                precision=self.precision,
                cache_dtype=self.cache.dtype,
            ),
            experts_hit=hit,
            pdl_ms=self._pdl_ms(num_requests, make_batch()) if with_pdl else None,
        )

    def measure_prefill(self, num_tokens: int, context: int, ceilings: Ceilings) -> StepFigure:
        """A chunk launch by launch, as prefill runs."""
        batch = self.prefill_batch(num_tokens, context)

        def step() -> None:
            (logits_BV,) = self.decoder.forward([batch], self.exchange)
            sample_rows(logits_BV, _draws(1)).tolist()

        step_ms = _median_ms(step, on_host=True, steps=5)
        return StepFigure(
            kind="prefill",
            num_requests=1,
            num_tokens=num_tokens,
            context=context,
            graph_ms=step_ms,
            step_ms=step_ms,
            floor_ms=prefill_floor_ms(self.config, num_tokens, context, ceilings, self.precision),
            experts_hit=float(self.config.num_experts),
        )


def decode_floor_ms(
    config: ModelConfig,
    num_requests: int,
    context: int,
    experts_hit: float,
    ceilings: Ceilings,
    *,
    precision: WeightFormat = WeightFormat.FP8,
    cache_dtype: torch.dtype = torch.bfloat16,
) -> float:
    """Bytes of one decode step at the GPU's reading rate: weights, latents and bf16 head."""
    latent_bytes = float(num_requests * context * cached_token_bytes(config, cache_dtype))
    head_bytes = 2.0 * config.vocab_size * config.hidden_size
    weight_bytes = config.num_layers * _weight_bytes(config, experts_hit, precision)
    return (weight_bytes + latent_bytes + head_bytes) / ceilings.bytes_s() * 1e3


def prefill_floor_ms(
    config: ModelConfig,
    num_tokens: int,
    context: int,
    ceilings: Ceilings,
    precision: WeightFormat = WeightFormat.FP8,
) -> float:
    """FLOPs of one chunk at the GPU's measured rates, or its weights' bytes if they take longer.

    Layers in FP8, or in bf16 if weights are NVFP4, attention in bf16; of the experts, as many as
    evenly chosen ones hit.
    """
    missed = (1.0 - config.num_experts_per_token / config.num_experts) ** num_tokens
    weight_bytes = _weight_bytes(config, config.num_experts * (1.0 - missed), precision)
    weights_s = weight_bytes / ceilings.bytes_s()
    per_token = 3 * config.hidden_size * config.expert_hidden_size * config.num_experts_per_token
    per_token += 3 * config.hidden_size * config.shared_hidden_size() + _attention_values(config)
    pairs = num_tokens * (context - num_tokens / 2)
    per_pair = config.num_heads * (config.qk_head_dim() + config.v_head_dim)
    products_s = 2.0 * num_tokens * per_token / ceilings.flops_s[_OF_PRECISION[precision][2]]
    attention_s = 2.0 * pairs * per_pair / ceilings.flops_s["bf16"]
    return config.num_layers * max(weights_s, products_s + attention_s) * 1e3


def _weight_bytes(config: ModelConfig, experts_hit: float, precision: WeightFormat) -> float:
    """Of one layer."""
    of_expert, of_attention, _ = _OF_PRECISION[precision]
    expert = 3 * config.hidden_size * config.expert_hidden_size
    shared = 3 * config.hidden_size * config.shared_hidden_size()
    gate_bytes = 2 * config.num_experts * config.hidden_size
    expert_bytes = of_expert * (experts_hit * expert + shared)
    return expert_bytes + of_attention * _attention_values(config) + gate_bytes


def _attention_values(config: ModelConfig) -> int:
    heads = config.num_heads
    return (
        config.hidden_size * (config.q_lora_rank + config.latent_width())
        + config.q_lora_rank * heads * config.qk_head_dim()
        + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        + heads * config.v_head_dim * config.hidden_size
    )


def _draws(num_rows: int) -> Draws:
    draws = [Draw(uniform=(b + 0.5) / num_rows, temperature=0.7) for b in range(num_rows)]
    return Draws.of(draws, torch.device("cuda"))


def _median_ms(run: Callable[[], object], *, on_host: bool, steps: int = _STEPS) -> float:
    samples = []
    for index in range(_WARM_STEPS + steps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        start.record()
        run()
        end.record()
        end.synchronize()
        took_ms = (time.perf_counter() - began_s) * 1e3 if on_host else start.elapsed_time(end)
        if index >= _WARM_STEPS:
            samples.append(took_ms)
    return float(torch.tensor(samples).median())


def measure(
    model: WholeModel,
    ceilings: Ceilings,
    decodes: Sequence[tuple[int, int]],
    prefills: Sequence[tuple[int, int]],
    *,
    with_pdl: bool = False,
) -> Iterator[StepFigure]:
    """Every (requests, context) of decode, then every (tokens, context) of prefill."""
    for num_requests, context in decodes:
        yield model.measure_decode(num_requests, context, ceilings, with_pdl=with_pdl)
    for num_tokens, context in prefills:
        yield model.measure_prefill(num_tokens, context, ceilings)
