"""The samplers: what each parameter does to a row, and that rows do not see each other.

Rows of a CPU are chosen one by one, those of a GPU together; both mean the same.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from model_rig import make_progress

from ostro.actors.engine.request import SamplingParams
from ostro.actors.engine.step import SampledToken
from ostro.actors.model.batch_sampler import BatchSampler
from ostro.actors.model.sampler import Sampler, SamplingRow
from ostro.kernels.sampling import uniform

VOCABULARY = 512

Sample = Callable[[torch.Tensor, Sequence[SamplingRow]], list[SampledToken]]
Choose = Callable[..., list[int]]


def triton_sample() -> Sample:
    """What a GPU does: on one where there is one, else in Triton's interpreter."""
    if torch.cuda.is_available():
        return lambda logits_BV, rows: Sampler(VOCABULARY).sample(logits_BV.cuda(), rows)
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is a GPU, but this torch does not see it")
    import triton_interpreter

    triton_interpreter.repair()
    from ostro.kernels.gpu.log_normalizer import log_normalizer_triton
    from ostro.kernels.gpu.sampling import sample_rows_triton

    return BatchSampler(VOCABULARY, sample_rows_triton, log_normalizer_triton).sample


@pytest.fixture(params=["by row", "by batch", "by batch in triton"])
def sample(request: pytest.FixtureRequest) -> Sample:
    """Chooses tokens of rows of logits."""
    if request.param == "by batch in triton":
        return triton_sample()
    return (Sampler if request.param == "by row" else BatchSampler)(VOCABULARY).sample


@pytest.fixture
def choose(sample: Sample) -> Choose:
    """Ids of the tokens alone; rows as further arguments."""
    return lambda logits_BV, *rows: [token.token_id for token in sample(logits_BV, rows)]


def row(
    position: int = 10,
    *,
    prompt: tuple[int, ...] = (1,),
    output: tuple[int, ...] = (),
    forced: int | None = None,
    bias: tuple[int, float] | None = None,
    banned: tuple[int, ...] = (),
    allowed: Sequence[int] | None = None,
    **params: object,
) -> SamplingRow:
    sampling = SamplingParams(**params)
    return SamplingRow(
        progress=make_progress("r", prompt, sampling=sampling, output=output),
        position=position,
        forced_token_id=forced,
        bias=bias,
        banned_token_ids=banned,
        allowed=None if allowed is None else bits(allowed),
    )


