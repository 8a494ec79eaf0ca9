"""Conversations as the head takes them, and its drafts at every position with what was wanted.

Shape letters: B sequences, T tokens, Q rows that draft, D hidden.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from eagle import EagleHead
from eagle_corpus import Heard, Target
from encoding import IMG, PAD
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, slots=True)
class HeadBatch:
    """Conversations, padded on the right.

    Attributes:
        hidden_BTD: The target's H.
        embedded_BTD: Of each position's next token; image features where that is an image's.
        rows_BQ: Positions whose next two tokens are the target's to say: a server drafts there.
        is_row_BQ: False where `rows_BQ` is padded.
        said_BT: Whether each token is the target's to say; False on padding.
    """

    ids_BT: torch.Tensor
    hidden_BTD: torch.Tensor
    embedded_BTD: torch.Tensor
    rows_BQ: torch.Tensor
    is_row_BQ: torch.Tensor
    said_BT: torch.Tensor


@dataclass(frozen=True, slots=True)
class Draft:
    """One draft of every row, the tokens before it being those that were really said.

    Attributes:
        out_BQD: What the head says, for `lm_head`.
        hidden_BQD: H of the position whose next token is drafted: what the target said it from.
        token_BQ: The token that was said there.
        made_BQ: Whether there is such a token, and it is the target's.
    """

    out_BQD: torch.Tensor
    hidden_BQD: torch.Tensor
    token_BQ: torch.Tensor
    made_BQ: torch.Tensor


def head_batch(target: Target, heard: Sequence[Heard]) -> HeadBatch:
    """Pad conversations to one batch."""
    ids_BT = pad_sequence([one.ids_T for one in heard], batch_first=True, padding_value=PAD)
    embedded_BTD = target.table_VD[ids_BT]
    for row, one in enumerate(heard):
        if len(one.images_ID):
            embedded_BTD[row, : len(one.ids_T)][one.ids_T == IMG] = one.images_ID.float()
    rows = [torch.nonzero(one.said_T[1:-1] & one.said_T[2:]).squeeze(1) for one in heard]
    is_row = [torch.ones(len(places), dtype=torch.bool) for places in rows]
    return HeadBatch(
        ids_BT=ids_BT,
        hidden_BTD=pad_sequence([one.hidden_TD.float() for one in heard], batch_first=True),
        embedded_BTD=embedded_BTD.roll(-1, 1),  # the last position's is never used
        rows_BQ=pad_sequence(rows, batch_first=True),
        is_row_BQ=pad_sequence(is_row, batch_first=True),
        said_BT=pad_sequence([one.said_T for one in heard], batch_first=True),
    )


def drafts(head: EagleHead, batch: HeadBatch) -> Iterator[Draft]:
    """The first draft of every row, then the next one from the head's own output, endlessly."""
    last, rows_BQ = batch.ids_BT.shape[1] - 1, batch.rows_BQ
    out, drafting = head(batch.embedded_BTD, batch.hidden_BTD, rows_BQ)
    made_BQ = batch.is_row_BQ
    while True:
        here_BQ = (rows_BQ + drafting.depth).clamp(max=last)
        next_BQ = (here_BQ + 1).clamp(max=last)
        made_BQ = made_BQ & (here_BQ < last) & batch.said_BT.gather(1, next_BQ)
        yield Draft(out, _take(batch.hidden_BTD, here_BQ), batch.ids_BT.gather(1, next_BQ), made_BQ)
        out = head.go_on(_take(batch.embedded_BTD, here_BQ), out, drafting)


def batches(
    target: Target, rng: random.Random, corpus: Sequence[Heard], num_rows: int
) -> Iterator[HeadBatch]:
    """Endlessly over the corpus, shuffled, in batches of about so many rows of like length."""
    while True:
        order = sorted(rng.sample(corpus, len(corpus)), key=lambda heard: int(heard.said_T.sum()))
        groups: list[list[Heard]] = [[]]
        for heard in order:
            if (len(groups[-1]) + 1) * int(heard.said_T.sum()) > num_rows and groups[-1]:
                groups.append([])
            groups[-1].append(heard)
        rng.shuffle(groups)
        for group in groups:
            yield head_batch(target, group)


def _take(x_BTD: torch.Tensor, place_BQ: torch.Tensor) -> torch.Tensor:
    return x_BTD.gather(1, place_BQ[..., None].expand(-1, -1, x_BTD.shape[-1]))
