"""Sampling: the generator, the filters, the draw, penalties, logprobs."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.sampling import (
    Draw,
    greedy,
    logprobs,
    penalize,
    sample,
    sample_reference,
    uniform,
)

NEVER = -torch.inf


def row(vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def test_uniform_is_the_documented_constant() -> None:
    assert uniform(0, 0) == 0.6524484863740322


def test_uniform_is_uniform_over_positions_and_seeds() -> None:
    for values in ([uniform(7, i) for i in range(4000)], [uniform(i, 7) for i in range(4000)]):
        assert all(0.0 <= value < 1.0 for value in values)
        counts = torch.histc(torch.tensor(values), bins=10, min=0, max=1)
        assert counts.min() > 320
        assert counts.max() < 480
        assert len(set(values)) == 4000


def test_uniform_takes_any_integer_as_seed() -> None:
    assert uniform(-1, 3) == uniform(2**64 - 1, 3)


def test_greedy_takes_the_lowest_of_equal_logits() -> None:
    for vocabulary in (5, 256, 1024):
        logits_BV = torch.zeros(2, vocabulary)
        logits_BV[1, [3, vocabulary - 1]] = 1.0
        assert greedy(logits_BV).tolist() == [0, 3]


@pytest.mark.parametrize("vocabulary", [1, 100, 512, 131072])
def test_greedy_matches_argmax(vocabulary: int) -> None:
    logits_BV = torch.stack([row(vocabulary, seed) for seed in range(3)])
    assert torch.equal(greedy(logits_BV), logits_BV.argmax(dim=-1))


def test_sample_worked_example() -> None:
    logits_V = torch.tensor([0.0, NEVER, 0.0])
    assert sample(logits_V, Draw(uniform=0.4)).item() == 0
    assert sample(logits_V, Draw(uniform=0.6)).item() == 2


@pytest.mark.parametrize("extreme", [0.0, 1.0 - 2.0**-53])
def test_sample_never_draws_what_has_no_weight(extreme: float) -> None:
    logits_V = torch.tensor([NEVER, 1.0, NEVER, 0.5, NEVER])
    assert sample(logits_V, Draw(uniform=extreme)).item() == (1 if extreme == 0.0 else 3)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 7},
        {"top_p": 0.5},
        {"top_p": 1e-9},
        {"min_p": 0.2},
        {"temperature": 2.0, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=str,
)
def test_sample_matches_reference(settings: dict[str, float]) -> None:
    for seed in range(4):
        logits_V = row(60, seed)
        for position in range(25):
            draw = Draw(uniform=uniform(seed, position), **settings)
            assert sample(logits_V, draw).item() == sample_reference(logits_V, draw)


def test_sample_top_p_over_a_flat_vocabulary_looks_beyond_the_best() -> None:
    logits_V = row(5000) * 0.01
    draws = [Draw(uniform=uniform(1, i), top_p=0.9) for i in range(20)]
    found = [sample(logits_V, draw).item() for draw in draws]
    assert found == [sample_reference(logits_V, draw) for draw in draws]
    assert len(set(found)) > 15


def test_sample_keeps_or_drops_equal_logits_together() -> None:
    logits_V = torch.tensor([1.0, 1.0, 1.0, 0.0])
    found = {sample(logits_V, Draw(uniform=i / 50, top_k=2)).item() for i in range(50)}
    assert found == {0, 1, 2}


def test_sample_follows_the_distribution() -> None:
    logits_V = torch.tensor([0.0, 1.0, 2.0, 3.0])
    found = [sample(logits_V, Draw(uniform=uniform(3, i))).item() for i in range(4000)]
    frequency = torch.bincount(torch.tensor(found), minlength=4) / 4000
    torch.testing.assert_close(frequency, logits_V.softmax(0), atol=0.02, rtol=0.0)


def test_logprobs_are_of_the_row_as_given() -> None:
    logits_V = torch.tensor([0.0, 2.0, 1.0, 2.0])
    logprob_V, best = logprobs(logits_V, 3)
    torch.testing.assert_close(logprob_V.exp().sum(), torch.tensor(1.0))
    assert [token for token, _ in best] == [1, 3, 2]
    assert best[0][1] == pytest.approx(logprob_V[1].item())
    assert logprobs(logits_V, 0)[1] == []


def test_penalize_worked_values() -> None:
    logits_V = torch.tensor([2.0, -2.0, 1.0, 0.0])
    seen, produced = torch.tensor([0, 1]), torch.tensor([2])
    penalize(
        logits_V, seen, produced, torch.tensor([3]), repetition=2.0, presence=0.5, frequency=0.25
    )
    assert logits_V.tolist() == [1.0, -4.0, -0.25, 0.0]


@pytest.mark.parametrize("temperature", [1e-40, 1e-7])
def test_sample_is_greedy_at_temperatures_that_float32_cannot_divide_by(temperature):
    logits_V = torch.tensor([0.5, 3.0, -torch.inf, 2.9])
    draw = Draw(uniform=0.99, temperature=temperature, top_k=0, top_p=1.0, min_p=0.0)
    assert int(sample(logits_V, draw)) == 1


@pytest.mark.parametrize("vocabulary", [511, 512, 513, 2048, 2100])
def test_sample_finds_its_token_in_any_block(vocabulary: int) -> None:
    logits_V = row(vocabulary)
    logits_V[torch.arange(vocabulary) % 700 > 20] = NEVER  # most blocks have no weight
    for number in (0.0, 0.1, 0.35, 0.5, 0.77, 0.99, 1.0 - 2.0**-53):
        draw = Draw(uniform=number)
        assert sample(logits_V, draw).item() == sample_reference(logits_V, draw)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.5}], ids=str)
@pytest.mark.parametrize("vocabulary", [5, 1024, 1025])
def test_sample_gives_a_token_of_the_vocabulary_for_nan(
    vocabulary: int, settings: dict[str, float]
) -> None:
    logits_V = torch.full((vocabulary,), torch.nan)
    assert 0 <= sample(logits_V, Draw(uniform=0.5, **settings)).item() < vocabulary


def test_sample_top_p_of_a_whole_vocabulary_matches_reference() -> None:
    for scale in (0.01, 1.0, 3.0):
        logits_V = row(3000) * scale
        for top_p in (0.05, 0.9, 0.999):
            for position in range(3):
                draw = Draw(uniform=uniform(5, position), top_p=top_p)
                assert sample(logits_V, draw).item() == sample_reference(logits_V, draw)
