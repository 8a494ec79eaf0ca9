"""What a step is made of: what goes into it, what comes out, and how busy the scheduler is."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

import msgspec

from ostro.actors.engine.request import (
    FinishReason,
    GenerationRequest,
    RequestProgress,
    TokenEvent,
    TokenLogprob,
)
from ostro.actors.errors import OstroError


class SampledToken(msgspec.Struct, frozen=True):
    """What the sampler chose for one request."""

    token_id: int
    logprob: TokenLogprob | None = None


class ScheduledRequest(msgspec.Struct, gc=False):
    """One request's part in a step: positions [start, start + num_tokens).

    Attributes:
        token_ids: None stands for the token that an earlier step has yet to sample; only the last
            can be None.
        pages: The request's own by reference; it may grow, but what this step needs stays.
        samples: Whether the step samples the request's next token: after the last one that is no
            draft. Of a draft that it equals the next token is sampled too, and so on.
        num_drafts: How many of the tokens, the last ones, are guesses.
        outputs: What the step has brought to an entry with drafts.
        drafts_are_told: See `RequestProgress`.
    """

    progress: RequestProgress
    start: int
    num_tokens: int
    token_ids: list[int | None]
    pages: array[int]
    samples: bool
    num_drafts: int = 0
    outputs: list[SampledToken] | None = None
    drafts_are_told: bool = False

    def is_next_draft_right(self) -> bool:
        """Whether the last of the outputs, which there are, was guessed."""
        num_outputs = len(self.outputs or ())
        if num_outputs > self.num_drafts or self.outputs is None:
            return False
        place = self.num_tokens - self.num_drafts + num_outputs - 1
        return self.token_ids[place] == self.outputs[-1].token_id

    def num_accepted(self) -> int:
        """Drafts that were right and had a token sampled after them, once the step is through."""
        return max(len(self.outputs or ()) - 1, 0)


@dataclass(slots=True)
class ScheduledStep:
    """What one step computes.

    Attributes:
        index: Counts up from 0; steps are completed in this order.
        preempted: Ids of requests that lost their pages to this step.
        num_tokens: Of all entries, drafts included.
        num_drafts: Likewise.
        num_decodes: Entries that advance by one token and their drafts, the first ones.
        budget: What `num_tokens` may come to without drafts.
        seconds: How long it had the device to itself, once it is completed.
    """

    index: int
    scheduled_s: float
    entries: list[ScheduledRequest] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    num_tokens: int = 0
    num_drafts: int = 0
    num_decodes: int = 0
    budget: int = 0
    seconds: float = 0.0

    def has_no_prompts(self) -> bool:
        """Whether it does nothing but decode."""
        return self.num_tokens == self.num_decodes + self.num_drafts


class ShardLoad(msgspec.Struct, frozen=True, array_like=True):
    """How busy an attention shard is: the first five of this moment, the others totals.

    Totals are of its epoch where the shard tells them, of the cell's life in a `State`.

    Attributes:
        num_free_pages: Pages that can be had without preempting anyone.
        num_prompt_tokens: Of requests that have begun to run.
        prefix_hits_tokens: Of `prefix_queries_tokens`, those found in the prefix cache.
        num_drafted: First drafts that were verified, second ones, and so on; empty without any.
        num_accepted: Those of them that were right and all before them too, likewise.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_free_pages: int = 0
    num_pages: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    prefix_queries_tokens: int = 0
    prefix_hits_tokens: int = 0
    num_drafted: tuple[int, ...] = ()
    num_accepted: tuple[int, ...] = ()

    def at_rest(self) -> ShardLoad:
        """The same shard without its requests."""
        return msgspec.structs.replace(
            self, num_running=0, num_waiting=0, num_waiting_tokens=0, num_free_pages=self.num_pages
        )

    def after(self, earlier: ShardLoad) -> ShardLoad:
        """This moment, with the totals of both."""
        both = {name: getattr(self, name) + getattr(earlier, name) for name in _TOTALS}
        by_depth = {
            name: _added(getattr(self, name), getattr(earlier, name)) for name in _TOTALS_BY_DEPTH
        }
        return msgspec.structs.replace(self, **both, **by_depth)


