"""A head's passes as graphs: what they read and leave anywhere, the head itself on a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import pytest
import torch
from eagle_rig import EagleRig
from graph_fakes import replay_instead
from model_rig import make_progress

from ostro.actors.eagle_drafter import EagleDrafter, EagleParts
from ostro.actors.model import attention
from ostro.actors.model.batch import Batch, PrefillSpan
from ostro.actors.model.graphed_head import GraphedHead
from ostro.actors.model.random_checkpoint import TINY, write_random_head
from ostro.configs.model import load_model_config
from ostro.kernels.gpu.mla_prologue import mla_prologue_triton
from ostro.kernels.latent_heads import LatentHeads
from ostro.kernels.mla_decode import DecodePlan, mla_decode_triton

PAGE_SIZE, NUM_PAGES = 16, 256


class _AddingHead:
    """States that are the hidden states and the token; remembers what went launch by launch."""

    def __init__(self) -> None:
        self.cache = SimpleNamespace(page_size=PAGE_SIZE, layers=[torch.empty(0)])
        self.hidden_size, self.dtype = 2, torch.float32
        self.launched: list[int] = []

    def forward(
        self,
        hidden_TD: torch.Tensor,
        batch: Batch,
        rows_R: torch.Tensor | None = None,
        tokens_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.launched.append(batch.num_tokens)
        tokens_T = batch.tokens_T if tokens_T is None else tokens_T
        state_TD = hidden_TD + tokens_T[:, None]
        return state_TD if rows_R is None else state_TD[rows_R]


def step(num_rows: int, first_token: int) -> Batch:
    """One row of each request."""
    rows = torch.arange(num_rows)
    return Batch(
        tokens_T=rows + first_token,
        positions_T=rows,
        slots_T=rows,
        last_position=num_rows,
        decode_rows=slice(0, num_rows),
        decode_plan=DecodePlan([[0]] * num_rows, [5] * num_rows, PAGE_SIZE, torch.device("cpu")),
        prefill_spans=(),
        sample_rows=rows,
        image_spans=(),
    )


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch) -> GraphedHead:
    replay_instead(monkeypatch)
    graphed = GraphedHead(_AddingHead())  # type: ignore[arg-type]
    graphed.capture(max_rows=4, max_context=2048, num_pages=NUM_PAGES)
    return graphed


def test_states_are_those_of_the_rows_asked_for(graphed: GraphedHead) -> None:
    hidden_TD = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    found = graphed.forward(hidden_TD, step(3, 100), torch.tensor([2, 0]))
    assert found.tolist() == [[107.0, 108.0], [101.0, 102.0]]
    none = graphed.forward(hidden_TD, step(3, 100), torch.empty(0, dtype=torch.int64))
    assert none.shape == (0, 2)


def test_a_pass_may_follow_on_its_own_states_and_tokens_of_the_device(graphed: GraphedHead) -> None:
    first = graphed.forward(torch.zeros(3, 2), step(3, 10))
    assert first[:, 0].tolist() == [10.0, 11.0, 12.0]
    second = graphed.forward(first[:2], step(2, 0), tokens_T=torch.tensor([1000, 2000]))
    assert second[:, 0].tolist() == [1010.0, 2011.0]
    third = graphed.forward(second[:1], step(1, 0), tokens_T=torch.tensor([7]))
    assert third[:, 0].tolist() == [1017.0]


def test_what_has_no_graph_goes_launch_by_launch(graphed: GraphedHead) -> None:
    head = graphed._head
    head.launched.clear()  # type: ignore[attr-defined]
    rows_R = torch.tensor([4])
    many = graphed.forward(torch.zeros(5, 2), step(5, 10), rows_R)
    assert many.tolist() == [[14.0, 14.0]]
    chunk = SimpleNamespace(**{name: getattr(step(3, 0), name) for name in Batch.__slots__})
    chunk.prefill_spans = (PrefillSpan(slice(0, 3), 0, torch.tensor([0])),)
    chunk.num_tokens = 3
    graphed.forward(torch.zeros(3, 2), chunk)  # type: ignore[arg-type]
    assert head.launched == [5, 3]  # type: ignore[attr-defined]


def drafts_of_steps(rig: EagleRig) -> list[list[int]]:
    """Of two requests after their prompts and after a step that verifies."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 1000, (n,), generator=generator).tolist() for n in (3, 17)]
    requests = [make_progress(str(n), prompt) for n, prompt in enumerate(prompts)]
    rig.advance([(one, one.num_prompt_tokens) for one in requests], 3, tokens=[[5]] * 2)
    drafts = [one.draft_token_ids for one in requests]
    rig.advance(
        [(one, 1) for one in requests],
        3,
        tokens=[[6], [*requests[1].draft_token_ids, 7]],
        drafts=drafts,
    )
    return drafts + [one.draft_token_ids for one in requests]


def graph_passes(rig: EagleRig, max_rows: int) -> None:
    """Have the rig's drafter take graphs of the head that is there."""
    graphed = GraphedHead(rig.head)
    graphed.capture(max_rows=max_rows, max_context=2048, num_pages=4 * NUM_PAGES)
    rig.drafter = EagleDrafter(EagleParts(graphed, rig.decoder), rig.grow)


def on_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have attention take the GPU's kernels, which the interpreter runs here."""
    decode = attention.mla_decode

    def decode_chunks(
        q_THQ: torch.Tensor,
        cache_NSW: torch.Tensor,
        plan: DecodePlan,
        heads: LatentHeads,
        *terms: torch.Tensor | None,
    ) -> torch.Tensor:
        if plan.context_lengths:
            return decode(q_THQ, cache_NSW, plan, heads, *terms)
        return mla_decode_triton(q_THQ, cache_NSW, plan.chunks(), heads, *terms)

    def prologue(*arguments: Any) -> torch.Tensor:
        return mla_prologue_triton(*arguments[:6])

    monkeypatch.setattr(attention, "mla_decode", decode_chunks)
    monkeypatch.setattr(attention, "mla_prologue", prologue)


def test_padded_passes_draft_what_single_launches_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoints.make_tiny_checkpoint(tmp_path / "model", seed=3, num_layers=1)
    write_random_head(tmp_path / "head", TINY, load_model_config(model))
    sizes = {"page_size": PAGE_SIZE, "num_pages": NUM_PAGES}
    expected = drafts_of_steps(EagleRig(model, tmp_path / "head", **sizes))
    replay_instead(monkeypatch)
    rig = EagleRig(model, tmp_path / "head", **sizes)
    graph_passes(rig, 16)
    on_gpu_kernels(monkeypatch)
    launched = []
    forward = rig.head.forward

    def record(hidden_TD: torch.Tensor, batch: Batch, *more: Any, **by_name: Any) -> torch.Tensor:
        launched.append(batch.num_live is None)
        return forward(hidden_TD, batch, *more, **by_name)

    monkeypatch.setattr(rig.head, "forward", record)
    assert drafts_of_steps(rig) == expected
    assert launched.count(True) == 1  # the prompts


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_drafts_of_graphs_are_those_of_single_launches(tmp_path: Path, dtype: torch.dtype) -> None:
    model = checkpoints.make_tiny_checkpoint(tmp_path / "model", seed=3)
    write_random_head(tmp_path / "head", TINY, load_model_config(model))
    sizes = {"page_size": PAGE_SIZE, "num_pages": NUM_PAGES}
    rig = EagleRig(model, tmp_path / "head", **sizes, device="cuda", dtype=dtype)
    expected = drafts_of_steps(rig)
    graph_passes(rig, 16)
    assert drafts_of_steps(rig) == expected
