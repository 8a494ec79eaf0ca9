"""Decode steps as CUDA graphs: one launch where there would be some twenty for every layer.

A graph is captured for a number of requests and a number of chunks of keys (`gpu.mla_decode`). A
step takes the smallest one that holds it; what is left over is padding, which stores nothing, goes
to no expert and attends to nothing. Every other step goes the usual way, launch by launch.

Shape letters: T tokens (one per request), X chunks, G pages of all chunks, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ostro.actors.model.batch import Batch
from ostro.actors.model.decoder import Decoder, ExpertExchange
from ostro.configs.model import ModelConfig
from ostro.kernels.gpu.mla_decode import (
    MAX_CHUNK_KEYS,
    MIN_CHUNK_KEYS,
    DecodeChunks,
    most_chunks,
    serves,
)
from ostro.kernels.mla_decode import DecodePlan

logger = logging.getLogger(__name__)

_FEW_REQUESTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_MORE_REQUESTS = 128  # steps of the sizes beyond
_CHUNKS_OF_REQUEST = 8  # of the smallest graph: 2,048 keys each
_NEXT_CHUNKS = 4  # the next one's over the last one's
_ANY_POSITION = 2**31 - 1
_NO_SLOT = -1


def graphs_serve(config: ModelConfig, page_size: int) -> bool:
    """Whether the kernels that a graph needs take a model's sizes."""
    return serves(config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank, page_size)


def request_sizes(most: int) -> list[int]:
    """Numbers of requests for which there are graphs, ascending, the last one `most`.

    Example:
        100 gives 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100.
    """
    sizes = [size for size in _FEW_REQUESTS if size < most]
    sizes += range(_FEW_REQUESTS[-1] + _MORE_REQUESTS, most, _MORE_REQUESTS)
    return [*sizes, most]


def chunk_sizes(num_requests: int, most: int) -> list[int]:
    """Numbers of chunks for which there are graphs of so many requests, ascending.

    Example:
        2 requests and at most 100 chunks give 16, 64, 100.
    """
    sizes = []
    size = num_requests * _CHUNKS_OF_REQUEST
    while size < most:
        sizes.append(size)
        size *= _NEXT_CHUNKS
    return [*sizes, most]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphInputs:
    """What a graph reads, in memory that stays where it is."""

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    sample_rows: torch.Tensor
    num_live: torch.Tensor
    chunks: DecodeChunks

    def part(self, num_requests: int, num_chunks: int) -> GraphInputs:
        """The same memory, as much of it as a smaller graph reads."""
        return GraphInputs(
            tokens_T=self.tokens_T[:num_requests],
            positions_T=self.positions_T[:num_requests],
            slots_T=self.slots_T[:num_requests],
            sample_rows=self.sample_rows[:num_requests],
            num_live=self.num_live,
            chunks=DecodeChunks(
                pages_G=self.chunks.pages_G,
                chunk_X4=self.chunks.chunk_X4[:num_chunks],
                first_T1=self.chunks.first_T1[: num_requests + 1],
            ),
        )

    def fill(self, batch: Batch, chunks: DecodeChunks) -> None:
        """Take a step's values; what is left of the memory becomes padding."""
        live, num_chunks = batch.num_tokens, len(chunks.chunk_X4)
        self.tokens_T[:live].copy_(batch.tokens_T)
        self.positions_T[:live].copy_(batch.positions_T)
        self.slots_T[:live].copy_(batch.slots_T)
        self.slots_T[live:].fill_(_NO_SLOT)
        self.num_live.fill_(live)
        self.chunks.pages_G[: len(chunks.pages_G)].copy_(chunks.pages_G)
        self.chunks.chunk_X4[:num_chunks].copy_(chunks.chunk_X4)
        self.chunks.chunk_X4[num_chunks:].zero_()
        self.chunks.first_T1[: live + 1].copy_(chunks.first_T1)
        self.chunks.first_T1[live + 1 :].fill_(num_chunks)

    def batch(self, page_size: int) -> Batch:
        """A micro-batch of it all, padding included."""
        num_requests = len(self.tokens_T)
        return Batch(
            tokens_T=self.tokens_T,
            positions_T=self.positions_T,
            slots_T=self.slots_T,
            last_position=_ANY_POSITION,
            decode_rows=slice(0, num_requests),
            decode_plan=DecodePlan.of_chunks(self.chunks, page_size),
            prefill_spans=(),
            sample_rows=self.sample_rows,
            image_spans=(),
            num_live=self.num_live,
        )


