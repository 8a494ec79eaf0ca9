"""Decode steps as CUDA graphs: one launch where there would be twelve or more for every layer.

`RowGraphs` captures any computation over rows that attend as decode; `GraphedDecoder` does so with
the model, `graphed_head` with a draft head.

A graph is captured for a number of rows and a number of chunks of keys (`gpu.decode_chunks`). A row
is a request's one token, or one of those that it verifies; each is attended by itself. A step takes
the smallest one that holds it; what is left over is padding, which stores nothing, goes to no
expert and attends to nothing. Every other step goes the usual way, launch by launch.

Shape letters: T tokens (rows), D hidden, X chunks, G pages of all chunks, V vocabulary.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ostro.actors.model.batch import Batch, build_batches
from ostro.actors.model.decoder import Decoder, ExpertExchange
from ostro.actors.model.packed_copy import (
    Form,
    host_memory,
    packed_bytes,
    packed_views,
    send_together,
)
from ostro.configs.model import ModelConfig
from ostro.kernels.gpu.decode_chunks import (
    MAX_CHUNK_KEYS,
    MIN_CHUNK_KEYS,
    DecodeChunks,
    cut_chunks,
    most_chunks,
)
from ostro.kernels.gpu.mla_decode import serves
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
    """What a graph reads: views of one piece of memory, of which a step copies the beginning."""

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    num_live: torch.Tensor
    chunks: DecodeChunks

    @classmethod
    def within(cls, memory_bytes: torch.Tensor, forms: Sequence[Form]) -> GraphInputs:
        """The views; `forms` are from `input_forms`."""
        tokens_T, positions_T, slots_T, num_live, first_T1, chunk_X4, pages_G = packed_views(
            memory_bytes, forms
        )
        return cls(
            tokens_T=tokens_T,
            positions_T=positions_T,
            slots_T=slots_T,
            num_live=num_live,
            chunks=DecodeChunks(pages_G, chunk_X4, first_T1),
        )

    def fill(self, batch: Batch, chunks: DecodeChunks) -> None:
        """Take a step's values, on the host; all that is left becomes padding."""
        live, num_chunks = batch.num_tokens, len(chunks.chunk_X4)
        self.num_live.fill_(live)
        _fill(self.tokens_T, batch.tokens_T, 0)
        _fill(self.positions_T, batch.positions_T, 0)
        _fill(self.slots_T, batch.slots_T, _NO_SLOT)
        _fill(self.chunks.pages_G, chunks.pages_G, 0)
        _fill(self.chunks.chunk_X4, chunks.chunk_X4, 0)
        _fill(self.chunks.first_T1, chunks.first_T1, num_chunks)

    def batch(self, sample_rows: torch.Tensor, page_size: int) -> Batch:
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
            sample_rows=sample_rows[:num_requests],
            image_spans=(),
            num_live=self.num_live,
        )


def _fill(whole: torch.Tensor, values: torch.Tensor, padding: int) -> None:
    whole[: len(values)] = values
    whole[len(values) :] = padding


def input_forms(num_requests: int, num_chunks: int, num_pages: int) -> list[Form]:
    """Forms of the inputs of a graph of such a size; what varies from step to step comes last."""
    return [
        (torch.int64, (num_requests,)),
        (torch.int64, (num_requests,)),
        (torch.int64, (num_requests,)),
        (torch.int32, (1,)),
        (torch.int32, (num_requests + 1,)),
        (torch.int32, (num_chunks, 4)),
        (torch.int32, (num_pages,)),
    ]


