"""One stream of answers over all the calls that it takes: what to ask next, what to show.

Knows no channel: both clients carry its requests out and hand it what comes back.
"""

from __future__ import annotations

import copy
import secrets
import time
import uuid
from dataclasses import dataclass

from ostro.actors.errors import DeadlineError, OstroError
from ostro.cluster.client_errors import ConnectionLostError, error_of_failure
from ostro.cluster.client_resume import Continue, Received, StreamRequest
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
        self._resumes = resumes and options.choices <= 1
        self._hides_ids = self._resumes and not options.return_token_ids
        self._hides_thinking = self._resumes and options.reasoning.omit_thinking
        if self._resumes:
            options.return_token_ids = True
            options.reasoning.omit_thinking = False
            if not options.sampling.HasField("seed"):
                options.sampling.seed = secrets.randbelow(_SEED_RANGE)
        self._asked = self.request
        self._received = Received()
        self._started: pb.Started | None = None
        self._failure: OstroError | None = None
        self._broken_by: OstroError | None = None
        self._num_before = self._num_thinking_before = 0  # tokens before the last break
        self._has_shown = self._is_finished = self._is_ended = False

    def take(self, message: StreamResponse) -> Event | None:
        """Read one message; None if there is nothing in it to show."""
        event = self._read(message)
        self._has_shown |= event is not None
        return event

    def check_ended(self) -> None:
        """To be called when a call has ended without an error.

        Raises:
            OstroError: The stream has not ended; this is why.
        """
        if not self._is_ended:
            raise self._failure or ConnectionLostError("the stream broke off without a word")

    def break_off(self, error: OstroError, attempts: Attempts) -> float:
        """Make `request` what goes on after a failure; gives the seconds to wait before it.

        Raises:
            OstroError: What broke the stream, where nothing goes on.
        """
        if self._failure is not None and isinstance(error, ConnectionLostError):
            error = self._failure  # what the server said tells more
        self._failure = None
        delay_s = attempts.delay_s(error, self._received.size)
        if not self._has_shown:
            return delay_s  # the same again
        received, request = self._received, None
        if self._resumes and received.fits_a_prompt and not self._is_finished:
            request = self._continued(self._asked, received)
        if request is None:
            raise error
        self.request, self._broken_by = request, error
        self._num_before = len(received.token_ids)
        self._num_thinking_before = received.num_thinking_tokens
        return delay_s

    def _read(self, message: StreamResponse) -> Event | None:
        match message.WhichOneof("event"):
            case "started":
                return self._start(message.started)
            case "delta":
                return self._add(message.delta)
            case "tool_call" if isinstance(message, pb.StreamChatResponse):
                self._received.fits_a_prompt = False
                return message.tool_call
            case "finish":
                self._is_finished = True
                if self._num_thinking_before:
                    message.finish.report.thinking_tokens += self._num_thinking_before
                return message.finish
            case "ended":
                self._is_ended = True
                return self._end(message.ended)
            case "failure":
                self._failure = error_of_failure(message.failure)
        return None

    def _start(self, started: pb.Started) -> Event | None:
        if self._started is None:
            self._started = started
            if started.reasoning.HasField("max_thinking_tokens"):
                self._received.budget_tokens = started.reasoning.max_thinking_tokens
            return started
        return None if self._broken_by is None else Resumed(self._broken_by)

    def _add(self, delta: pb.Delta) -> pb.Delta | None:
        if self._resumes:
            self._received.add(delta)
        if self._hides_thinking and delta.channel == pb.CHANNEL_THINKING:
            return None
        if self._hides_ids:
            delta.ClearField("token_ids")
        return delta if delta.text or delta.token_ids or delta.logprobs else None

    def _end(self, ended: pb.Ended) -> pb.Ended:
        """The figures of the whole: of its prompt as it was asked, of tokens from all calls."""
        if self._num_before and self._started is not None:
            usage = ended.usage
            usage.prompt_tokens = self._started.prompt_tokens
            usage.cached_prompt_tokens = self._started.cached_prompt_tokens
            usage.completion_tokens += self._num_before
            usage.thinking_tokens += self._num_thinking_before
        return ended
