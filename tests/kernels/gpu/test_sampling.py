"""Sampling by Triton: each filter, mixtures, masks, ties, and that rows do not see each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ostro.kernels.batch_sampling import Draws
from ostro.kernels.gpu.sampling import sample_rows_triton
from ostro.kernels.sampling import Draw, sample_reference, uniform

NEVER = -torch.inf
LAST = 1.0 - 2.0**-53
KINDS: tuple[dict[str, float], ...] = (
    {"temperature": 0.0},
    {},
    {"temperature": 0.3},
    {"temperature": 1e-7},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 4000},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"top_p": 1e-9},
    {"min_p": 0.2},
    {"temperature": 0.0, "top_k": 3, "top_p": 0.5},
    {"temperature": 2.0, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.2, "top_k": 300, "top_p": 0.9},
)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What nobody wrote is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def some_logits(num_rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocabulary, generator=generator) * 3


def triton_ids(
    logits_BV: torch.Tensor, draws: list[Draw], device: str, allowed_BW: torch.Tensor | None = None
) -> list[int]:
    ids_B = sample_rows_triton(
        logits_BV.to(device),
        Draws.of(draws, torch.device(device)),
        None if allowed_BW is None else allowed_BW.to(device),
    )
    assert ids_B.dtype == torch.int64
    ids: list[int] = ids_B.tolist()
    return ids


def expected_ids(logits_BV: torch.Tensor, draws: list[Draw]) -> list[int]:
    return [
        sample_reference(logits_V, draw) if draw.temperature else int(logits_V.argmax())
        for logits_V, draw in zip(logits_BV, draws, strict=True)
    ]


def test_sample_rows_triton_worked_example(triton_device: str) -> None:
    logits_BV = torch.tensor([[0.0, NEVER, 0.0]] * 3)
    draws = [Draw(0.9, temperature=0.0), Draw(0.4), Draw(0.6)]
    assert triton_ids(logits_BV, draws, triton_device) == [0, 0, 2]
    only_two = torch.full((3, 1), 4, dtype=torch.int32)
    assert triton_ids(logits_BV, draws, triton_device, only_two) == [2, 2, 2]


@pytest.mark.parametrize("vocabulary", [1, 5, 257, 5000])
def test_sample_rows_triton_matches_reference(vocabulary: int, triton_device: str) -> None:
    for seed in range(2):
        logits_BV = some_logits(len(KINDS), vocabulary, seed)
        logits_BV[torch.rand(logits_BV.shape, generator=torch.Generator().manual_seed(5)) < 0.2] = (
            NEVER
        )
        logits_BV[:, vocabulary // 2] = 1.0
        draws = [Draw(uniform(seed, i), **kind) for i, kind in enumerate(KINDS)]
        assert triton_ids(logits_BV, draws, triton_device) == expected_ids(logits_BV, draws)


@pytest.mark.parametrize("kind", KINDS[:10:3], ids=str)
def test_sample_rows_triton_matches_reference_over_many_numbers(
    kind: dict[str, float], triton_device: str
) -> None:
    logits_BV = some_logits(1, 300).expand(24, -1)
    draws = [Draw(i / 24, **kind) for i in range(24)]
    assert triton_ids(logits_BV, draws, triton_device) == expected_ids(logits_BV, draws)


@pytest.mark.parametrize("number", [0.0, 2.0**-53, LAST])
@pytest.mark.parametrize("vocabulary", [5, 5000])
def test_sample_rows_triton_at_the_ends_of_the_distribution(
    number: float, vocabulary: int, triton_device: str
) -> None:
    logits_BV = torch.full((len(KINDS), vocabulary), NEVER)
    logits_BV[:, 1], logits_BV[:, vocabulary - 2] = 1.0, 1.0
    draws = [Draw(number, **kind) for kind in KINDS]
    last = [1 if draw.temperature == 0.0 else vocabulary - 2 for draw in draws]
    expected = last if number == LAST else [1] * len(KINDS)
    assert triton_ids(logits_BV, draws, triton_device) == expected


def test_sample_rows_triton_follows_the_distribution(triton_device: str) -> None:
    # The numbers lie on a grid, so that the proportions are exact.
    weight_V = torch.tensor([1.0, 2.0, 0.0, 3.0, 4.0])
    draws = [Draw((i + 0.5) / 200) for i in range(200)]
    found = triton_ids(weight_V.log().expand(200, -1), draws, triton_device)
    assert torch.bincount(torch.tensor(found), minlength=5).tolist() == [20, 40, 0, 60, 80]


def test_sample_rows_triton_follows_what_top_p_keeps(triton_device: str) -> None:
    weight_V = torch.tensor([1.0, 2.0, 3.0, 4.0])
    draws = [Draw((i + 0.5) / 45, top_p=0.75) for i in range(45)]
    found = triton_ids(weight_V.log().expand(45, -1), draws, triton_device)
    assert torch.bincount(torch.tensor(found), minlength=4).tolist() == [0, 10, 15, 20]


def test_sample_rows_triton_takes_the_lowest_of_equal_logits(triton_device: str) -> None:
    logits_BV = torch.zeros(3, 9000)
    logits_BV[1, [4096, 4097, 8999]] = 1.0
    logits_BV[2, :] = NEVER
    draws = [Draw(0.9, temperature=0.0)] * 3
    assert triton_ids(logits_BV, draws, triton_device) == [0, 4096, 0]


def test_sample_rows_triton_keeps_or_drops_equal_logits_together(triton_device: str) -> None:
    logits_BV = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).expand(30, -1)
    draws = [Draw(i / 30, top_k=2) for i in range(30)]
    assert set(triton_ids(logits_BV, draws, triton_device)) == {0, 1, 2}


def test_sample_rows_triton_draws_from_a_flat_vocabulary(triton_device: str) -> None:
    # Weights differ by more than float32 rounds them.
    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.stack([torch.randperm(5000, generator=generator) * 1e-5 for _ in range(8)])
    draws = [Draw(uniform(1, i), top_p=0.9, top_k=4500 * (i % 2)) for i in range(8)]
    assert triton_ids(logits_BV, draws, triton_device) == expected_ids(logits_BV, draws)


@pytest.mark.parametrize("vocabulary", [5, 257, 5000])
def test_sample_rows_triton_draws_only_what_the_mask_allows(
    vocabulary: int, triton_device: str
) -> None:
    logits_BV = some_logits(len(KINDS), vocabulary)
    generator = torch.Generator().manual_seed(1)
    is_allowed_BV = torch.rand(logits_BV.shape, generator=generator) < 0.3
    is_allowed_BV[:, vocabulary - 1] = True
    num_words = -(-vocabulary // 32)
    bits_BV = torch.nn.functional.pad(
        is_allowed_BV.long(), (0, num_words * 32 - vocabulary), value=1
    )
    word_BW = (bits_BV.view(-1, num_words, 32) << torch.arange(32)).sum(-1)
    draws = [Draw(uniform(2, i), **kind) for i, kind in enumerate(KINDS)]
    found = triton_ids(logits_BV, draws, triton_device, word_BW.to(torch.int32))
    assert found == expected_ids(logits_BV.masked_fill(~is_allowed_BV, NEVER), draws)


def test_sample_rows_triton_does_not_depend_on_the_batch(triton_device: str) -> None:
    logits_BV = some_logits(len(KINDS), 5000) * 0.3
    draws = [Draw(uniform(3, i), **kind) for i, kind in enumerate(KINDS)]
    together = triton_ids(logits_BV, draws, triton_device)
    backwards = triton_ids(logits_BV.flip(0), draws[::-1], triton_device)
    alone = [
        triton_ids(logits_BV[i : i + 1], [draws[i]], triton_device)[0] for i in range(len(KINDS))
    ]
    assert together == backwards[::-1] == alone


def test_sample_rows_triton_gives_a_token_of_the_vocabulary_whatever_the_logits(
    triton_device: str,
) -> None:
    logits_BV = torch.tensor(
        [[NEVER] * 3, [torch.nan] * 3, [0.0, torch.inf, 0.0], [torch.nan, 1.0, 1.0]]
    )
    for kind in ({}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.0}):
        found = triton_ids(logits_BV, [Draw(0.7, **kind)] * 4, triton_device)
        assert all(0 <= token_id < 3 for token_id in found)
        assert found[2] == 1


def test_sample_rows_triton_takes_no_rows_and_bfloat16(triton_device: str) -> None:
    assert triton_ids(torch.empty(0, 7), [], triton_device) == []
    logits_BV = some_logits(len(KINDS), 257).bfloat16()
    draws = [Draw(uniform(4, i), **kind) for i, kind in enumerate(KINDS)]
    assert triton_ids(logits_BV, draws, triton_device) == expected_ids(logits_BV.float(), draws)
