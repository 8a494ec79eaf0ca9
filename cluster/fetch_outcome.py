"""What becomes of an image that a request names by URL: for its caller, and for metrics."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class FetchOutcome(StrEnum):
    """How a fetch ended, for metrics; refusals tell the caller more."""

    OK = "ok"
    NOT_ALLOWED = "not_allowed"  # the URL; or its host has no public address, or none at all
    UNREACHABLE = "unreachable"
    BAD_ANSWER = "bad_answer"
    TOO_LARGE = "too_large"
    TIMEOUT = "timeout"
    OVERLOADED = "overloaded"  # its turn did not come
    CANCELLED = "cancelled"  # by the caller, or as another image of the request failed


# Seconds are those of the fetch itself, or of the wait for a turn that did not come; then bytes.
ObserveFetch = Callable[[FetchOutcome, float, int], None]


def observe_nothing(outcome: FetchOutcome, seconds: float, num_bytes: int) -> None:
    """An `ObserveFetch` where nobody counts."""


class RefusedImageError(Exception):
    """Why one image is not to be had.

    Attributes:
        why: In words for the caller, who learns nothing of the target by them.
        code: Of the caller's error.
    """

    def __init__(
        self,
        why: str,
        outcome: FetchOutcome = FetchOutcome.BAD_ANSWER,
        code: str = "invalid_image_url",
    ) -> None:
        super().__init__(why)
        self.why = why
        self.outcome = outcome
        self.code = code
