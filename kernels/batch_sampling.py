"""Choose the next tokens of a batch at once, as a GPU wants it: no wait, and few launches.

The meaning is that of `sampling`, row by row; settings and changes to the logits lie on the device,
in one table for all rows.

Shape legend: B rows, V vocabulary, W words of 32 tokens, A rows that ask for log probabilities,
N best tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ostro.kernels.sampling import Draw, greedy, sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """How each row of a batch is drawn; `Draw` for many.

    Attributes:
        settings_B5: float64, on the device of the logits: temperature, top-k, top-p, min-p and
            uniform number, as in `Draw`. Temperature 0 takes the largest logit, the lowest id among
            equals.
        is_greedy: No row has a temperature above 0.
        is_filtered: Some row with a temperature above 0 asks for top-k or top-p.
    """

    settings_B5: torch.Tensor
    is_greedy: bool
    is_filtered: bool

    @classmethod
    def of(cls, draws: Sequence[Draw], device: torch.device) -> Draws:
        """The table of these rows on `device`."""
        settings = [[d.temperature, d.top_k, d.top_p, d.min_p, d.uniform] for d in draws]
        drawn = [draw for draw in draws if draw.temperature > 0.0]
        return cls(
            settings_B5=torch.tensor(settings, dtype=torch.float64, device=device).view(-1, 5),
            is_greedy=not drawn,
            is_filtered=any(draw.top_k or draw.top_p < 1.0 for draw in drawn),
        )


def sample_rows(
    logits_BV: torch.Tensor, draws: Draws, allowed_BW: torch.Tensor | None = None
) -> torch.Tensor:
    """Choose one token for each row.

    Args:
        logits_BV: float32; -inf is never drawn. A row needs one finite logit that is allowed, or
            its token is any of the vocabulary.
        draws: Settings and uniform numbers of the rows.
        allowed_BW: int32, or None: bit v % 32 of word v // 32 is set where token v may be drawn.

    Returns:
        Token ids, int64 [B]; a row's depends on the row alone.

    Example:
        logits [[0., -inf, 0.]] * 3, temperatures [0., 1., 1.] and uniforms [0.9, 0.4, 0.6] give
        [0, 0, 2]; with words [[4]] * 3, which allow token 2 only, [2, 2, 2].
    """
    if not logits_BV.is_cuda:
        return sample_rows_reference(logits_BV, draws, allowed_BW)
    from ostro.kernels.gpu.sampling import sample_rows_triton

    return sample_rows_triton(logits_BV, draws, allowed_BW)


def sample_rows_reference(
    logits_BV: torch.Tensor, draws: Draws, allowed_BW: torch.Tensor | None = None
) -> torch.Tensor:
    """Meaning of `sample_rows`, row by row."""
    if allowed_BW is not None:
        v = torch.arange(logits_BV.shape[1], device=logits_BV.device)
        is_allowed_BV = (allowed_BW[:, v // 32] >> (v % 32)) & 1 != 0
        logits_BV = logits_BV.masked_fill(~is_allowed_BV, -torch.inf)
    ids_B = greedy(logits_BV)
    for b, (temperature, top_k, top_p, min_p, number) in enumerate(draws.settings_B5.tolist()):
        if temperature > 0.0:
            draw = Draw(number, temperature, int(top_k), top_p, min_p)
            ids_B[b] = sample(logits_BV[b], draw)
    return ids_B


def adjust(
    logits_BV: torch.Tensor,
    seen: torch.Tensor,
    repetition: torch.Tensor,
    changed: torch.Tensor,
    added: torch.Tensor,
) -> torch.Tensor:
    """A copy of the logits with repetition penalties, then with changes added.

    Args:
        logits_BV: float32.
        seen: int64 places b * V + v of tokens that were seen, repeats allowed.
        repetition: float32 penalty of each: divides a positive and multiplies a negative logit.
        changed: int64 places, each once.
        added: float32 what is added to each; -inf bans the token.

    Example:
        logits [[2., -2., 1.]], seen [0, 1, 1], repetition [2., 2., 2.], changed [1, 2] and added
        [1., -inf] give [[1., -3., -inf]].
    """
    adjusted_BV = logits_BV.clone(memory_format=torch.contiguous_format)
    flat = adjusted_BV.view(-1)
    if seen.numel():
        # Everything is read before anything is written, so that a repeat writes the same again.
        value = flat[seen]
        flat[seen] = torch.where(value > 0, value / repetition, value * repetition)
    if changed.numel():
        flat[changed] = flat[changed] + added
    return adjusted_BV


def log_normalizer(logits_AV: torch.Tensor) -> torch.Tensor:
    """What log probabilities fall short of the logits, float32 [A]; a row's of the row alone.

    Example:
        logits [[0., 0.]] give [ln 2].
    """
    if not logits_AV.is_cuda:
        return log_normalizer_reference(logits_AV)
    from ostro.kernels.gpu.log_normalizer import log_normalizer_triton

    return log_normalizer_triton(logits_AV)


def log_normalizer_reference(logits_AV: torch.Tensor) -> torch.Tensor:
    """Meaning of `log_normalizer`."""
    return torch.logsumexp(logits_AV.float(), dim=-1)


def best_tokens(logits_AV: torch.Tensor, num_best: int) -> torch.Tensor:
    """Ids of each row's largest logits, int64 [A, N], best first and the lowest id among equals.

    Example:
        logits [[0., 2., 1., 2.]], N 3 give [[1, 3, 2]].
    """
    vocabulary = logits_AV.shape[1]
    # A float's bits order as an int32 once all but the sign of negatives are inverted; minus zero
    # becomes zero first. Below them goes the id, so that no two keys are equal.
    bits_AV = (logits_AV.float() + 0.0).view(torch.int32)
    ordered_AV = torch.where(bits_AV < 0, bits_AV ^ 0x7FFFFFFF, bits_AV).long()
    v = torch.arange(vocabulary, device=logits_AV.device)
    key_AV = ordered_AV * 2**32 + (vocabulary - 1 - v)
    return vocabulary - 1 - (key_AV.topk(min(num_best, vocabulary)).values & 0xFFFFFFFF)
