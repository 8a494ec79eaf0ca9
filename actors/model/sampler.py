"""Next tokens for the rows of a step: adjusts logits as each request asks, then chooses.

Rows are independent of each other: whatever the batch, a request's token depends on its own
logits, parameters, seed and position.

Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import torch

from ostro.actors.engine.request import RequestProgress, SamplingParams, TokenLogprob
from ostro.actors.engine.step import SampledToken
from ostro.actors.model.batch_sampler import BatchSampler
from ostro.kernels.allowed_tokens import best_allowed, gather_allowed
from ostro.kernels.sampling import Draw, greedy, logprobs, penalize, sample, uniform


class SamplingRow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One row of logits and how its token is chosen.

    Attributes:
        progress: The request: parameters, and the tokens so far where penalties count them.
        position: Absolute position of the new token, in prompt and output together.
        forced_token_id: Take this token, whatever the logits say.
        bias: (token id, added to its logit), besides the request's own `logit_bias`.
        banned_token_ids: Never chosen, besides the request's own.
        allowed: Bits of the only tokens to choose from, as in `token_rules.SamplingState`; None for
            any.
    """

    progress: RequestProgress
    position: int
    forced_token_id: int | None = None
    bias: tuple[int, float] | None = None
    banned_token_ids: Sequence[int] = ()
    allowed: bytearray | None = None

    @property
    def params(self) -> SamplingParams:
        """The request's sampling parameters."""
        return self.progress.request.sampling

    def adjusts_logits(self) -> bool:
        """Whether anything changes the logits before the choice among what is allowed."""
        params = self.params
        return bool(
            params.needs_counts
            or params.logit_bias
            or params.banned_token_ids
            or self.bias
            or self.banned_token_ids
        )


class Sampler:
    """Chooses tokens. Keeps no state: a row says all there is to know."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._batch_sampler = BatchSampler(vocab_size)

    @torch.inference_mode()
    def sample(
        self, logits: torch.Tensor | Sequence[torch.Tensor], rows: Sequence[SamplingRow]
    ) -> list[SampledToken]:
        """Choose one token for each row.

        Log probabilities are of the model's own distribution: before penalties, bias, temperature
        and filters.

        Args:
            logits: float32 [B, V], or the micro-batches' parts of it in order; left unchanged.
            rows: B of them.
        """
        parts = (logits,) if isinstance(logits, torch.Tensor) else tuple(logits)
        logits_BV = parts[0] if len(parts) == 1 else torch.cat(parts)
        if logits_BV.is_cuda:
            # Launches, not work, are dear there; here one row at a time is faster.
            return self._batch_sampler.sample(logits_BV, rows)
        chosen = self._choose(logits_BV, rows)
        return [
            SampledToken(token_id, _logprob(logits_BV[index], token_id, row.params.num_logprobs))
            for index, (token_id, row) in enumerate(zip(chosen, rows, strict=True))
        ]

    def _choose(self, logits_BV: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
        plain = [
            index
            for index, row in enumerate(rows)
            if row.params.temperature == 0.0
            and row.forced_token_id is None
            and row.allowed is None
            and not row.adjusts_logits()
        ]
        if len(plain) == len(rows):
            return _ids(greedy(logits_BV)) if rows else []
        chosen = {
            index: row.forced_token_id
            for index, row in enumerate(rows)
            if row.forced_token_id is not None
        }
        if plain:
            chosen.update(zip(plain, _ids(greedy(logits_BV[plain])), strict=True))
        drawn = [index for index in range(len(rows)) if index not in chosen]
        if drawn:
            tokens = torch.stack([self._draw(logits_BV[i], rows[i]) for i in drawn])
            chosen.update(zip(drawn, _ids(tokens), strict=True))
        return [chosen[index] for index in range(len(rows))]

    def _draw(self, logits_V: torch.Tensor, row: SamplingRow) -> torch.Tensor:
        params = row.params
        if row.adjusts_logits():
            logits_V = self._adjusted(logits_V, row)
        if params.temperature == 0.0:
            if row.allowed is not None:
                return best_allowed(logits_V, row.allowed)
            return greedy(logits_V[None])[0]
        draw = Draw(
            uniform=uniform(params.seed, row.position),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
        )
        if row.allowed is None:
            return sample(logits_V, draw)
        logits_A, ids_A = gather_allowed(logits_V, row.allowed)
        if not len(ids_A):
            return torch.tensor(0)
        return ids_A[sample(logits_A, draw)].long()

    def _adjusted(self, logits_V: torch.Tensor, row: SamplingRow) -> torch.Tensor:
        """A copy of the row with penalties, bias and bans."""
        logits_V = logits_V.clone()
        if row.params.needs_counts:
            _penalize(logits_V, row.progress)
        self._add_bias(logits_V, row.params.logit_bias)
        if row.bias is not None:
            self._add_bias(logits_V, dict((row.bias,)))
        banned = self._known((*row.params.banned_token_ids, *row.banned_token_ids))
        if banned:
            logits_V[banned] = -torch.inf
        return logits_V

    def _add_bias(self, logits_V: torch.Tensor, bias: Mapping[int, float]) -> None:
        known = self._known(bias)
        if known:
            logits_V[known] += logits_V.new_tensor([bias[token_id] for token_id in known])

    def _known(self, token_ids: Sequence[int] | Mapping[int, float]) -> list[int]:
        """Those that exist: no other is ever chosen, so that bias and bans have no effect on it."""
        return [token_id for token_id in token_ids if 0 <= token_id < self._vocab_size]


def _penalize(logits_V: torch.Tensor, progress: RequestProgress) -> None:
    params, device = progress.request.sampling, logits_V.device
    seen: list[int] = []
    if params.repetition_penalty != 1.0:
        seen = progress.request.prompt_token_ids + progress.output_token_ids
    output = torch.tensor(progress.output_token_ids, dtype=torch.int64)
    output_ids, counts = torch.unique(output, return_counts=True)
    penalize(
        logits_V,
        torch.tensor(seen, dtype=torch.int64, device=device),
        output_ids.to(device),
        counts.to(device),
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
    )


def _logprob(
    logits_V: torch.Tensor, token_id: int, num_logprobs: int | None
) -> TokenLogprob | None:
    if num_logprobs is None:
        return None
    logprob_V, best = logprobs(logits_V, num_logprobs)
    return TokenLogprob(token_id, float(logprob_V[token_id]), best)


def _ids(tokens_B: torch.Tensor) -> list[int]:
    ids: list[int] = tokens_B.tolist()
    return ids
