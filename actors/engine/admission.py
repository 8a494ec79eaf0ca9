"""The door: how much may wait, and when a refused caller should come back."""

from __future__ import annotations

from math import exp

from ostro.actors.errors import OverloadedError

_MEMORY_S = 10.0
_SHORTEST_RETRY_S = 1.0
_LONGEST_RETRY_S = 60.0


class AdmissionPolicy:
    """Bounds what waits; measures how fast it drains."""

    def __init__(self, max_waiting_requests: int, max_waiting_tokens: int) -> None:
        self._max_waiting_requests = max_waiting_requests
        self._max_waiting_tokens = max_waiting_tokens
        self._recent_tokens = 0.0
        self._recent_s = 0.0

    def check(self, num_waiting: int, num_waiting_tokens: int, prompt_tokens: int) -> None:
        """Let a prompt in, or refuse it. Where nothing waits, a prompt of any length gets in.

        Raises:
            OverloadedError: Too much waits already; `retry_after_s` is in [1, 60].
        """
        if num_waiting == 0:
            return
        if num_waiting >= self._max_waiting_requests:
            reason = f"{num_waiting} requests wait already"
        elif num_waiting_tokens + prompt_tokens > self._max_waiting_tokens:
            reason = f"{num_waiting_tokens} prompt tokens wait already"
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
