"""The door: who may come in, and when the refused should come back."""

from __future__ import annotations

from math import exp

from ostro.actors.engine.request import RequestProgress
from ostro.actors.errors import InvalidRequestError, OverloadedError

_MEMORY_S = 10.0
_SHORTEST_RETRY_S = 1.0
_LONGEST_RETRY_S = 60.0


def check_servable(progress: RequestProgress, longest: int) -> None:
    """Refuse a request that cannot be served even alone; `longest` counts prompt and output.

    Raises:
        InvalidRequestError: Its prompt is empty or too long, or it asks for no output.
    """
    if progress.num_prompt_tokens < 1:
        raise InvalidRequestError("the prompt is empty", param="prompt")
    if progress.request.stop.max_tokens < 1:
        raise InvalidRequestError("max_tokens must be at least 1", param="max_tokens")
    if progress.num_prompt_tokens + 1 > longest:
        raise InvalidRequestError(
            f"the prompt has {progress.num_prompt_tokens} tokens; with at least one token of "
            f"output it must fit into {longest}",
            code="context_length_exceeded",
            param="prompt",
        )


class AdmissionPolicy:
    """Bounds what waits; measures how fast it drains."""

    def __init__(self, max_waiting_requests: int, max_waiting_tokens: int) -> None:
        self._max_waiting_requests = max_waiting_requests
        self._max_waiting_tokens = max_waiting_tokens
        self._recent_tokens = 0.0
        self._recent_s = 0.0

    def check(
        self,
        num_waiting: int,
        num_waiting_tokens: int,
        prompt_tokens: int,
        of_tenant: tuple[int, int] = (0, 0),
    ) -> None:
        """Let a prompt in, or refuse it. Where nothing waits, a prompt of any length gets in.

        Args:
            num_waiting: Requests that wait.
            num_waiting_tokens: Their prompt tokens.
            prompt_tokens: Of the one that comes.
            of_tenant: (requests, prompt tokens) of its tenant among these; zeros for nobody's. A
                tenant may have as much waiting as there is room left (dynamic thresholds: Choudhury
                and Hahne, 1998): one alone gets half of the room, and a newcomer always finds some.

        Raises:
            OverloadedError: Too much waits already; `retry_after_s` is in [1, 60].
        """
        if num_waiting == 0:
            return
        of_requests, of_tokens = of_tenant
        if num_waiting >= self._max_waiting_requests:
            reason = f"{num_waiting} requests wait already"
        elif num_waiting_tokens + prompt_tokens > self._max_waiting_tokens:
            reason = f"{num_waiting_tokens} prompt tokens wait already"
        elif of_requests and num_waiting + of_requests >= self._max_waiting_requests:
            reason = f"{of_requests} of your requests wait already, which is your share"
        elif (
            of_requests
            and num_waiting_tokens + of_tokens + prompt_tokens > self._max_waiting_tokens
        ):
            reason = f"{of_tokens} of your prompt tokens wait already, which is your share"
        else:
            return
        raise OverloadedError(reason, retry_after_s=self._drain_s(num_waiting_tokens))

    def record(self, num_tokens: int, seconds: float) -> None:
        """Take note of tokens computed and of the busy seconds that it took."""
        fade = exp(-seconds / _MEMORY_S)
        self._recent_tokens = self._recent_tokens * fade + num_tokens
        self._recent_s = self._recent_s * fade + seconds

    def _drain_s(self, num_tokens: int) -> float:
        if self._recent_tokens == 0.0:
            return _SHORTEST_RETRY_S
        drain_s = num_tokens * self._recent_s / self._recent_tokens
        return min(max(drain_s, _SHORTEST_RETRY_S), _LONGEST_RETRY_S)
