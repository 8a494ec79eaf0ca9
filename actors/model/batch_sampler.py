"""Next tokens for all rows of a step at once, for logits on a GPU.

Row by row it chooses as `sampler` does on a CPU. The host sends tables of what the rows ask for
in one copy, and waits once: for the copy that brings tokens and log probabilities back.

Shape letters: B rows, V vocabulary, W words of 32 tokens, A rows that ask for log probabilities,
C tokens shown for each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ostro.actors.engine.request import TokenLogprob
from ostro.actors.engine.step import SampledToken
from ostro.actors.model.packed_copy import send_together
from ostro.kernels.batch_sampling import (
    Draws,
    adjust,
    best_tokens,
    log_normalizer,
    sample_rows,
)
from ostro.kernels.sampling import Draw, uniform

if TYPE_CHECKING:
    from ostro.actors.model.sampler import SamplingRow


class BatchSampler:
    """Chooses the tokens of a batch. Keeps no state.

    Args:
        vocab_size: V.
        sample_rows: The kernel that chooses; `batch_sampling.sample_rows` says what it does.
        log_normalizer: The kernel below log probabilities, as in `batch_sampling`.
    """

    def __init__(
        self,
        vocab_size: int,
        sample_rows: Callable[
            [torch.Tensor, Draws, torch.Tensor | None], torch.Tensor
        ] = sample_rows,
        log_normalizer: Callable[[torch.Tensor], torch.Tensor] = log_normalizer,
    ) -> None:
        self._vocab_size = vocab_size
        self._sample_rows = sample_rows
        self._log_normalizer = log_normalizer

    @torch.inference_mode()
    def sample(self, logits_BV: torch.Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """Choose one token for each row; `logits_BV`, float32, is left unchanged."""
        if not rows:
            return []
        draws = Draws.of([_draw(row) for row in rows], torch.device("cpu"))
        tables = {"settings_B5": draws.settings_B5, **_tables(rows, self._vocab_size)}
        sent = send_together(list(tables.values()), logits_BV.device)
        tables = dict(zip(tables, sent, strict=True))
        draws = replace(draws, settings_B5=tables["settings_B5"])
        ids_B = self._sample_rows(_adjusted(logits_BV, tables), draws, tables.get("allowed_BW"))
        if (forced_B := tables.get("forced_B")) is not None:
            ids_B = torch.where(forced_B < 0, ids_B, forced_B)
        asked = _asked(rows)
        if not asked:
            return [SampledToken(token_id) for token_id in ids_B.tolist()]
        shown_AC, logprob_AC = self._logprobs(logits_BV, ids_B, tables["asked_A"], rows)
        # Everything as float64, which holds ids exactly, so that one copy brings it.
        shape, num_shown = shown_AC.shape, shown_AC.numel()
        parts = (ids_B.double(), shown_AC.flatten().double(), logprob_AC.flatten().double())
        ids, shown, logprob = torch.cat(parts).cpu().split([len(rows), num_shown, num_shown])
        logprobs: list[TokenLogprob | None] = [None] * len(rows)
        table = zip(asked, shown.long().view(shape), logprob.view(shape), strict=True)
        for b, shown_C, logprob_C in table:
            logprobs[b] = _logprob(shown_C.tolist(), logprob_C.tolist(), rows[b])
        return [SampledToken(*pair) for pair in zip(ids.long().tolist(), logprobs, strict=True)]

    def _logprobs(
        self,
        logits_BV: torch.Tensor,
        ids_B: torch.Tensor,
        asked_A: torch.Tensor,
        rows: Sequence[SamplingRow],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each row that asks: the chosen token and the best ones, and their logprobs."""
        logits_AV = logits_BV[asked_A]
        shown_AC = ids_B[asked_A][:, None]
        num_best = max(row.params.num_logprobs or 0 for row in rows)
        if num_best:
            shown_AC = torch.cat([shown_AC, best_tokens(logits_AV, num_best)], dim=1)
        return shown_AC, logits_AV.gather(1, shown_AC) - self._log_normalizer(logits_AV)[:, None]