def bits(token_ids: Sequence[int]) -> bytearray:
    """The mask that allows these tokens, with a word more than the vocabulary needs."""
    return bytearray(
        sum(1 << token_id for token_id in token_ids).to_bytes(VOCABULARY // 8 + 4, "little")
    )


def logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def test_temperature_zero_is_greedy(choose: Choose) -> None:
    logits_BV = logits(3)
    assert choose(logits_BV, row(), row(), row()) == logits_BV.argmax(-1).tolist()


def test_no_rows_give_no_tokens(choose: Choose) -> None:
    assert choose(logits(0)) == []


def test_parts_of_micro_batches_are_taken_in_order() -> None:
    logits_BV = logits(4)
    parts = [logits_BV[:1], logits_BV[1:1], logits_BV[1:]]
    found = Sampler(VOCABULARY).sample(parts, [row()] * 4)
    assert [token.token_id for token in found] == logits_BV.argmax(-1).tolist()


def test_a_forced_token_is_taken_whatever_the_logits(choose: Choose) -> None:
    assert choose(logits(2), row(forced=77, temperature=1.0, banned=(77,)), row(forced=3)) == [
        77,
        3,
    ]


def test_banned_tokens_are_never_chosen(choose: Choose) -> None:
    logits_BV = logits(1)
    best, second, third = logits_BV[0].topk(3).indices.tolist()
    assert choose(logits_BV, row(banned=(best,))) == [second]
    assert choose(logits_BV, row(banned_token_ids=(best,), banned=(second,))) == [third]


def test_only_allowed_tokens_are_chosen(choose: Choose) -> None:
    logits_BV = logits(1)
    order = logits_BV[0].topk(VOCABULARY).indices.tolist()
    assert choose(logits_BV, row(allowed=(order[7], order[3]))) == [order[3]]
    assert choose(logits_BV, row(allowed=order[3:8], banned=(order[3],))) == [order[4]]
    assert choose(logits_BV, row(allowed=(order[-1],), temperature=1.0, top_k=1)) == [order[-1]]
    assert choose(logits_BV, row(allowed=(order[5],), forced=order[0])) == [order[0]]


def test_bias_of_request_and_row_add_up(choose: Choose) -> None:
    logits_BV = torch.zeros(1, VOCABULARY)
    logits_BV[0, 9] = 10.0
    assert choose(logits_BV, row(bias=(5, 6.0))) == [9]
    assert choose(logits_BV, row(logit_bias={5: 6.0})) == [9]
    assert choose(logits_BV, row(logit_bias={5: 6.0}, bias=(5, 6.0))) == [5]


def test_ids_beyond_the_vocabulary_have_no_effect(choose: Choose) -> None:
    logits_BV = logits(1)
    outside = row(logit_bias={VOCABULARY: 100.0, -1: 100.0}, banned=(10**6,))
    assert choose(logits_BV, outside) == logits_BV.argmax(-1).tolist()


def test_presence_and_frequency_count_output_only(choose: Choose) -> None:
    logits_BV = torch.zeros(1, VOCABULARY)
    logits_BV[0, [4, 5, 6]] = torch.tensor([3.0, 2.5, 2.0])
    assert choose(logits_BV, row(prompt=(4, 4), presence_penalty=2.0)) == [4]
    assert choose(logits_BV, row(output=(4,), presence_penalty=0.75)) == [5]
    assert choose(logits_BV, row(output=(4, 4, 5), frequency_penalty=0.75)) == [6]
    assert choose(logits_BV, row(output=(4, 4, 5), presence_penalty=0.2)) == [4]


def test_repetition_counts_prompt_and_output(choose: Choose) -> None:
    logits_BV = torch.zeros(1, VOCABULARY)
    logits_BV[0, [4, 5, 6]] = torch.tensor([3.0, 2.8, 2.6])
    assert choose(logits_BV, row(prompt=(4, 4), output=(5,), repetition_penalty=1.5)) == [6]


def test_the_draw_follows_seed_and_position_only(choose: Choose) -> None:
    logits_BV = (logits(1) * 0.1).expand(4, -1)
    rows = [row(position, temperature=1.0, seed=7) for position in (10, 11, 10, 12)]
    first, second, third, fourth = choose(logits_BV, *rows)
    assert first == third
    assert len({first, second, fourth}) == 3
    cdf_V = logits_BV[0].double().softmax(-1).cumsum(-1)
    assert first == int((cdf_V <= uniform(7, 10)).sum())


def every_kind_of_row() -> list[SamplingRow]:
    return [
        row(3),
        row(5, temperature=0.9, seed=1),
        row(8, temperature=0.7, seed=2, top_p=0.8),
        row(8, temperature=1.3, seed=3, top_k=20, min_p=0.01),
        row(9, temperature=0.8, seed=4, output=(1, 2, 3), presence_penalty=1.0),
        row(9, temperature=0.0, num_logprobs=2, repetition_penalty=1.2),
        row(2, temperature=1.0, seed=5, num_logprobs=0, banned=(0, 1)),
        row(2, forced=6, num_logprobs=1),
        row(4, temperature=1.0, seed=6, allowed=range(40, 99)),
    ]


def test_a_row_does_not_depend_on_its_batch(sample: Sample) -> None:
    rows, logits_BV = every_kind_of_row(), logits(9, seed=4)
    alone = [sample(logits_BV[i : i + 1], [rows[i]])[0] for i in range(len(rows))]
    shuffler = random.Random(0)
    for _ in range(6):
        order = shuffler.sample(range(len(rows)), shuffler.randint(1, len(rows)))
        found = sample(logits_BV[order], [rows[i] for i in order])
        assert found == [alone[i] for i in order]


def test_logits_are_left_unchanged(choose: Choose) -> None:
    logits_BV = logits(9)
    before_BV = logits_BV.clone()
    choose(logits_BV, *every_kind_of_row())
    assert torch.equal(logits_BV, before_BV)


def test_logprobs_are_of_the_model_not_of_what_was_sampled_from(sample: Sample) -> None:
    logits_BV = logits(1)
    best = int(logits_BV.argmax())
    asked = row(temperature=0.5, seed=1, num_logprobs=3, banned=(best,), logit_bias={7: 50.0})
    (token,) = sample(logits_BV, [asked])
    expected_V = logits_BV[0].log_softmax(-1)
    assert token.token_id == 7
    assert token.logprob is not None
    assert token.logprob.token_id == 7
    assert token.logprob.logprob == pytest.approx(expected_V[7].item())
    assert [token_id for token_id, _ in token.logprob.top] == expected_V.topk(3).indices.tolist()
    assert token.logprob.top[0][1] == pytest.approx(expected_V.max().item())


@pytest.mark.parametrize(("asked", "num_best"), [(None, None), (0, 0), (5, 5)])
def test_as_many_alternatives_as_asked_for(
    asked: int | None, num_best: int | None, sample: Sample
) -> None:
    (token,) = sample(logits(1), [row(num_logprobs=asked)])
    found = None if token.logprob is None else len(token.logprob.top)
    assert found == num_best


def test_alternatives_do_not_depend_on_how_many_others_ask_for(sample: Sample) -> None:
    tied_BV = torch.zeros(2, VOCABULARY)
    token, _ = sample(tied_BV, [row(num_logprobs=2), row(num_logprobs=7)])
    assert token == sample(tied_BV[:1], [row(num_logprobs=2)])[0]


def any_row(shuffler: random.Random) -> SamplingRow:
    """A row that asks for each thing with some likelihood."""

    def maybe(*values: object) -> object:
        return shuffler.choice((*values, *[values[0]] * 2))

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(shuffler.choices(range(VOCABULARY), k=shuffler.randint(0, most)))

    return row(
        shuffler.randint(1, 1000),
        prompt=(1, *tokens(30)),
        output=tokens(30),
        forced=shuffler.choice([None] * 7 + [44]),
        bias=shuffler.choice([None, (3, 2.5)]),
        banned=tokens(3),
        allowed=shuffler.choice([None, None, range(7), tokens(9) + tuple(range(40, 60))]),
        temperature=maybe(1.0, 0.0, 0.4, 1.7),
        top_k=maybe(0, 1, 30),
        top_p=maybe(1.0, 0.9, 0.3),
        min_p=maybe(0.0, 0.1),
        presence_penalty=maybe(0.0, 0.5),
        frequency_penalty=maybe(0.0, 0.25),
        repetition_penalty=maybe(1.0, 1.3),
        logit_bias={token_id: shuffler.uniform(-5, 5) for token_id in tokens(4)},
        seed=shuffler.randint(0, 10**9),
        num_logprobs=maybe(None, 0, 3),
        banned_token_ids=tokens(3),
    )


def test_by_batch_means_the_same_as_by_row(sample: Sample) -> None:
    shuffler = random.Random(0)
    for seed in range(3):
        rows, logits_BV = [any_row(shuffler) for _ in range(24)], logits(24, seed)
        expected = Sampler(VOCABULARY).sample(logits_BV, rows)
        for found, wanted in zip(sample(logits_BV, rows), expected, strict=True):
            assert found.token_id == wanted.token_id
            assert (found.logprob is None) == (wanted.logprob is None)
            if found.logprob is not None and wanted.logprob is not None:
                assert found.logprob.token_id == wanted.token_id
                assert found.logprob.logprob == pytest.approx(wanted.logprob.logprob, abs=1e-5)
                assert [i for i, _ in found.logprob.top] == [i for i, _ in wanted.logprob.top]
