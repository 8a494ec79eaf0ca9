"""Rules of one token: what must hold for a request's next one, and whether its last one ends it."""

from __future__ import annotations

from typing import NamedTuple

from ostro.actors.engine.request import FinishReason, RequestProgress


class SamplingState(NamedTuple):
    """What the scheduler asks of the sampler for a request's next token, beyond its parameters.

    Attributes:
        forced_token_id: Take this token, whatever the logits say.
        bias: (token id, added to its logit).
        banned_token_ids: Never choose these.
    """

    forced_token_id: int | None
    bias: tuple[int, float] | None
    banned_token_ids: tuple[int, ...]


_FREE_CHOICE = SamplingState(None, None, ())


def sampling_state(progress: RequestProgress) -> SamplingState:
    """What holds for the next token of a request whose output is known up to there."""
    thinking = progress.thinking
    banned: tuple[int, ...] = ()
    if len(progress.output_token_ids) < progress.request.stop.min_tokens:
        banned = tuple(progress.stop_token_ids)
    if thinking is None:
        return SamplingState(None, None, banned) if banned else _FREE_CHOICE
    bias = thinking.end_bias()
    return SamplingState(
        thinking.next_token(),
        (thinking.end_token_id, bias) if bias else None,
        banned + thinking.banned_token_ids,
    )


def reason_to_end(progress: RequestProgress) -> FinishReason | None:
    """Why a request's last output token ends it, or None if it goes on.

    A stop token ends it only as the first of at least `min_tokens` others: of tokens
    [a, b, eos] with min_tokens=2 the third ends it, with min_tokens=3 it does not.
    """
    stop, output = progress.request.stop, progress.output_token_ids
    if output and output[-1] in progress.stop_token_ids and len(output) > stop.min_tokens:
        return FinishReason.STOP
    if len(output) >= stop.max_tokens:
        return FinishReason.LENGTH
    if progress.num_known_tokens >= progress.max_num_tokens:
        return FinishReason.MODEL_LENGTH
    return None
