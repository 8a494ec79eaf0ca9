"""Generation events and errors to the messages of `protos/generation.proto`."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration

from ostro.actors.engine.stages import STAGES
from ostro.actors.errors import OstroError
from ostro.cluster.error_table import answer_for, public_message
from ostro.cluster.generation import (
    BETWEEN_STEPS,
    Finished,
    GenerationEvent,
    Started,
    TextDelta,
    Timing,
    TokenText,
    ToolCall,
    ToolCallDone,
    Usage,
)
from ostro.protos import generation_pb2 as pb

EFFORT_NUMBERS = {
    "none": pb.REASONING_EFFORT_NONE,
    "minimal": pb.REASONING_EFFORT_MINIMAL,
    "low": pb.REASONING_EFFORT_LOW,
    "medium": pb.REASONING_EFFORT_MEDIUM,
    "high": pb.REASONING_EFFORT_HIGH,
    "xhigh": pb.REASONING_EFFORT_XHIGH,
    "max": pb.REASONING_EFFORT_MAX,
}
_REASONS = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "model_length": pb.FINISH_REASON_MODEL_LENGTH,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
    "cancelled": pb.FINISH_REASON_CANCELLED,
}
_ENDED_BY = {
    "model": pb.ReasoningReport.ENDED_BY_MODEL,
    "budget": pb.ReasoningReport.ENDED_BY_BUDGET,
    "caller": pb.ReasoningReport.ENDED_BY_CALLER,
}


def chat_messages(event: GenerationEvent) -> Iterable[pb.StreamChatResponse]:
    """The messages of a chat stream that tell an event."""
    if isinstance(event, TextDelta):
        return (pb.StreamChatResponse(delta=_delta(event)),)
    if isinstance(event, Started):
        return (pb.StreamChatResponse(started=_started(event)),)
    if isinstance(event, ToolCallDone):
        call = pb.ToolCallDone(choice=event.choice, call=_tool_call(event.call))
        return (pb.StreamChatResponse(tool_call=call),)
    finish = pb.StreamChatResponse(finish=_finish(event))
    return (finish, pb.StreamChatResponse(ended=_ended(event))) if event.is_last else (finish,)


def text_messages(event: GenerationEvent) -> Iterable[pb.StreamGenerateResponse]:
    """The messages of a text stream that tell an event."""
    if isinstance(event, TextDelta):
        return (pb.StreamGenerateResponse(delta=_delta(event)),)
    if isinstance(event, Started):
        return (pb.StreamGenerateResponse(started=_started(event)),)
    if isinstance(event, ToolCallDone):
        return ()
    finish = pb.StreamGenerateResponse(finish=_finish(event))
    return (finish, pb.StreamGenerateResponse(ended=_ended(event))) if event.is_last else (finish,)


def failure_message(error: OstroError) -> pb.Failure:
    """The last message of a stream that failed, for readers who see no status details."""
    answer = answer_for(error)
    return pb.Failure(
        code=answer.grpc_code.value[0],
        reason=error.code.upper(),
        message=public_message(error),
        retryable=answer.retryable,
    )


class WholeChat:
    """Gathers events until they can be told as one `ChatResponse`."""

    def __init__(self) -> None:
        self._response = pb.ChatResponse()
        self._thinking: list[list[str]] = []
        self._text: list[list[str]] = []

    def add(self, event: GenerationEvent) -> None:
        """Take the next event."""
        if isinstance(event, Started):
            self._begin(event)
            return
        choice = self._response.choices[event.choice]
        if isinstance(event, TextDelta):
            (self._thinking if event.thinking else self._text)[event.choice].append(event.text)
            choice.token_ids.extend(event.token_ids)
            choice.logprobs.extend(_logprob(token) for token in event.logprobs)
        elif isinstance(event, ToolCallDone):
            choice.message.tool_calls.append(_tool_call(event.call))
        else:
            choice.finish.CopyFrom(_finish(event))
            choice.reasoning.CopyFrom(choice.finish.report)
            self._response.usage.CopyFrom(_usage(event.usage))
            self._response.timing.CopyFrom(_timing(event.timing))

    def response(self) -> pb.ChatResponse:
        """The answer, after the last event."""
        for choice in self._response.choices:
            thinking = "".join(self._thinking[choice.index])
            text = "".join(self._text[choice.index])
            if thinking:
                choice.message.parts.add(thinking=pb.Thinking(text=thinking, closed=True))
            if text:
                choice.message.parts.add(text=text)
        return self._response

    def _begin(self, event: Started) -> None:
        self._response.request_id, self._response.model = event.request_id, event.model
        for index in range(event.num_choices):
            self._response.choices.add(index=index).message.role = pb.ROLE_ASSISTANT
            self._thinking.append([])
            self._text.append([])


def _started(event: Started) -> pb.Started:
    reasoning = pb.ReasoningOptions(effort=EFFORT_NUMBERS[event.effort])
    if event.budget_tokens is not None:
        reasoning.max_thinking_tokens = event.budget_tokens
    return pb.Started(
        request_id=event.request_id,
        model=event.model,
        prompt_tokens=event.num_prompt_tokens,
        cached_prompt_tokens=event.num_cached_tokens,
        reasoning=reasoning,
    )


def _delta(event: TextDelta) -> pb.Delta:
    delta = pb.Delta(
        choice=event.choice,
        channel=pb.CHANNEL_THINKING if event.thinking else pb.CHANNEL_ANSWER,
        text=event.text,
    )
    if event.token_ids:
        delta.token_ids.extend(event.token_ids)
    if event.logprobs:
        delta.logprobs.extend(_logprob(token) for token in event.logprobs)
    return delta


def _tool_call(call: ToolCall) -> pb.ToolCall:
    return pb.ToolCall(id=call.call_id, name=call.name, arguments=call.arguments)


def _logprob(token: TokenText) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=token.token_id,
        logprob=token.logprob,
        text=token.text,
        top=[
            pb.TokenLogprob.Alternative(token_id=token_id, text=text, logprob=logprob)
            for token_id, text, logprob in token.top
        ],
    )


def _finish(event: Finished) -> pb.Finish:
    finish = pb.Finish(
        choice=event.choice,
        reason=_REASONS[event.reason],
        report=pb.ReasoningReport(
            thinking_tokens=event.reasoning.thinking_tokens,
            ended_by=_ENDED_BY.get(
                event.reasoning.ended_by or "", pb.ReasoningReport.ENDED_BY_UNSPECIFIED
            ),
        ),
    )
    if event.matched_stop is not None:
        finish.stop = event.matched_stop
    elif event.stop_token_id is not None:
        finish.stop_token_id = event.stop_token_id
    return finish


def _ended(event: Finished) -> pb.Ended:
    return pb.Ended(usage=_usage(event.usage), timing=_timing(event.timing))


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        image_tokens=usage.image_tokens,
        completion_tokens=usage.completion_tokens,
        thinking_tokens=usage.thinking_tokens,
        accepted_prediction_tokens=usage.accepted_prediction_tokens,
        rejected_prediction_tokens=usage.rejected_prediction_tokens,
    )


def _timing(timing: Timing) -> pb.Timing:
    parts = timing.parts()
    told = pb.Timing(
        queued=_duration(timing.queued_s),
        prefill=_duration(timing.prefill_s),
        first_token=_duration(timing.first_token_s),
        first_answer_token=_duration(timing.first_answer_token_s),
        total=_duration(timing.total_s),
        gateway=_duration(parts.get("gateway")),
        decode=_duration(timing.decode_s),
    )
    if timing.stages:
        stages = {name: _duration(parts[name]) for name in (*STAGES, BETWEEN_STEPS)}
        told.stages.CopyFrom(pb.StageTiming(**stages))
    return told


def _duration(seconds: float | None) -> Duration | None:
    if seconds is None:
        return None
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
