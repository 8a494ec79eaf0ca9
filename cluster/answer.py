"""What a cell brings to one request, turned into events for a face.

`ChoiceReader` follows the tokens of one choice; `Answer` holds the readers of all choices and
counts and times the whole.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ostro.actors.engine.followed_text import TOKEN_BYTES
from ostro.actors.engine.request import (
    GRAMMAR_FAILED,
    FinishReason,
    TokenEvent,
    TokenLogprob,
)
from ostro.actors.engine.stopwatch import ShardSeconds
from ostro.actors.errors import InvalidRequestError, OstroError, OverloadedError
from ostro.cluster.detokenizer import TokenTable
from ostro.cluster.generation import (
    Finished,
    GenerationEvent,
    ReasoningReport,
    Started,
    TextDelta,
    Timing,
    TokenText,
    ToolCallDone,
    Usage,
)
from ostro.cluster.output_parser import Channel, OutputParser, ParsedStep
from ostro.cluster.prompt import PromptBuilder
from ostro.cluster.request_builder import Prepared

# What a shard says of a request that it does not take; the router and the client raise the rest.
_ERRORS: dict[str, type[OstroError]] = {
    OverloadedError.code: OverloadedError,
    InvalidRequestError.code: InvalidRequestError,
    "context_length_exceeded": InvalidRequestError,  # more than the shard's cache holds
    GRAMMAR_FAILED: InvalidRequestError,
}


class Answer:
    """All choices of one request: `TokenEvent`s in, events for the face out.

    Attributes:
        has_begun: Whether a token has come.
        is_finished: Whether every choice has ended.

    Args:
        prepared: One per prompt.
        arrived_s: When the request arrived, by `time.monotonic`.
    """

    def __init__(
        self, prepared: Sequence[Prepared], prompts: PromptBuilder, model: str, arrived_s: float
    ) -> None:
        self.has_begun = self.is_finished = False
        self._prepared = prepared
        self._model = model
        self._arrived_s = arrived_s
        self._choices = [
            ChoiceReader(of_prompt, prompts, of_prompt.request.choice + index)
            for of_prompt in prepared
            for index in range(of_prompt.request.num_choices)
        ]
        self._num_open = len(self._choices)
        self._num_prompt_tokens = sum(len(p.request.prompt_token_ids) for p in prepared)
        self._num_cached_tokens = 0
        # Of the choices that have ended:
        self._num_tokens = self._num_thinking_tokens = 0
        self._num_accepted = self._num_rejected = 0
        self._first_token_s: float | None = None
        self._first_answer_token_s: float | None = None

    def has_ended(self, choice: int) -> bool:
        """Whether a choice has ended, be it before the cell has said so."""
        return self._choices[choice].is_finished

    def take(self, event: TokenEvent) -> list[GenerationEvent]:
        """Read one event of the cell; what comes after a choice's end brings nothing.

        Raises:
            OstroError: As the code of an ERROR event says.
        """
        if self.has_ended(event.choice):
            return []
        choice = self._choices[event.choice]
        if event.finish_reason is FinishReason.ERROR:
            raise choice.error(event)
        if choice.has_begun:
            brought = choice.take(event)
        else:
            brought = [*self._begin(choice, event), *choice.take(event)]
        if self._first_answer_token_s is None:
            self._mark_times(choice)
        if choice.is_finished:
            self._num_open -= 1
            self.is_finished = not self._num_open
            self._num_tokens += choice.num_tokens
            self._num_thinking_tokens += choice.num_thinking_tokens
            self._num_accepted += choice.num_accepted
            self._num_rejected += choice.num_rejected
            brought.append(self._finished(choice))
        return brought

    def _begin(self, choice: ChoiceReader, event: TokenEvent) -> list[GenerationEvent]:
        if choice.is_first_of_prompt:  # the others find its pages
            self._num_cached_tokens += event.num_cached_tokens
        if self.has_begun:
            return []
        self.has_begun = True
        return [self._started(event)]

    def _mark_times(self, choice: ChoiceReader) -> None:
        now_s = time.monotonic() - self._arrived_s
        if self._first_token_s is None and choice.num_tokens:
            self._first_token_s = now_s
        if choice.has_answered:
            self._first_answer_token_s = now_s

    def _started(self, event: TokenEvent) -> Started:
        first = self._prepared[0]
        return Started(
            request_id=first.request.request_id,
            model=self._model,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=event.num_cached_tokens,
            effort=first.effort,
            budget_tokens=first.budget_tokens,
            num_choices=len(self._choices),
            tenant=first.options.tenant,
        )

    def _finished(self, choice: ChoiceReader) -> Finished:
        return Finished(
            reason=choice.reason,
            usage=Usage(
                prompt_tokens=self._num_prompt_tokens,
                cached_prompt_tokens=self._num_cached_tokens,
                completion_tokens=self._num_tokens,
                thinking_tokens=self._num_thinking_tokens,
                image_tokens=sum(of_prompt.num_image_tokens for of_prompt in self._prepared),
                accepted_prediction_tokens=self._num_accepted,
                rejected_prediction_tokens=self._num_rejected,
            ),
            reasoning=choice.report(),
            timing=self._timing(choice.seconds),
            matched_stop=choice.matched_stop,
            stop_token_id=choice.stop_token_id,
            choice=choice.choice,
            is_last=self.is_finished,
        )

    def _timing(self, seconds: ShardSeconds | None) -> Timing:
        total_s = time.monotonic() - self._arrived_s
        first_s, prefill_s, decode_s = self._first_token_s, None, None
        if seconds is not None:
            prefill_s, decode_s = seconds.prefill_s, seconds.decode_s
            if decode_s is None:  # a stop string ended it, of which the shard has not heard
                decode_s = 0.0 if first_s is None else total_s - first_s
        return Timing(
            queued_s=0.0 if seconds is None else seconds.queued_s,
            first_token_s=first_s,
            first_answer_token_s=self._first_answer_token_s,
            total_s=total_s,
            prefill_s=prefill_s,
            decode_s=decode_s,
            stages={} if seconds is None else seconds.stages,
        )


class ChoiceReader:
    """What one choice has brought so far.

    Attributes:
        has_begun: Whether an event has come.
        has_answered: Whether any of it was answer text or a call.
        is_finished: Whether it has ended.
        num_tokens: Output tokens up to a stop string.
        num_accepted: Tokens of the prediction that the output had.
        seconds: Its time at the shard, as far as it was told.
        reason: Why it ended; see `generation.Finished`.
        matched_stop: See `generation.Finished`.
        stop_token_id: See `generation.Finished`.
    """

    def __init__(self, prepared: Prepared, prompts: PromptBuilder, choice: int) -> None:
        self.choice = choice
        self.is_first_of_prompt = choice == prepared.request.choice
        self.has_begun = self.has_answered = self.is_finished = False
        self.num_tokens = self.num_thinking_tokens = self.num_accepted = 0
        self.seconds: ShardSeconds | None = None
        self.reason = ""
        self.matched_stop: str | None = None
        self.stop_token_id: int | None = None
        self._prepared = prepared
        self._table: TokenTable = prompts.table
        self._parser = OutputParser(
            prompts.table,
            prompts.special,
            prepared.output_format,
            stop=prepared.options.stop,
            min_tokens=prepared.options.min_tokens,
            starts_in_thinking=prepared.starts_in_thinking,
        )
        self._num_received = 0  # output tokens that came, repeats not counted
        self._num_calls = 0
        self._thinking_ended_by: str | None = None

    def take(self, event: TokenEvent) -> list[GenerationEvent]:
        """Read the next event of this choice."""
        token_ids, logprobs = self._new_tokens(event)
        self.num_thinking_tokens = max(self.num_thinking_tokens, event.num_thinking_tokens)
        self._thinking_ended_by = event.thinking_ended_by or self._thinking_ended_by
        if event.seconds is not None:
            self.seconds = event.seconds
        step = self._parse(event, token_ids)
        if not self.has_begun:
            self.has_begun = True
            step.answer = self._prepared.echo + step.answer
        brought: list[GenerationEvent] = [*self._deltas(step, token_ids, logprobs)]
        for call in step.calls:
            brought.append(ToolCallDone(index=self._num_calls, call=call, choice=self.choice))
            self._num_calls += 1
        # What came after a stop string is not the output's.
        self.num_accepted = min(event.num_predicted_tokens, self.num_tokens)
        if self.is_finished:
            self._end(event)
        return brought

    @property
    def num_rejected(self) -> int:
        """Tokens of the prediction that the output had not."""
        return len(self._prepared.request.prediction) // TOKEN_BYTES - self.num_accepted

    def report(self) -> ReasoningReport:
        """What became of its thinking."""
        return ReasoningReport(
            effort=self._prepared.effort,
            budget_tokens=self._prepared.budget_tokens,
            thinking_tokens=self.num_thinking_tokens,
            ended_by=self._thinking_ended_by,
        )

    def error(self, event: TokenEvent) -> OstroError:
        """What an ERROR event says."""
        code = event.error_code or OstroError.code
        kind = _ERRORS.get(code, OstroError)
        return kind(
            event.error_message or "the generation failed",
            code=code,
            param=self._field_at_fault(code) if kind is InvalidRequestError else None,
        )

    def _field_at_fault(self, code: str) -> str:
        if code != GRAMMAR_FAILED:
            return self._prepared.prompt_field
        answer_format = self._prepared.options.answer_format
        return "tools" if answer_format is None else answer_format.where

    def _new_tokens(self, event: TokenEvent) -> tuple[list[int], list[TokenLogprob]]:
        num_repeated = self._num_received - event.first_index
        if num_repeated < 0 and event.token_ids:
            raise OstroError(f"output tokens from {self._num_received} on were lost on their way")
        token_ids = event.token_ids[max(num_repeated, 0) :]
        self._num_received += len(token_ids)
        return token_ids, (event.logprobs or [])[max(num_repeated, 0) :]

    def _parse(self, event: TokenEvent, token_ids: list[int]) -> ParsedStep:
        ends_on_token = event.stop_token_id is not None and bool(token_ids)
        step = self._parser.feed(token_ids[:-1] if ends_on_token else token_ids)
        if ends_on_token and step.matched_stop is None:
            step.channels.append(Channel.STOP)
        self.num_tokens += len(step.channels)
        self.matched_stop = step.matched_stop
        self.is_finished = event.finish_reason is not None or step.matched_stop is not None
        if self.is_finished and step.matched_stop is None:
            step.add(self._parser.finish())
        self.has_answered = self.has_answered or bool(step.answer or step.calls)
        return step

    def _deltas(
        self, step: ParsedStep, token_ids: list[int], logprobs: list[TokenLogprob]
    ) -> list[TextDelta]:
        deltas = []
        for text, is_thinking in ((step.thinking, True), (step.answer, False)):
            if is_thinking and self._prepared.options.omit_thinking:
                continue
            places = self._places(step, is_thinking=is_thinking)
            delta = TextDelta(
                text=text,
                thinking=is_thinking,
                token_ids=self._shown_ids(token_ids, places),
                logprobs=self._shown_logprobs(step, logprobs, places),
                choice=self.choice,
            )
            if delta.text or delta.token_ids or delta.logprobs:
                deltas.append(delta)
        return deltas

    def _places(self, step: ParsedStep, *, is_thinking: bool) -> list[int]:
        """Of the tokens of one channel; none where neither their ids nor logprobs are asked for."""
        options = self._prepared.options
        if not options.return_token_ids and options.num_logprobs is None:
            return []
        return [
            place
            for place, channel in enumerate(step.channels)
            if (channel is Channel.THINKING) is is_thinking
        ]

    def _shown_ids(self, token_ids: list[int], places: list[int]) -> tuple[int, ...]:
        if not self._prepared.options.return_token_ids:
            return ()
        return tuple(token_ids[place] for place in places)

    def _shown_logprobs(
        self, step: ParsedStep, logprobs: list[TokenLogprob], places: list[int]
    ) -> tuple[TokenText, ...]:
        """Of tokens that are text: control tokens, calls and stop tokens are not the reader's."""
        num_top = self._prepared.options.num_logprobs
        if num_top is None:
            return ()
        return tuple(
            self._token_text(logprobs[place], num_top)
            for place in places
            if place < len(logprobs)
            and step.channels[place] in (Channel.THINKING, Channel.ANSWER)
            and not self._table.is_special(logprobs[place].token_id)
        )

    def _token_text(self, logprob: TokenLogprob, num_top: int) -> TokenText:
        return TokenText(
            token_id=logprob.token_id,
            text=self._table.name(logprob.token_id),
            logprob=logprob.logprob,
            top=tuple((i, self._table.name(i), value) for i, value in logprob.top[:num_top]),
        )

    def _end(self, event: TokenEvent) -> None:
        reason = FinishReason.STOP if self.matched_stop else event.finish_reason
        if reason is FinishReason.LENGTH and self._prepared.length_is_context:
            reason = FinishReason.MODEL_LENGTH
        if reason is FinishReason.STOP and self._num_calls:
            self.reason = "tool_calls"
        else:
            self.reason = (reason or FinishReason.STOP).value
        if not self.matched_stop and event.stop_token_id in self._prepared.options.stop_token_ids:
            self.stop_token_id = event.stop_token_id