_TOTALS = ShardLoad.__struct_fields__[5:-2]
_TOTALS_BY_DEPTH = ShardLoad.__struct_fields__[-2:]


def _added(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(sum, zip_longest(first, second, fillvalue=0)))


class Busy(NamedTuple):
    """What a shard has to do at this moment; see `ShardLoad`."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    num_free_pages: int


@dataclass(slots=True)
class Totals:
    """What a shard has done in its epoch."""

    preemptions: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    hit_tokens: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def begin(self, progress: RequestProgress, num_cached: int) -> None:
        """Count a request that begins to run and found so many of its tokens in the cache."""
        progress.num_cached_tokens = min(num_cached, progress.num_prompt_tokens)
        self.prompt_tokens += progress.num_prompt_tokens
        self.hit_tokens += progress.num_cached_tokens

    def verify(self, num_drafts: int, num_accepted: int) -> None:
        """Count the drafts of an entry, of which so many were right."""
        missing = num_drafts - len(self.drafted)
        if missing > 0:
            self.drafted += [0] * missing
            self.accepted += [0] * missing
        for depth in range(num_drafts):
            self.drafted[depth] += 1
            self.accepted[depth] += depth < num_accepted

    def load(self, now: Busy, num_pages: int) -> ShardLoad:
        """Both as one message."""
        return ShardLoad(
            **now._asdict(),
            num_pages=num_pages,
            num_preemptions=self.preemptions,
            num_prompt_tokens=self.prompt_tokens,
            num_output_tokens=self.output_tokens,
            prefix_queries_tokens=self.prompt_tokens,
            prefix_hits_tokens=self.hit_tokens,
            num_drafted=tuple(self.drafted),
            num_accepted=tuple(self.accepted),
        )


def token_event(
    progress: RequestProgress,
    first_index: int,
    token_ids: list[int],
    logprobs: list[TokenLogprob] | None,
    reason: FinishReason | None,
) -> TokenEvent:
    """What readers are told of new tokens, of an end, or of both.

    The first one and the last one tell the request's time.
    """
    thinking, prediction = progress.thinking, progress.prediction
    stop_token_id = None
    if reason is FinishReason.STOP and token_ids and token_ids[-1] in progress.stop_token_ids:
        stop_token_id = token_ids[-1]
    stopwatch, seconds = progress.stopwatch, None
    if stopwatch is not None and (reason is not None or not stopwatch.has_told):
        seconds = stopwatch.read(is_last=reason is not None)
    return TokenEvent(
        progress.request_id,
        first_index,
        token_ids,
        logprobs,
        progress.num_cached_tokens,
        thinking.num_thinking_tokens if thinking is not None else 0,
        thinking.ended_by if thinking is not None else None,
        reason,
        stop_token_id,
        seconds=seconds,
        choice=progress.request.choice,
        num_predicted_tokens=prediction.num_met if prediction is not None else 0,
    )


def outputs_event(entry: ScheduledRequest, reason: FinishReason | None) -> TokenEvent:
    """The same of all that a step brought to an entry with drafts."""
    outputs = entry.outputs or []
    first_index = len(entry.progress.output_token_ids) - len(outputs)
    logprobs = [output.logprob for output in outputs if output.logprob is not None]
    token_ids = [output.token_id for output in outputs]
    return token_event(entry.progress, first_index, token_ids, logprobs or None, reason)


def error_event(request: GenerationRequest, error: OstroError, first_index: int = 0) -> TokenEvent:
    """The last event of a request that cannot be served, or no longer."""
    return TokenEvent(
        request.request_id,
        first_index,
        [],
        finish_reason=FinishReason.ERROR,
        error_code=error.code,
        error_message=error.message,
        choice=request.choice,
    )
