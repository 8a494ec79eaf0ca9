"""One stream of answers over all the calls that it takes: what to ask next, what to show.

Knows no channel: both clients carry its requests out and hand it what comes back.
"""

from __future__ import annotations

import copy
import secrets
import time
import uuid
from collections import deque
from dataclasses import dataclass

from ostro.actors.errors import DeadlineError, OstroError
from ostro.cluster.client_errors import ConnectionLostError, error_of_failure
from ostro.cluster.client_resume import (
    Continue,
    Received,
    StreamRequest,
    choice_alone,
    nothing_of,
)
from ostro.cluster.error_table import answer_for
from ostro.cluster.retries import Retries
from ostro.protos import generation_pb2 as pb

_SEED_RANGE = 1 << 63


@dataclass(frozen=True, slots=True)
class Resumed:
    """The stream had broken and goes on: what follows continues what came.

    Attributes:
        after: What broke it.
    """

    after: OstroError


Event = pb.Started | pb.Delta | pb.ToolCallDone | pb.Finish | pb.Ended | Resumed
StreamResponse = pb.StreamChatResponse | pb.StreamGenerateResponse


class Attempts:
    """Counts the failures of one question over all its calls, and keeps its deadline."""

    def __init__(self, retries: Retries, timeout_s: float) -> None:
        self._retries = retries
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._num_failures = 0
        self._gained = 0
        self._is_first = True

    def time_left_s(self) -> float:
        """Seconds that the next attempt may take.

        Raises:
            DeadlineError: None are left.
        """
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise DeadlineError(f"the call's timeout of {self._timeout_s:g} s passed")
        return left_s

    def delay_s(self, error: OstroError, gained: int = 0) -> float:
        """Seconds to wait before the next attempt.

        Args:
            error: What the last one failed with.
            gained: How much has come by now; where it has grown, failures are counted anew.

        Raises:
            OstroError: `error`, where another attempt makes no sense or is not allowed.
        """
        # The server may not have noticed yet that the connection of our last attempt is gone.
        is_our_own = error.code == "duplicate_request_id" and not self._is_first
        if not (answer_for(error).retryable or is_our_own):
            raise error
        self._is_first = False
        if gained > self._gained:
            self._gained, self._num_failures = gained, 0
        self._num_failures += 1
        if self._num_failures > self._retries.most:
            raise error
        delay_s = self._retries.delay_s(self._num_failures, error.retry_after_s)
        if delay_s >= self._deadline_s - time.monotonic():
            raise error
        return delay_s