def most_pages(num_chunks: int, page_size: int) -> int:
    """Pages of so many chunks, at most."""
    return num_chunks * -(-MAX_CHUNK_KEYS // page_size)


def load_inputs(
    memory_bytes: torch.Tensor, size: tuple[int, int], batch: Batch, chunks: DecodeChunks
) -> None:
    """Send a step to where the graph of a size reads it, as one copy that nobody waits for.

    The graph before may still read: on one stream the copy comes after it, and before the next.

    Args:
        memory_bytes: uint8, on the device; all graphs read it from its beginning.
        size: (requests, chunks) of the graph.
        batch: Of the step, on the host.
        chunks: Likewise.
    """
    forms = input_forms(*size, len(chunks.pages_G))
    host_bytes = host_memory(packed_bytes(forms), memory_bytes.device)
    GraphInputs.within(host_bytes, forms).fill(batch, chunks)
    memory_bytes[: len(host_bytes)].copy_(host_bytes, non_blocking=True)


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


@dataclass(frozen=True, slots=True)
class FoundGraph:
    """A step and the size of its graph."""

    batch: Batch
    size: tuple[int, int]
    chunks: DecodeChunks


class RowGraphs:
    """Graphs of one computation over rows that attend as decode, by numbers of rows and chunks."""

    def __init__(self, page_size: int, device: torch.device) -> None:
        self._page_size = page_size
        self._device = device
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._sizes: dict[int, list[int]] = {}

    @torch.inference_mode()
    def capture(
        self,
        compute: Callable[[Batch], None],
        *,
        max_rows: int,
        max_context: int,
        num_pages: int,
        only_largest: bool = False,
    ) -> None:
        """Capture every graph, the largest first, so that the others fit in its memory.

        Args:
            compute: What a graph does with a batch, padding included: nothing may be waited for,
                and results go to memory of the caller's.
            max_rows: Of a step, at most.
            max_context: Keys of a row, at most.
            num_pages: Of the cache; steps whose rows share so much of it that their chunks are more
                than its own have no graph.
            only_largest: Leave out the smaller ones: steps are all of one size.
        """
        began_s = time.perf_counter()
        own_chunks = num_pages * self._page_size // MIN_CHUNK_KEYS
        longest = most_chunks(max_context)
        counts = [max_rows] if only_largest else request_sizes(max_rows)
        most = {count: min(count * longest, own_chunks + count) for count in counts}
        self._sizes = {
            count: [most[count]] if only_largest else chunk_sizes(count, most[count])
            for count in counts
        }
        sizes = [(count, chunks) for count in self._sizes for chunks in self._sizes[count]]
        num_bytes = max(packed_bytes(self._forms(size)) for size in sizes)
        self._memory_bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        self._sample_rows = torch.arange(max_rows, device=self._device)
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(sizes):
            self._graphs[size] = self._last = self._capture(compute, self._padding(size), pool)
        logger.info(
            "captured %d CUDA graphs in %.1f s", len(self._graphs), time.perf_counter() - began_s
        )

    def find(self, batch: Batch) -> FoundGraph | None:
        """The graph of a step that is on the host, if it has one."""
        if batch.decode_plan is None or batch.prefill_spans or batch.image_spans:
            return None
        chunks = batch.decode_plan.chunks()
        size = fitting_size(self._sizes, batch.num_tokens, len(chunks.chunk_X4))
        return None if size is None else FoundGraph(batch, size, chunks)

    def run(self, found: FoundGraph, tokens_T: torch.Tensor | None = None) -> None:
        """Run it; `tokens_T` are the step's tokens where they are known on the device alone."""
        load_inputs(self._memory_bytes, found.size, found.batch, found.chunks)
        if tokens_T is not None:
            inputs = GraphInputs.within(self._memory_bytes, self._forms(found.size))
            inputs.tokens_T[: len(tokens_T)].copy_(tokens_T)
        self._last = self._graphs[found.size]
        self._last.replay()

    def run_last(self) -> None:
        """The last graph once more, for benchmarks."""
        self._last.replay()

    def _forms(self, size: tuple[int, int]) -> list[Form]:
        return input_forms(*size, most_pages(size[1], self._page_size))

    def _padding(self, size: tuple[int, int]) -> Batch:
        """Padding alone: what runs on it leaves the experts' counts and the cache as they are."""
        (padding,) = build_batches([], page_size=self._page_size, num_micro_batches=1)
        load_inputs(self._memory_bytes, size, padding, cut_chunks([], [], self._page_size))
        inputs = GraphInputs.within(self._memory_bytes, self._forms(size))
        return inputs.batch(self._sample_rows, self._page_size)

    def _capture(
        self, compute: Callable[[Batch], None], batch: Batch, pool: Any
    ) -> torch.cuda.CUDAGraph:
        stream = _capture_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute(batch)  # compiles what is not compiled yet
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            compute(batch)
        return graph


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs: cuBLAS keeps 32 MiB for every stream that it has seen on a Hopper."""
    return torch.cuda.Stream(device)


class GraphedDecoder:
    """A decoder whose decode steps are graphs; for one rank that holds all experts.

    The decoder's `hidden` are those of the last step, whichever way it went.

    Attributes:
        seconds: The decoder's own, and "graph": the time to launch graphs.
    """

    def __init__(self, decoder: Decoder, exchange: ExpertExchange) -> None:
        """The exchange must do without the host: nothing may be waited for within a graph."""
        self._decoder = decoder
        self._exchange = exchange
        self._device = decoder.cache.layers[0].device
        self._graphs = RowGraphs(decoder.cache.page_size, self._device)
        self.seconds = decoder.seconds
        self.seconds["graph"] = 0.0

    def capture(
        self, *, max_requests: int, max_context: int, num_pages: int, only_largest: bool = False
    ) -> None:
        """Capture every graph; see `RowGraphs`.

        Args:
            max_requests: Rows of a step, at most.
            max_context: Keys of a request, at most.
            num_pages: Of the cache; steps whose requests share so much of it that their chunks are
                more than its own go launch by launch.
            only_largest: Leave out the smaller ones: steps are all of one size.
        """
        config, device = self._decoder.config, self._device
        self._logits_TV = torch.empty(max_requests, config.vocab_size, device=device)
        if self._decoder.keeps_hidden:
            shape, dtype = (max_requests, config.hidden_size), self._decoder.dtype
            self._hidden_TD = torch.empty(shape, dtype=dtype, device=device)
        self._graphs.capture(
            self._compute,
            max_rows=max_requests,
            max_context=max_context,
            num_pages=num_pages,
            only_largest=only_largest,
        )

    @torch.inference_mode()
    def forward(self, batches: Sequence[Batch], exchange: ExpertExchange) -> list[torch.Tensor]:
        """As `Decoder.forward`; what a graph gave is good until the next call."""
        began_s = time.perf_counter()
        batch = batches[0]
        found = self._graphs.find(batch) if len(batches) == 1 else None
        if found is None:
            return self._decoder.forward(batches, exchange)
        self._graphs.run(found)
        logits_BV = self._logits_TV[: batch.num_tokens]
        if self._decoder.keeps_hidden:
            self._decoder.hidden = [self._hidden_TD[: batch.num_tokens]]
        if len(batch.sample_rows) < batch.num_tokens:
            (sample_rows,) = send_together([batch.sample_rows], self._device)
            logits_BV = logits_BV.index_select(0, sample_rows)
        self.seconds["graph"] += time.perf_counter() - began_s
        return [logits_BV]

    def replay_last(self) -> None:
        """The graph of the last decode step once more, for benchmarks."""
        self._graphs.run_last()

    def _compute(self, batch: Batch) -> None:
        """What a graph of this batch does; results go to where they are looked for."""
        num_rows = batch.num_tokens
        self._logits_TV[:num_rows].copy_(self._decoder.forward([batch], self._exchange)[0])
        if self._decoder.keeps_hidden:
            self._hidden_TD[:num_rows].copy_(self._decoder.hidden[0])
