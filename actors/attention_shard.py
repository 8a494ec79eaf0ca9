"""The attention role of one rank: scheduler, pages, attention, gate, shared expert, sampler."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from ostro.actors.attention_engine import (
    AttentionEngine,
    AttentionParts,
    StepDecoder,
    StepExchange,
)
from ostro.actors.drafter import Drafter, Drafting, NgramDrafter
from ostro.actors.eagle_drafter import DraftingHead, EagleDrafter, EagleParts
from ostro.actors.engine.grammar import GrammarCompiler
from ostro.actors.engine.grammar_masks import MaskMaker
from ostro.actors.engine.page_pool import PageLeakError
from ostro.actors.engine.request_pages import RequestPages
from ostro.actors.engine.scheduler import Scheduler
from ostro.actors.fabric.channel import SyncConnection, SyncServer
from ostro.actors.fabric.colocated_exchange import ColocatedExchange
from ostro.actors.fabric.local_exchange import LocalExchange
from ostro.actors.fabric.messages import StepEvents
from ostro.actors.fabric.transport import PairExchange
from ostro.actors.model.checkpoint import CheckpointReader
from ostro.actors.model.decoder import Decoder
from ostro.actors.model.device import check_fp8, choose_cache_dtype, choose_precision, torch_dtype
from ostro.actors.model.draft_head import (
    DraftHead,
    HeadWeights,
    configured_head,
    load_head_weights,
)
from ostro.actors.model.eagle_head import EagleHead
from ostro.actors.model.experts import LocalExperts
from ostro.actors.model.latent_cache import LatentCache, cache_page_bytes
from ostro.actors.model.sampler import Sampler
from ostro.actors.model.stored_weights import match_tensors, stored_plain
from ostro.actors.model.weight_bytes import attention_bytes, expert_bytes
from ostro.actors.model.weights import can_stack_shared, load_attention_weights, load_expert_weights
from ostro.actors.rank import EpochSpec, RankSpec
from ostro.actors.rank_actor import RankActor
from ostro.actors.rank_loop import Engine
from ostro.actors.stage_counts import StageCounts
from ostro.actors.step_sampling import StepSampler
from ostro.configs.deployment import EngineConfig, Layout
from ostro.configs.model import ModelConfig
from ostro.configs.speculation import SpeculationConfig

logger = logging.getLogger(__name__)

_DEFAULT_CPU_CACHE_BYTES = 512 * 2**20
_MOST_GRAPHED = 512  # rows with drafts; larger steps compute more than launches cost


class AttentionShard(RankActor):
    """Serves the requests that the router places on it; holds experts too in shared layouts.

    Remote surface: `start`, `join`, `leave`, `health` (see `RankActor`).
    """

    def __init__(self, *, host: str, node_id: str, token_address: str) -> None:
        super().__init__("attention", host=host, node_id=node_id)
        self._token_address = token_address
        self._tokens: SyncServer | None = None
        self._experts: LocalExperts | None = None
        self._eagle: EagleParts | None = None  # its latents outlive epochs as the model's do
        self._scheduler: Scheduler | None = None  # of the last epoch

    def _load(self, spec: RankSpec, config: ModelConfig) -> None:
        dtype, local = torch_dtype(spec.dtype), spec.placement.local_to_logical(spec.rank)
        self._grammars = GrammarCompiler(Path(spec.model_dir), config.vocab_size)
        self._grammars.warm_up()  # beside the weights
        status, precision = self._status, choose_precision(spec.device, config)
        check_fp8(spec.device, spec.deployment.engine, precision)
        reader = CheckpointReader(Path(spec.model_dir))
        stacks = stacks_shared(spec, config) and can_stack_shared(reader, config, precision)
        plain = stored_plain(match_tensors(reader, config))
        status.bytes_to_load = attention_bytes(
            config, dtype, precision, stacks_shared=stacks, plain=plain
        )
        status.bytes_to_load += expert_bytes(config, len(local), dtype, precision, plain=plain)
        found = configured_head(spec.deployment.engine, config)
        if found is not None:
            status.bytes_to_load += found.num_bytes(
                dtype, choose_precision(spec.device, found.config)
            )
        experts = None
        if local:
            experts = load_expert_weights(
                reader,
                config,
                local,
                device=spec.device,
                dtype=dtype,
                precision=precision,
                progress=status.count_bytes,
                num_extra=int(stacks),
            )
        weights = load_attention_weights(
            reader,
            config,
            device=spec.device,
            dtype=dtype,
            precision=precision,
            progress=status.count_bytes,
            shared_into=experts if stacks else None,
        )
        if experts is not None:
            self._experts = LocalExperts(config, experts)
        head_weights = None if found is None else self._load_head(spec, found)
        self._config = config
        self._num_pages = num_pages(spec, config, found)
        decoder = Decoder(
            config,
            weights,
            self._make_cache(spec, config),
            image_cache_bytes=spec.deployment.engine.image_cache_bytes,
            keeps_hidden=found is not None,
        )
        if found is not None and head_weights is not None:
            cache = self._make_cache(spec, found.config)
            head = EagleHead(found.config, head_weights, cache, decoder.embed)
            self._eagle = EagleParts(self._graphed_head(spec, head, found.config), decoder)
        self._decoder: StepDecoder = self._graphed(spec, decoder)
        self._sampler: StepSampler = Sampler(config.vocab_size)
        self._masks = MaskMaker(config.vocab_size)

    def _load_head(self, spec: RankSpec, found: DraftHead) -> HeadWeights:
        return load_head_weights(
            found,
            device=spec.device,
            dtype=torch_dtype(spec.dtype),
            precision=choose_precision(spec.device, found.config),
            progress=self._status.count_bytes,
        )

    def _make_cache(self, spec: RankSpec, config: ModelConfig) -> LatentCache:
        engine = spec.deployment.engine
        return LatentCache(
            config,
            num_pages=self._num_pages,
            page_size=engine.page_size,
            device=spec.device,
            dtype=choose_cache_dtype(engine, torch_dtype(spec.dtype), config),
        )

    def _make_engine(
        self, spec: RankSpec, epoch: EpochSpec, connection: SyncConnection
    ) -> tuple[Engine, str | None]:
        engine = spec.deployment.engine
        greeting = StepEvents(epoch.epoch, spec.rank, [])
        exchange = self._make_exchange(spec)
        stages = StageCounts(self._decoder.seconds, exchange.counters)
        longest = max_context(spec, self._config)
        self._tokens = SyncServer(self._epoch_address(epoch), epoch.secret, greeting=greeting)
        self._scheduler = Scheduler(
            engine,
            self._num_pages,
            longest,
            stages=stages.by_stage,
            pages=self._pages_left(),
        )
        parts = AttentionParts(
            rank=spec.rank,
            epoch=epoch.epoch,
            conducted=spec.deployment.layout.world_size() > 1,
            scheduler=self._scheduler,
            decoder=self._decoder,
            sampler=self._sampler,
            drafting=self._make_drafting(engine.speculation, self._scheduler),
            grammars=self._grammars,
            masks=self._masks,
            exchange=exchange,
            stages=stages,
            connection=connection,
            tokens=self._tokens,
            page_size=engine.page_size,
            max_waiting_requests=engine.max_waiting_requests,
            vision=self._config.vision,
            num_layers=self._config.num_layers,
            take_counts=self._experts.take_counts if self._experts else None,
        )
        return AttentionEngine(parts), self._tokens.start()

    def _make_drafting(
        self, speculation: SpeculationConfig | None, scheduler: Scheduler
    ) -> Drafting | None:
        if speculation is None:
            return None
        drafter: Drafter = NgramDrafter(speculation)
        if self._eagle is not None:
            drafter = EagleDrafter(self._eagle, scheduler.grow_for_drafts)
        return Drafting(drafter, speculation)

    def _pages_left(self) -> RequestPages | None:
        """Pages with what the last epoch cached: who goes on after it computes little again."""
        scheduler, self._scheduler = self._scheduler, None
        try:
            return None if scheduler is None else scheduler.give_up()
        except PageLeakError:
            logger.exception("the last epoch left wrong books; begins with an empty cache")
            return None

    def _graphed(self, spec: RankSpec, decoder: Decoder) -> StepDecoder:
        """With its decode steps as CUDA graphs, where no other rank takes part in them.

        Here and not when an epoch begins: the first start on a machine compiles every kernel.
        """
        engine = spec.deployment.engine
        is_alone = spec.deployment.layout.world_size() == 1
        if spec.device != "cuda" or not engine.cuda_graphs or not is_alone:
            return decoder
        from ostro.actors.model.cuda_graphs import GraphedDecoder, graphs_serve

        if not graphs_serve(self._config, engine.page_size):
            logger.warning(
                "decode steps go launch by launch: graphs want head widths and page_size=%d "
                "that are powers of two from 16 on",
                engine.page_size,
            )
            return decoder
        graphed = GraphedDecoder(decoder, self._make_exchange(spec))
        graphed.capture(
            max_requests=most_graphed_rows(engine),
            max_context=max_context(spec, self._config),
            num_pages=self._num_pages * rows_of_request(engine),  # each row reads its request's
        )
        return graphed

    def _graphed_head(self, spec: RankSpec, head: EagleHead, config: ModelConfig) -> DraftingHead:
        """With its passes over single rows as CUDA graphs; in any layout, as it runs alone."""
        engine = spec.deployment.engine
        if spec.device != "cuda" or not engine.cuda_graphs:
            return head
        from ostro.actors.model.cuda_graphs import graphs_serve
        from ostro.actors.model.graphed_head import GraphedHead

        if not graphs_serve(config, engine.page_size):
            return head
        graphed = GraphedHead(head)
        graphed.capture(
            max_rows=most_graphed_rows(engine),
            max_context=max_context(spec, self._config),
            num_pages=self._num_pages * rows_of_request(engine),
        )
        return graphed

    def _make_exchange(self, spec: RankSpec) -> StepExchange:
        if self._experts is None:
            return PairExchange(self._wiring(spec, self._config))
        if self._group is None:
            return LocalExchange(
                self._experts.forward_pairs,
                spec.placement,
                spec.device,
                has_shared=self._experts.has_shared,
            )
        return ColocatedExchange(self._wiring(spec, self._config), self._experts.forward)

    def _epoch_address(self, epoch: EpochSpec) -> str:
        """A socket file of this process and epoch alone, so that none left behind is in the way."""
        if self._token_address.startswith("unix:"):
            return f"{self._token_address}.{os.getpid()}.{epoch.epoch}"
        return self._token_address

    def _epoch_ended(self) -> None:
        if self._tokens is not None:
            self._tokens.close()
            self._tokens = None


def stacks_shared(spec: RankSpec, config: ModelConfig) -> bool:
    """Whether the shared expert is to run as one more routed one, in the same launches.

    On a GPU its own six launches took 13 us a layer at batch 1, its bytes take 5. Its id is its
    slot, so every expert must stand in the slot of its own id.
    """
    is_single = spec.deployment.layout.layout is Layout.SINGLE
    slots = spec.placement.local_to_logical(spec.rank)
    return spec.device == "cuda" and is_single and slots == tuple(range(config.num_experts))


def rows_of_request(engine: EngineConfig) -> int:
    """Tokens of a request that one decode step computes, at most."""
    return 1 if engine.speculation is None else 1 + engine.speculation.num_draft_tokens


def most_graphed_rows(engine: EngineConfig) -> int:
    """Rows of the largest decode step that is a graph."""
    rows = engine.max_running_requests * rows_of_request(engine)
    return max(engine.max_running_requests, min(rows, engine.max_tokens_per_step, _MOST_GRAPHED))


def max_context(spec: RankSpec, config: ModelConfig) -> int:
    """Longest prompt plus output that is served, in tokens."""
    asked = spec.deployment.engine.max_context
    return config.max_context if asked is None else min(asked, config.max_context)


def num_pages(spec: RankSpec, config: ModelConfig, head: DraftHead | None = None) -> int:
    """Pages of the latent cache: as configured, or what fits in the configured memory."""
    engine = spec.deployment.engine
    if engine.num_pages is not None:
        return engine.num_pages
    dtype = choose_cache_dtype(engine, torch_dtype(spec.dtype), config)
    cached = [config] if head is None else [config, head.config]
    page_bytes = sum(cache_page_bytes(one, engine.page_size, dtype) for one in cached)
    if engine.cache_memory_bytes is not None:
        memory_bytes = engine.cache_memory_bytes
    elif spec.device == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        memory_bytes = free_bytes - int(total_bytes * (1.0 - engine.gpu_memory_fraction))
    else:
        memory_bytes = _DEFAULT_CPU_CACHE_BYTES
    useful = engine.max_running_requests * -(-max_context(spec, config) // engine.page_size)
    return max(1, min(memory_bytes // page_bytes, useful))