class TokenStream:
    """What one stream asks and brings.

    All choices come by one call, until it breaks. What is left of each is then asked for by a call
    of its own, one after the other under the same request id: one name still steers them all.

    Args:
        asked: As the caller asked; not changed.
        continued: Makes the request that goes on after a break.
        resumes: Go on after a break, instead of failing. For that the request gets a seed, and
            token ids and thinking are asked for; what the caller did not ask for is not shown.

    Attributes:
        request: What to ask next.
    """

    def __init__(self, asked: StreamRequest, continued: Continue, *, resumes: bool) -> None:
        self.request = copy.copy(asked)
        self.request.request_id = asked.request_id or uuid.uuid4().hex
        options = self.request.options
        self._continued = continued
        self._resumes = resumes
        self._hides_ids = self._resumes and not options.return_token_ids
        self._hides_thinking = self._resumes and options.reasoning.omit_thinking
        if self._resumes:
            options.return_token_ids = True
            options.reasoning.omit_thinking = False
            if not options.sampling.HasField("seed"):
                options.sampling.seed = secrets.randbelow(_SEED_RANGE)
        self._asked = self.request
        self._received: dict[int, Received] = {}  # by choice
        self._started: pb.Started | None = None
        self._failure: OstroError | None = None
        self._broken_by: OstroError | None = None  # until that is shown
        self._alone: int | None = None  # after a break: the one choice of this call
        self._next: deque[tuple[int, StreamRequest]] = deque()  # and those of the calls after it
        self._has_shown = self._is_ended = False

    def take(self, message: StreamResponse) -> list[Event]:
        """What there is to show in one message."""
        events = self._read(message)
        self._has_shown |= bool(events)
        return events

    def goes_on(self) -> bool:
        """To be called when a call has ended without an error: whether `request` is one more.

        Raises:
            OstroError: The stream has not ended; this is why.
        """
        if not self._is_ended:
            raise self._failure or ConnectionLostError("the stream broke off without a word")
        if not self._next:
            return False
        self._ask_next()
        return True

    def break_off(self, error: OstroError, attempts: Attempts) -> float:
        """Make `request` what goes on after a failure; gives the seconds to wait before it.

        Raises:
            OstroError: What broke the stream, where nothing goes on.
        """
        if self._failure is not None and isinstance(error, ConnectionLostError):
            error = self._failure  # what the server said tells more
        self._failure = None
        delay_s = attempts.delay_s(error, sum(part.size for part in self._received.values()))
        if self._has_shown:
            self._next = self._rest(error)
            self._broken_by = error
            self._ask_next()
        return delay_s

    def _rest(self, error: OstroError) -> deque[tuple[int, StreamRequest]]:
        """What asks for the rest of each choice; raises `error` where one cannot go on."""
        requests: deque[tuple[int, StreamRequest]] = deque()
        for choice in range(max(self._asked.options.choices, 1)):
            received = self._of(choice)
            if received.is_finished:
                continue
            if not (self._resumes and received.fits_a_prompt):
                raise error
            request = self._continued(choice_alone(self._asked, choice), received)
            if request is None:
                raise error
            received.break_off()
            requests.append((choice, request))
        if not requests:
            raise error  # all has come but the figures
        return requests

    def _ask_next(self) -> None:
        self._alone, self.request = self._next.popleft()
        self._is_ended = False

    def _of(self, choice: int) -> Received:
        if choice not in self._received:
            received = self._received[choice] = nothing_of(self._asked)
            told = self._started
            if told is not None and told.reasoning.HasField("max_thinking_tokens"):
                received.budget_tokens = told.reasoning.max_thinking_tokens
        return self._received[choice]

    def _read(self, message: StreamResponse) -> list[Event]:
        match message.WhichOneof("event"):
            case "started":
                return self._start(message.started)
            case "delta":
                return self._add(message.delta)
            case "tool_call" if isinstance(message, pb.StreamChatResponse):
                self._choice_of(message.tool_call).fits_a_prompt = False
                return [message.tool_call]
            case "finish":
                return self._finish(message.finish)
            case "ended":
                self._is_ended = True
                return self._end(message.ended)
            case "failure":
                self._failure = error_of_failure(message.failure)
        return []

    def _start(self, started: pb.Started) -> list[Event]:
        if self._started is None:
            self._started = started
            return [started]
        broken_by, self._broken_by = self._broken_by, None
        return [] if broken_by is None else [Resumed(broken_by)]

    def _finish(self, finish: pb.Finish) -> list[Event]:
        self._choice_of(finish).finish(finish)
        if finish.reason != pb.FINISH_REASON_CANCELLED:
            return [finish]
        # Whoever cancels a request means all of it, also what is not asked for yet.
        others = [pb.Finish(choice=choice, reason=finish.reason) for choice, _ in self._next]
        self._next.clear()
        return [finish, *others]

    def _choice_of(self, event: pb.Delta | pb.ToolCallDone | pb.Finish) -> Received:
        """What has come of an event's choice, whose number it gets back."""
        if self._alone is not None:
            event.choice = self._alone
        return self._of(event.choice)

    def _add(self, delta: pb.Delta) -> list[Event]:
        received = self._choice_of(delta)
        if self._resumes:
            received.add(delta)
        if self._hides_thinking and delta.channel == pb.CHANNEL_THINKING:
            return []
        if self._hides_ids:
            delta.ClearField("token_ids")
        return [delta] if delta.text or delta.token_ids or delta.logprobs else []

    def _end(self, ended: pb.Ended) -> list[Event]:
        """The figures of the whole: of its prompt as it was asked, of tokens from all calls."""
        if self._next:
            return []
        if self._alone is not None and self._started is not None:
            usage, choices = ended.usage, self._received.values()
            usage.prompt_tokens = self._started.prompt_tokens
            usage.cached_prompt_tokens = self._started.cached_prompt_tokens
            usage.completion_tokens = sum(len(part.token_ids) for part in choices)
            usage.thinking_tokens = sum(part.num_thinking_tokens for part in choices)
            # Of the calls that broke nobody told.
            usage.accepted_prediction_tokens = usage.rejected_prediction_tokens = 0
        return [ended]
