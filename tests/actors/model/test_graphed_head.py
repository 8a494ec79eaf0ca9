"""A head's passes as graphs: what they read and leave anywhere, the head itself on a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import checkpoints
import pytest
import torch
from eagle_rig import EagleRig
from graph_fakes import replay_instead
from model_rig import make_progress

from ostro.actors.eagle_drafter import EagleDrafter, EagleParts
from ostro.actors.model.batch import Batch, PrefillSpan
from ostro.actors.model.graphed_head import GraphedHead
from ostro.actors.model.random_checkpoint import TINY, write_random_head
from ostro.configs.model import load_model_config
from ostro.kernels.mla_decode import DecodePlan

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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_drafts_of_graphs_are_those_of_single_launches(tmp_path: Path, dtype: torch.dtype) -> None:
    model = checkpoints.make_tiny_checkpoint(tmp_path / "model", seed=3)
    write_random_head(tmp_path / "head", TINY, load_model_config(model))
    rig = EagleRig(
        model,
        tmp_path / "head",
        page_size=PAGE_SIZE,
        num_pages=NUM_PAGES,
        device="cuda",
        dtype=dtype,
    )
    graphed = GraphedHead(rig.head)
    graphed.capture(max_rows=16, max_context=2048, num_pages=4 * NUM_PAGES)
    drafters = [rig.drafter, EagleDrafter(EagleParts(graphed, rig.decoder), rig.grow)]
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 1000, (n,), generator=generator).tolist() for n in (3, 40, 17)]
    drafts = []
    for drafter in drafters:
        rig.drafter = drafter
        requests = [make_progress(str(n), prompt) for n, prompt in enumerate(prompts)]
        rig.advance([(one, one.num_prompt_tokens) for one in requests], 3, tokens=[[5]] * 3)
        drafts.append([one.draft_token_ids for one in requests])
        for token in range(6, 10):
            rig.advance(
                [(one, 1) for one in requests],
                3,
                tokens=[[token]] * 3,
                drafts=[one.draft_token_ids for one in requests],
            )
            drafts[-1] += [one.draft_token_ids for one in requests]
    assert drafts[0] == drafts[1]