def make_inputs(
    num_requests: int, num_chunks: int, page_size: int, device: torch.device
) -> GraphInputs:
    """Of padding alone."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    num_pages = num_chunks * -(-MAX_CHUNK_KEYS // page_size)
    return GraphInputs(
        tokens_T=zeros(num_requests),
        positions_T=zeros(num_requests),
        slots_T=zeros(num_requests).fill_(_NO_SLOT),
        sample_rows=torch.arange(num_requests, device=device),
        num_live=zeros(1, dtype=torch.int32),
        chunks=DecodeChunks(
            pages_G=zeros(num_pages, dtype=torch.int32),
            chunk_X4=zeros(num_chunks, 4, dtype=torch.int32),
            first_T1=zeros(num_requests + 1, dtype=torch.int32),
        ),
    )


def fitting_size(
    sizes: Mapping[int, Sequence[int]], num_requests: int, num_chunks: int
) -> tuple[int, int] | None:
    """The smallest (requests, chunks) of `sizes` that holds a step; None if none does.

    Args:
        sizes: Numbers of requests, ascending, and the numbers of chunks of each, likewise.
        num_requests: Of the step.
        num_chunks: Likewise.
    """
    requests = next((size for size in sizes if size >= num_requests), None)
    if requests is None:
        return None
    chunks = next((size for size in sizes[requests] if size >= num_chunks), None)
    return None if chunks is None else (requests, chunks)


class GraphedDecoder:
    """A decoder whose decode steps are graphs; for one rank that holds all experts.

    Attributes:
        seconds: The decoder's own, and "graph": the time to launch graphs.
    """

    def __init__(self, decoder: Decoder, exchange: ExpertExchange) -> None:
        """The exchange must do without the host: nothing may be waited for within a graph."""
        self._decoder = decoder
        self._exchange = exchange
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, GraphInputs]] = {}
        self._sizes: dict[int, list[int]] = {}
        self.seconds = decoder.seconds
        self.seconds["graph"] = 0.0

    @torch.inference_mode()
    def capture(
        self, *, max_requests: int, max_context: int, num_pages: int, only_largest: bool = False
    ) -> None:
        """Capture every graph, the largest first, so that the others fit in its memory.

        Args:
            max_requests: Requests of a step, at most.
            max_context: Keys of a request, at most.
            num_pages: Of the cache; steps whose requests share so much of it that their chunks are
                more than its own go launch by launch.
            only_largest: Leave out the smaller ones: steps are all of one size.
        """
        began_s = time.perf_counter()
        page_size = self._decoder.cache.page_size
        own_chunks = num_pages * page_size // MIN_CHUNK_KEYS
        longest = most_chunks(max_context)
        counts = [max_requests] if only_largest else request_sizes(max_requests)
        most = {count: min(count * longest, own_chunks + count) for count in counts}
        self._sizes = {
            count: [most[count]] if only_largest else chunk_sizes(count, most[count])
            for count in counts
        }
        device = self._decoder.cache.layers[0].device
        whole = make_inputs(max_requests, max(most.values()), page_size, device)
        config = self._decoder.config
        logits_TV = torch.empty(max_requests, config.vocab_size, device=device)
        pool = torch.cuda.graph_pool_handle()
        for num_requests in reversed(self._sizes):
            for num_chunks in reversed(self._sizes[num_requests]):
                inputs = whole.part(num_requests, num_chunks)
                graph = self._capture(inputs, logits_TV[:num_requests], pool)
                self._graphs[num_requests, num_chunks] = graph, inputs
                self._last = graph
        self._logits_TV = logits_TV
        logger.info(
            "captured %d CUDA graphs in %.1f s", len(self._graphs), time.perf_counter() - began_s
        )

    @torch.inference_mode()
    def forward(self, batches: Sequence[Batch], exchange: ExpertExchange) -> list[torch.Tensor]:
        """As `Decoder.forward`; what a graph gave is good until the next call."""
        found = self._find(batches)
        if found is None:
            return self._decoder.forward(batches, exchange)
        began_s = time.perf_counter()
        graph, inputs, batch, chunks = found
        inputs.fill(batch, chunks)
        graph.replay()
        self._last = graph
        logits_BV = self._logits_TV[: batch.num_tokens]
        if len(batch.sample_rows) < batch.num_tokens:
            logits_BV = logits_BV.index_select(0, batch.sample_rows)
        self.seconds["graph"] += time.perf_counter() - began_s
        return [logits_BV]

    def replay_last(self) -> None:
        """The graph of the last decode step once more, for benchmarks."""
        self._last.replay()

    def _find(
        self, batches: Sequence[Batch]
    ) -> tuple[torch.cuda.CUDAGraph, GraphInputs, Batch, DecodeChunks] | None:
        """The graph of a step, if it has one."""
        batch = batches[0]
        if len(batches) > 1 or batch.decode_plan is None:
            return None
        if batch.prefill_spans or batch.image_spans:
            return None
        chunks = batch.decode_plan.chunks()
        size = fitting_size(self._sizes, batch.num_tokens, len(chunks.chunk_X4))
        return None if size is None else (*self._graphs[size], batch, chunks)

    def _capture(
        self, inputs: GraphInputs, logits_TV: torch.Tensor, pool: Any
    ) -> torch.cuda.CUDAGraph:
        """Of padding alone: the experts' counts and the cache stay as they are."""
        batch = inputs.batch(self._decoder.cache.page_size)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._decoder.forward([batch], self._exchange)  # compiles what is not compiled yet
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits_TV.copy_(self._decoder.forward([batch], self._exchange)[0])
        return graph
