"""Decode steps as CUDA graphs: sizes and inputs anywhere, logits and the model itself on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import pytest
import torch
from graph_fakes import replay_instead
from model_rig import ModelRig, make_progress, relative_error

from ostro.actors.engine.request import RequestProgress
from ostro.actors.fabric.local_exchange import LocalExchange
from ostro.actors.fabric.placement import initial_placement
from ostro.actors.model.batch import Batch, build_batches
from ostro.actors.model.cuda_graphs import (
    GraphedDecoder,
    GraphInputs,
    RowGraphs,
    _capture_stream,
    chunk_sizes,
    fitting_size,
    input_forms,
    load_inputs,
    most_pages,
    request_sizes,
)
from ostro.actors.model.packed_copy import packed_bytes
from ostro.kernels.gpu.decode_chunks import cut_chunks
from ostro.kernels.gpu.dependent_launch import dependent_launch
from ostro.kernels.latent_cache import FP8_ROWS
from ostro.kernels.mla_decode import DecodePlan

PAGE_SIZE, NUM_PAGES = 16, 256


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=3)


def test_request_sizes_worked_example() -> None:
    assert request_sizes(100) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100]


@pytest.mark.parametrize("most", [1, 2, 3, 256, 257, 1000])
def test_request_sizes_end_with_the_most(most: int) -> None:
    sizes = request_sizes(most)
    assert sizes[-1] == most
    assert sizes == sorted(set(sizes))


def test_chunk_sizes_worked_example() -> None:
    assert chunk_sizes(2, 100) == [16, 64, 100]
    assert chunk_sizes(2, 5) == [5]


def _prompts() -> list[RequestProgress]:
    generator = torch.Generator().manual_seed(1)
    lengths = (3, 40, 17)
    return [
        make_progress(str(n), torch.randint(3, 1000, (n,), generator=generator).tolist())
        for n in lengths
    ]


def _graphed(rig: ModelRig) -> tuple[GraphedDecoder, LocalExchange]:
    (experts, _), *_ = rig.exchange._shards
    num_experts = rig.config.num_experts
    placement = initial_placement(num_experts, [0])
    exchange = LocalExchange(experts.forward_pairs, placement, "cuda")
    return GraphedDecoder(rig.decoder, exchange), exchange


def _append_greedy(progress: list[RequestProgress], logits_BV: torch.Tensor) -> None:
    for one, token_id in zip(progress, logits_BV.argmax(dim=1).tolist(), strict=True):
        one.output_token_ids.append(token_id)


def _step(lengths: list[int]) -> Batch:
    """One token of each request of these contexts."""
    rows = torch.arange(len(lengths))
    tables = [
        [10 * row + page for page in range(-(-n // PAGE_SIZE))] for row, n in enumerate(lengths)
    ]
    return Batch(
        tokens_T=rows + 100,
        positions_T=torch.tensor(lengths) - 1,
        slots_T=rows + 1000,
        last_position=max(lengths) - 1,
        decode_rows=slice(0, len(lengths)),
        decode_plan=DecodePlan(tables, lengths, PAGE_SIZE, torch.device("cpu")),
        prefill_spans=(),
        sample_rows=rows,
        image_spans=(),
    )


def _inputs(memory_bytes: torch.Tensor, size: tuple[int, int]) -> GraphInputs:
    forms = input_forms(*size, most_pages(size[1], PAGE_SIZE))
    return GraphInputs.within(memory_bytes, forms)


def _poisoned(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Memory that was used before: large negative numbers of any dtype."""
    return torch.full((num_bytes,), 0x9B, dtype=torch.uint8, device=device)


def test_a_step_leaves_nothing_of_other_steps_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ostro.actors.model.cuda_graphs.host_memory", _poisoned)
    sizes = ((4, 8), (2, 4), (4, 8))
    memory_bytes = _poisoned(
        packed_bytes(input_forms(*sizes[0], most_pages(8, PAGE_SIZE))), torch.device("cpu")
    )
    for size, lengths in zip(sizes, ([300, 20, 5, 700], [300, 17], [40]), strict=True):
        step = _step(lengths)
        assert step.decode_plan is not None
        chunks = step.decode_plan.chunks()
        load_inputs(memory_bytes, size, step, chunks)
        inputs, live, num_chunks = _inputs(memory_bytes, size), len(lengths), len(chunks.chunk_X4)
        padding = size[0] - live
        assert inputs.num_live.tolist() == [live]
        assert inputs.tokens_T.tolist() == step.tokens_T.tolist() + [0] * padding
        assert inputs.positions_T.tolist() == step.positions_T.tolist() + [0] * padding
        assert inputs.slots_T.tolist() == step.slots_T.tolist() + [-1] * padding
        first = chunks.first_T1.tolist() + [num_chunks] * padding
        assert inputs.chunks.first_T1.tolist() == first
        assert torch.equal(inputs.chunks.chunk_X4[:num_chunks], chunks.chunk_X4)
        assert not inputs.chunks.chunk_X4[num_chunks:].any()
        assert torch.equal(inputs.chunks.pages_G[: len(chunks.pages_G)], chunks.pages_G)


