"""Choices among allowed tokens: operators and their meaning, over odd vocabularies and masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ostro.kernels.allowed_tokens import (
    best_allowed,
    best_allowed_reference,
    gather_allowed,
    gather_allowed_reference,
)
from ostro.kernels.cpu import library

NEVER = -torch.inf

both = pytest.mark.parametrize(
    ("best", "gather"),
    [
        pytest.param(
            best_allowed,
            gather_allowed,
            id="operators",
            marks=pytest.mark.skipif(library.load() is None, reason=str(library.why_absent())),
        ),
        pytest.param(best_allowed_reference, gather_allowed_reference, id="reference"),
    ],
)
Best = Callable[[torch.Tensor, bytearray], torch.Tensor]
Gather = Callable[[torch.Tensor, bytearray], tuple[torch.Tensor, torch.Tensor]]


def bits(is_allowed_V: torch.Tensor, *, beyond: int = 0) -> bytearray:
    """A mask, filled up to whole words and then a word more with ones, if `beyond` is set."""
    number = sum(1 << token_id for token_id in is_allowed_V.nonzero()[:, 0].tolist())
    num_bytes = -(-len(is_allowed_V) // 32) * 4 + 4
    if beyond:
        number |= (1 << num_bytes * 8) - (1 << len(is_allowed_V))
    return bytearray(number.to_bytes(num_bytes, "little"))


@both
def test_worked_examples(best: Best, gather: Gather) -> None:
    logits_V = torch.tensor([3.0, 1.0, 2.0])
    assert best(logits_V, bytearray([0b110])).item() == 2
    assert [part.tolist() for part in gather(logits_V, bytearray([0b110]))] == [[1.0, 2.0], [1, 2]]


@both
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 63, 64, 65, 100, 1000, 4096])
@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_they_find_what_a_loop_over_the_tokens_finds(
    vocabulary: int, share: float, best: Best, gather: Gather
) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    for _ in range(5):
        # Few values, so that there are equals.
        logits_V = torch.randint(-9, 9, (vocabulary,), generator=generator).float()
        is_allowed_V = torch.rand(vocabulary, generator=generator) < share
        is_allowed_V[torch.randint(vocabulary, (1,), generator=generator)] = True
        ids = [v for v in range(vocabulary) if is_allowed_V[v]]
        mask = bits(is_allowed_V, beyond=1)
        logits_A, ids_A = gather(logits_V, mask)
        assert (ids_A.tolist(), ids_A.dtype) == (ids, torch.int32)
        assert logits_A.tolist() == [logits_V[v].item() for v in ids]
        assert best(logits_V, mask).item() == max(ids, key=lambda v: (logits_V[v].item(), -v))


@both
def test_a_token_is_found_where_nothing_may_be_chosen(best: Best, gather: Gather) -> None:
    never_V = torch.full((40,), NEVER)
    for is_allowed_V in (torch.zeros(40, dtype=torch.bool), torch.arange(40) > 30):
        assert 0 <= best(never_V, bits(is_allowed_V)).item() < 40
    logits_A, ids_A = gather(never_V, bits(torch.zeros(40, dtype=torch.bool), beyond=1))
    assert (len(logits_A), len(ids_A)) == (0, 0)


@both
def test_logits_may_be_strided(best: Best, gather: Gather) -> None:
    logits_V = torch.randn(400, generator=torch.Generator().manual_seed(0))[::4]
    mask = bits(torch.arange(100) % 3 == 1)
    assert best(logits_V, mask) == best(logits_V.clone(), mask)
    assert torch.equal(gather(logits_V, mask)[0], logits_V[1::3])


@pytest.mark.parametrize("choose", [best_allowed, gather_allowed])
def test_a_mask_shorter_than_the_row_is_refused(choose: Best | Gather) -> None:
    with pytest.raises(ValueError, match="8 bits for 9 logits"):
        choose(torch.zeros(9), bytearray(1))
