"""Where a request's time went, told over HTTP to callers who send `x-ostro-trace: 1`.

A whole answer has it in the header `server-timing`, a stream in a last comment of the same text.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import Scope

from ostro.cluster.generation import Finished, GenerationEvent

ASKING_HEADER = "x-ostro-trace"
TIMING_HEADER = "server-timing"
_NO = ("", "0", "false")


def asks_for_timing(scope: Scope) -> bool:
    """Whether the request wants to know."""
    return Headers(scope=scope).get(ASKING_HEADER, "").lower() not in _NO


def server_timing(last: GenerationEvent | None) -> str | None:
    """Milliseconds by part, as the header has them; None if the last event tells no times."""
    if not isinstance(last, Finished) or not last.is_last:
        return None
    timing = last.timing
    told = {"total": timing.total_s, "first_token": timing.first_token_s, **timing.parts()}
    return ", ".join(
        f"{part};dur={seconds * 1e3:.3f}" for part, seconds in told.items() if seconds is not None
    )


def timing_comment(last: GenerationEvent | None) -> bytes:
    """The same as a server-sent comment, which clients skip; empty if there is nothing to tell."""
    text = server_timing(last)
    return b"" if text is None else b": %s %s\n\n" % (TIMING_HEADER.encode(), text.encode())