def test_no_requests_are_padding_alone() -> None:
    memory_bytes = _poisoned(
        packed_bytes(input_forms(2, 4, most_pages(4, PAGE_SIZE))), torch.device("cpu")
    )
    (padding,) = build_batches([], page_size=PAGE_SIZE, num_micro_batches=1)
    load_inputs(memory_bytes, (2, 4), padding, cut_chunks([], [], PAGE_SIZE))
    inputs = _inputs(memory_bytes, (2, 4))
    assert inputs.num_live.tolist() == [0]
    assert inputs.slots_T.tolist() == [-1, -1]
    assert inputs.chunks.first_T1.tolist() == [0, 0, 0]
    assert not inputs.chunks.chunk_X4.any()
    batch = inputs.batch(torch.arange(2), PAGE_SIZE)
    assert batch.num_tokens == 2
    assert batch.sample_rows.tolist() == [0, 1]


def test_inputs_hold_the_pages_of_the_largest_chunks() -> None:
    lengths = [2_048, 16_384, 70_000]
    step = _step(lengths)
    assert step.decode_plan is not None
    chunks = step.decode_plan.chunks()
    assert len(chunks.pages_G) <= most_pages(len(chunks.chunk_X4), PAGE_SIZE)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([5], (1, 8)),
        ([5, 5], (2, 16)),
        ([2000, 2000, 2000], (4, 24)),
        ([5] * 5, None),  # more requests than any graph has
        ([100_000], None),  # more chunks
    ],
)
def test_size_of_a_step_is_the_smallest_that_holds_it(
    lengths: list[int], expected: tuple[int, int] | None
) -> None:
    sizes = {1: [8, 16], 2: [16], 4: [16, 24]}
    step = _step(lengths)
    assert step.decode_plan is not None
    assert fitting_size(sizes, len(lengths), len(step.decode_plan.chunks().chunk_X4)) == expected


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "tolerance"),
    [
        (torch.float32, None, 1e-3),
        (torch.bfloat16, None, 6e-2),
        (torch.float32, FP8_ROWS, 6e-2),  # multiplied in float16, and values round either way
        (torch.bfloat16, FP8_ROWS, 1.2e-1),
    ],
    ids=str,
)
def test_gpu_gives_the_logits_of_the_cpu(
    directory: Path, dtype: torch.dtype, cache_dtype: torch.dtype | None, tolerance: float
) -> None:
    sizes: dict[str, Any] = {"page_size": PAGE_SIZE, "num_pages": NUM_PAGES}
    sizes["cache_dtype"] = cache_dtype
    rigs = [ModelRig(directory, **sizes), ModelRig(directory, **sizes, device="cuda", dtype=dtype)]
    both = [_prompts(), _prompts()]
    for step in range(4):
        logits = [
            rig.step([rig.entry(one, 1 if step else one.num_tokens) for one in progress]).cpu()
            for rig, progress in zip(rigs, both, strict=True)
        ]
        assert relative_error(logits[1], logits[0]) < tolerance
        for progress in both:
            _append_greedy(progress, logits[0])


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, FP8_ROWS], ids=["plain", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_dependent", [False, True], ids=["usual", "dependent"])
def test_graphs_give_the_logits_of_single_launches(
    directory: Path, dtype: torch.dtype, cache_dtype: torch.dtype | None, is_dependent: bool
) -> None:
    rig = ModelRig(
        directory,
        page_size=PAGE_SIZE,
        num_pages=NUM_PAGES,
        device="cuda",
        dtype=dtype,
        cache_dtype=cache_dtype,
    )
    graphed, exchange = _graphed(rig)
    with dependent_launch(is_dependent):
        graphed.capture(max_requests=6, max_context=2048, num_pages=NUM_PAGES)
    progress = _prompts()
    _append_greedy(progress, rig.step([rig.entry(one, one.num_tokens) for one in progress]))
    for step in range(5):
        live = progress[: 1 + step % 3]
        entries = [rig.entry(one, 1) for one in live]
        batches = build_batches(entries, page_size=PAGE_SIZE, num_micro_batches=1)
        graphs = graphed.seconds["graph"]
        (logits_BV,) = graphed.forward(batches, exchange)
        assert graphed.seconds["graph"] > graphs
        expected_BV = rig.step(entries)
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(logits_BV, expected_BV, rtol=tolerance, atol=tolerance)
        assert torch.equal(logits_BV.argmax(dim=1), expected_BV.argmax(dim=1))
        _append_greedy(live, expected_BV)


@pytest.mark.gpu
def test_hidden_states_of_graphs_are_those_of_single_launches(directory: Path) -> None:
    rig = ModelRig(directory, page_size=PAGE_SIZE, num_pages=NUM_PAGES, device="cuda")
    rig.decoder.keeps_hidden = True
    graphed, exchange = _graphed(rig)
    graphed.capture(max_requests=4, max_context=2048, num_pages=NUM_PAGES)
    progress = _prompts()
    batches = build_batches(
        [rig.entry(one, one.num_tokens) for one in progress],
        page_size=PAGE_SIZE,
        num_micro_batches=1,
    )
    _append_greedy(progress, graphed.forward(batches, exchange)[0])
    assert len(rig.decoder.hidden[0]) == batches[0].num_tokens
    entries = [rig.entry(one, 1) for one in progress]
    batches = build_batches(entries, page_size=PAGE_SIZE, num_micro_batches=1)
    graphed.forward(batches, exchange)
    assert graphed.seconds["graph"] > 0.0
    found = rig.decoder.hidden[0].clone()
    rig.step(entries)
    torch.testing.assert_close(found, rig.decoder.hidden[0], rtol=1e-4, atol=1e-4)


class _CountingDecoder:
    """Logits and hidden states that tell their token, and nothing of a model."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(vocab_size=3, hidden_size=2)
        self.cache = SimpleNamespace(page_size=PAGE_SIZE, layers=[torch.empty(0)])
        self.dtype, self.keeps_hidden = torch.float32, True
        self.hidden: list[torch.Tensor] = []
        self.seconds: dict[str, float] = {}

    def forward(self, batches: Sequence[Batch], exchange: object) -> list[torch.Tensor]:
        tokens = [batch.tokens_T[:, None].float() for batch in batches]
        self.hidden = [tokens_T1.expand(-1, 2) * 10 for tokens_T1 in tokens]
        return [
            tokens_T1.expand(-1, 3)[batch.sample_rows]
            for tokens_T1, batch in zip(tokens, batches, strict=True)
        ]


def test_a_graph_leaves_the_hidden_states_of_its_live_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    replay_instead(monkeypatch)
    decoder = _CountingDecoder()
    graphed = GraphedDecoder(decoder, None)
    graphed.capture(max_requests=4, max_context=2048, num_pages=NUM_PAGES)
    for lengths in ([5, 6, 7], [9], [300, 2]):
        step = _step(lengths)
        (logits_BV,) = graphed.forward([step], None)
        assert logits_BV[:, 0].tolist() == step.tokens_T.tolist()
        (hidden_TD,) = decoder.hidden
        assert hidden_TD.tolist() == [[token * 10.0] * 2 for token in step.tokens_T.tolist()]
    many = _step([5] * 5)  # more rows than any graph has
    graphed.forward([many], None)
    assert len(decoder.hidden[0]) == 5


def test_all_graphs_are_captured_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[object] = []

    def graph(_: object, *, pool: object, stream: object) -> AbstractContextManager[None]:
        streams.append(stream)
        return nullcontext()

    new_stream = lambda *_: SimpleNamespace(wait_stream=lambda _: None)  # noqa: E731
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, new_stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    _capture_stream.cache_clear()
    for _ in "ab":  # the model's and a head's
        RowGraphs(PAGE_SIZE, torch.device("cpu")).capture(
            lambda _: None, max_rows=2, max_context=2048, num_pages=NUM_PAGES
        )
    _capture_stream.cache_clear()
    assert len(streams) > 2
    assert all(stream is streams[0] for stream in streams)


@pytest.mark.gpu
def test_steps_without_a_graph_go_launch_by_launch(directory: Path) -> None:
    rig = ModelRig(directory, page_size=PAGE_SIZE, num_pages=NUM_PAGES, device="cuda")
    graphed, exchange = _graphed(rig)
    graphed.capture(max_requests=1, max_context=2048, num_pages=NUM_PAGES)
    entries = [rig.entry(one, one.num_tokens) for one in _prompts()]
    batches = build_batches(entries, page_size=PAGE_SIZE, num_micro_batches=1)
    (logits_BV,) = graphed.forward(batches, exchange)
    assert graphed.seconds["graph"] == 0.0
    assert relative_error(logits_BV, rig.step(entries)) < 1e-4
