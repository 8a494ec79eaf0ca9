"""The head's states against plain torch: chunks, far positions, FP8 latents, chosen rows."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path

import checkpoints
import pytest
import torch
from eagle_oracle import EagleOracle, write_fp8_head
from model_rig import make_progress, relative_error

from ostro.actors.engine.step import ScheduledRequest
from ostro.actors.model.batch import ImageSpan, build_batches
from ostro.actors.model.draft_head import find_draft_head, load_head_weights
from ostro.actors.model.eagle_head import EagleHead
from ostro.actors.model.latent_cache import LatentCache
from ostro.actors.model.random_checkpoint import TINY, write_random_head
from ostro.configs.model import load_model_config
from ostro.configs.quantization import WeightFormat
from ostro.kernels.latent_cache import FP8_ROWS

NUM_TOKENS, HIDDEN = 70, TINY.hidden_size
NEAR_8192, BEYOND_65536 = 8192 - 40, 65536 + 5000
PAGE_SIZE = 16


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pair")
    checkpoints.make_tiny_checkpoint(directory / "model")
    model = load_model_config(directory / "model")
    write_random_head(directory / "head", TINY, model, seed=4)
    return directory


def make_head(
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    precision: WeightFormat = WeightFormat.PLAIN,
) -> EagleHead:
    found = find_draft_head(directory / "head", load_model_config(directory / "model"))
    cache = LatentCache(
        found.config,
        num_pages=32,
        page_size=PAGE_SIZE,
        device="cpu",
        dtype=cache_dtype or dtype,
    )
    for layer_NSW in cache.layers:
        layer_NSW.view(torch.uint8).fill_(0xFF)  # NaN: reading what nobody wrote shows
    weights = load_head_weights(found, device="cpu", dtype=dtype, precision=precision)

    def embed(tokens_T: torch.Tensor, _: Sequence[ImageSpan]) -> torch.Tensor:
        """Tokens are numbered as they stand, and so is what is embedded."""
        return inputs()[0].to(dtype)[tokens_T]

    return EagleHead(found.config, weights, cache, embed)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """(embeddings of the next tokens, hidden states), any."""
    generator = torch.Generator().manual_seed(1)
    embedded_TD, hidden_TD = torch.randn(2, NUM_TOKENS, HIDDEN, generator=generator)
    return embedded_TD * 0.08, hidden_TD


def expected(directory: Path, position_offset: int = 0) -> torch.Tensor:
    nothing = torch.empty(0, HIDDEN)
    oracle = EagleOracle(directory / "head", nothing, nothing)
    return oracle.states(*inputs(), position_offset)


def states_in_chunks(
    head: EagleHead,
    chunk: int,
    *,
    position_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    rows_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """States of all tokens, or of some rows of every chunk."""
    progress = make_progress("r", [0] * NUM_TOKENS)
    pages = array("i", range(20, 10, -1))
    parts = []
    for start in range(0, NUM_TOKENS, chunk):
        count = min(chunk, NUM_TOKENS - start)
        tokens = list(range(start, start + count))
        entry = ScheduledRequest(progress, start, count, tokens, pages, False)
        (batch,) = build_batches(
            [entry], page_size=PAGE_SIZE, num_micro_batches=1, position_offset=position_offset
        )
        hidden_TD = inputs()[1][start : start + count].to(dtype)
        parts.append(head.forward(hidden_TD, batch, rows_R))
    return torch.cat(parts)


@pytest.mark.parametrize("offset", [0, NEAR_8192, BEYOND_65536])
@pytest.mark.parametrize("chunk", [1, 7, NUM_TOKENS])
def test_states_are_the_oracles_for_every_chunking(
    directory: Path, chunk: int, offset: int
) -> None:
    found = states_in_chunks(make_head(directory), chunk, position_offset=offset)
    assert relative_error(found, expected(directory, offset)) < 1e-4


@pytest.mark.parametrize("chunk", [1, NUM_TOKENS])
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [
        (torch.bfloat16, None),
        (torch.float32, FP8_ROWS),
        (torch.bfloat16, FP8_ROWS),
    ],
    ids=str,
)
def test_states_are_near_the_oracles_in_fewer_bits(
    directory: Path, dtype: torch.dtype, cache_dtype: torch.dtype | None, chunk: int
) -> None:
    head = make_head(directory, dtype=dtype, cache_dtype=cache_dtype)
    found = states_in_chunks(head, chunk, dtype=dtype)
    assert found.dtype == dtype
    assert relative_error(found.float(), expected(directory)) < 5e-2


def test_an_fp8_heads_states_are_near_the_oracles(directory: Path, tmp_path: Path) -> None:
    """Inputs of its products are rounded too, as their scales say."""
    write_fp8_head(directory / "head", tmp_path / "head")
    (tmp_path / "model").symlink_to(directory / "model")
    head = make_head(tmp_path, precision=WeightFormat.FP8)
    found = states_in_chunks(head, NUM_TOKENS)
    assert relative_error(found, expected(tmp_path)) < 1e-1


def test_rows_are_those_asked_for_in_their_order(directory: Path) -> None:
    rows_R = torch.tensor([6, 0, 3])
    found = states_in_chunks(make_head(directory), 10, rows_R=rows_R)
    want = torch.cat([part.index_select(0, rows_R) for part in expected(directory).split(10)])
    assert relative_error(found, want) < 1e-4


def test_tokens_that_nobody_asks_about_are_seen_by_later_ones(directory: Path) -> None:
    head = make_head(directory)
    nobody = states_in_chunks(head, NUM_TOKENS, rows_R=torch.empty(0, dtype=torch.int64))
    assert nobody.shape == (0, HIDDEN)
    progress = make_progress("r", [0] * NUM_TOKENS)
    last = NUM_TOKENS - 1
    entry = ScheduledRequest(progress, last, 1, [last], array("i", range(20, 10, -1)), False)
    (batch,) = build_batches([entry], page_size=PAGE_SIZE, num_micro_batches=1)
    found = head.forward(inputs()[1][last:], batch)
    assert relative_error(found, expected(directory)[last:]) < 1e-4


def test_an_empty_micro_batch_gives_nothing(directory: Path) -> None:
    (batch,) = build_batches([], page_size=PAGE_SIZE, num_micro_batches=1)
    empty = torch.empty(0, HIDDEN)
    assert make_head(directory).forward(empty, batch).shape == (0, HIDDEN)
