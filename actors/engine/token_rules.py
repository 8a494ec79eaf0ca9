"""Rules of one token: what holds for the next, who is told of it, whether it ends the request."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ostro.actors.engine.effort import ThinkingTracker
from ostro.actors.engine.request import FinishReason, RequestProgress

if TYPE_CHECKING:
    from ostro.actors.engine.answer_grammar import AnswerGrammar


class SamplingState(NamedTuple):
    """What is asked of the sampler for a request's next token, beyond its parameters.

    Attributes:
        forced_token_id: Take this token, whatever the logits say.
        bias: (token id, added to its logit).
        banned_token_ids: Never choose these.
        allowed: Bits of the only tokens to choose from, least significant first, padded to whole
            words of 32; None for any.
    """

    forced_token_id: int | None
    bias: tuple[int, float] | None
    banned_token_ids: tuple[int, ...]
    allowed: bytearray | None = None


_FREE_CHOICE = SamplingState(None, None, ())


def begin(progress: RequestProgress) -> None:
    """Make ready for a request's first token, or for the next after the output it has already."""
    asked = progress.request.thinking
    if asked is not None:
        progress.thinking = ThinkingTracker(asked)
    for token_id in progress.output_token_ids:
        observe(progress, token_id)
    if asked is not None and progress.thinking is not None and asked.ended_by_caller:
        progress.thinking.end_again(progress.output_token_ids)


def observe(progress: RequestProgress, token_id: int) -> None:
    """Take note of a request's next output token: each once, in order, forced ones too."""
    thinking, grammar = progress.thinking, progress.grammar
    was_open = False
    if thinking is not None:
        was_open = thinking.is_open
        thinking.observe(token_id)
    if grammar is not None and not was_open and (thinking is None or not thinking.is_open):
        grammar.observe(token_id)


def sampling_state(progress: RequestProgress) -> SamplingState:
    """What holds for the next token of a request whose output is known up to there.

    Ask after `Scheduler.complete()` of the step before, and before sampling.
    """
    thinking, grammar = progress.thinking, progress.grammar
    banned: tuple[int, ...] = ()
    if len(progress.output_token_ids) < progress.request.stop.min_tokens:
        banned = tuple(progress.stop_token_ids)
    if thinking is not None and thinking.is_open:
        bias = thinking.end_bias()
        return SamplingState(
            thinking.next_token(),
            (thinking.end_token_id, bias) if bias else None,
            banned + (grammar.held_token_ids if grammar is not None else ()),
        )
    if thinking is not None:
        banned += thinking.banned_token_ids
    if grammar is not None:
        return _held_to_grammar(progress, grammar, banned)
    return SamplingState(None, None, banned) if banned else _FREE_CHOICE


def holds_for(progress: RequestProgress, num_tokens: int) -> bool:
    """Whether what holds for the next token holds for so many after it too, whatever they are.

    If not, each has to be asked for when the one before is known.
    """
    if progress.grammar is not None or progress.request.sampling.needs_counts:
        return False
    if len(progress.output_token_ids) < progress.request.stop.min_tokens:
        return False
    return progress.thinking is None or progress.thinking.leaves_free(num_tokens)


def _held_to_grammar(
    progress: RequestProgress, grammar: AnswerGrammar, banned: tuple[int, ...]
) -> SamplingState:
    """Before the answer one thinking may begin; an answer that is over, or stuck, is ended."""
    stop, thinking = progress.request.stop, progress.thinking
    begin_think = None
    if thinking is not None and not grammar.has_begun and thinking.ended_by is None:
        begin_think = thinking.begin_token_id
    if stop.ignore_eos:
        banned = (*banned, stop.eos_token_id)
    allowed = grammar.allowed(
        also=begin_think, banned=banned + progress.request.sampling.banned_token_ids
    )
    if allowed is None:
        return SamplingState(stop.eos_token_id, None, ())
    return SamplingState(None, None, (), allowed)  # what is banned is not allowed either


def reason_to_end(progress: RequestProgress) -> FinishReason | None:
    """Why a request's last output token ends it, or None if it goes on.

    A stop token ends it only as the first of at least `min_tokens` others: of tokens
    [a, b, eos] with min_tokens=2 the third ends it, with min_tokens=3 it does not. An answer that
    its grammar ends needs neither stop token nor length.
    """
    stop, output = progress.request.stop, progress.output_token_ids
    if progress.grammar is not None and progress.grammar.is_complete:
        return FinishReason.STOP
    if output and output[-1] in progress.stop_token_ids and len(output) > stop.min_tokens:
        return FinishReason.STOP
    if len(output) >= stop.max_tokens:
        return FinishReason.LENGTH
    if progress.num_known_tokens >= progress.max_num_tokens:
        return FinishReason.MODEL_LENGTH
    return None