def _tables(rows: Sequence[SamplingRow], vocab_size: int) -> dict[str, torch.Tensor]:
    """What rows ask for beside their settings, on the host; nothing of what none asks for."""
    tables = _changes(rows, vocab_size)
    if any(row.allowed is not None for row in rows):
        tables["allowed_BW"] = _allowed(rows, vocab_size)
    if any(row.forced_token_id is not None for row in rows):
        forced = [-1 if row.forced_token_id is None else row.forced_token_id for row in rows]
        tables["forced_B"] = torch.tensor(forced)
    if asked := _asked(rows):
        tables["asked_A"] = torch.tensor(asked)
    return tables


def _asked(rows: Sequence[SamplingRow]) -> list[int]:
    """The rows that ask for log probabilities."""
    return [b for b, row in enumerate(rows) if row.params.num_logprobs is not None]


def _changes(rows: Sequence[SamplingRow], vocab_size: int) -> dict[str, torch.Tensor]:
    """The arguments of `adjust`, or none if no row has penalties, bias or bans."""
    seen, repetition = [], []
    changed: list[int] = []
    added: list[float] = []
    for b, row in enumerate(rows):
        if row.forced_token_id is not None or not row.adjusts_logits():
            continue
        start = b * vocab_size
        if row.params.repetition_penalty != 1.0:
            token_ids = row.progress.request.prompt_token_ids + row.progress.output_token_ids
            seen.append(torch.tensor(token_ids, dtype=torch.int64) + start)
            repetition.append(torch.full((len(token_ids),), row.params.repetition_penalty))
        for token_id, value in _added(row).items():
            if 0 <= token_id < vocab_size:  # no other is ever chosen
                changed.append(start + token_id)
                added.append(value)
    if not seen and not changed:
        return {}
    return {
        "seen": torch.cat(seen) if seen else torch.empty(0, dtype=torch.int64),
        "repetition": torch.cat(repetition) if seen else torch.empty(0),
        "changed": torch.tensor(changed, dtype=torch.int64),
        "added": torch.tensor(added, dtype=torch.float32),
    }


def _adjusted(logits_BV: torch.Tensor, tables: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The logits, or a copy with penalties, bias and bans if some row has any."""
    if "seen" not in tables:
        return logits_BV
    return adjust(logits_BV, *(tables[name] for name in ("seen", "repetition", "changed", "added")))


def _allowed(rows: Sequence[SamplingRow], vocab_size: int) -> torch.Tensor:
    """Bits of the tokens that each row may choose, int32 [B, W]; of free and forced rows all."""
    num_bytes = (vocab_size + 31) // 32 * 4
    every = bytearray(b"\xff") * num_bytes
    words = bytearray().join(
        every
        if row.allowed is None or row.forced_token_id is not None
        else memoryview(row.allowed)[:num_bytes]
        for row in rows
    )
    return torch.frombuffer(words, dtype=torch.int32).view(len(rows), -1)


def _draw(row: SamplingRow) -> Draw:
    params = row.params
    if row.forced_token_id is not None or params.temperature == 0.0:
        return Draw(uniform=0.0, temperature=0.0)
    return Draw(
        uniform=uniform(params.seed, row.position),
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
    )


def _added(row: SamplingRow) -> dict[int, float]:
    """What is added to the row's logits after the repetition penalty, by token id."""
    params, added = row.params, dict[int, float]()
    if params.presence_penalty or params.frequency_penalty:
        for token_id, count in Counter(row.progress.output_token_ids).items():
            added[token_id] = -(params.presence_penalty + params.frequency_penalty * count)
    for bias in (params.logit_bias, dict((row.bias,)) if row.bias else {}):
        for token_id, value in bias.items():
            added[token_id] = added.get(token_id, 0.0) + value
    added.update(dict.fromkeys((*params.banned_token_ids, *row.banned_token_ids), -torch.inf))
    return added


def _logprob(shown: list[int], logprob: list[float], row: SamplingRow) -> TokenLogprob:
    num_best = row.params.num_logprobs or 0
    best = list(zip(shown, logprob, strict=True))[1 : 1 + num_best]
    best.sort(key=lambda pair: (-pair[1], pair[0]))
    return TokenLogprob(shown[0], logprob[0], best)
