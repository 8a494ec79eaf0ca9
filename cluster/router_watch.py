"""Has a router that died go on: Ray makes the actor anew, and this tells it to take over.

In the process where the deployment was started, which holds its keys.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from ostro.actors.errors import NotReadyError, OstroError, ShardLostError

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_JOIN_TIMEOUT_S = 5.0
_CALL_TIMEOUT_S = 30.0


class WatchedRouter(Protocol):
    """The router as it is watched. Every call may raise OstroError while it cannot be reached."""

    def is_started(self) -> bool:
        """Whether it conducts a cell, or is about to."""
        ...

    def resume(self) -> None:
        """Have it take over from the one that died."""
        ...


class RayRouter:
    """A router actor as it is watched."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def is_started(self) -> bool:
        """See `WatchedRouter`."""
        try:
            _result(self._actor.address.remote())
        except NotReadyError:  # its own word
            return False
        return True

    def resume(self) -> None:
        """See `WatchedRouter`."""
        _result(self._actor.resume.remote())


@contextmanager
def watched_router(
    router: WatchedRouter, publish_keys: Callable[[], None], poll_s: float = _POLL_S
) -> Iterator[None]:
    """Watch a router that has been started, from a thread.

    Args:
        router: Whom.
        publish_keys: Tells a new one who may call, before it takes requests; may raise OstroError.
        poll_s: Between two looks.
    """
    ending = threading.Event()
    watch = threading.Thread(
        target=_watch, args=(router, publish_keys, poll_s, ending), name="router-watch", daemon=True
    )
    watch.start()
    try:
        yield
    finally:
        ending.set()
        watch.join(_JOIN_TIMEOUT_S)


def _watch(
    router: WatchedRouter,
    publish_keys: Callable[[], None],
    poll_s: float,
    ending: threading.Event,
) -> None:
    while not ending.wait(poll_s):
        try:
            if router.is_started():
                continue
            logger.warning("the router died; a new one takes over")
            publish_keys()
            router.resume()
        except OstroError as error:
            logger.info("the router cannot be reached: %s", error)
        except Exception:
            logger.exception("the watch of the router failed; it looks again")


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference, timeout=_CALL_TIMEOUT_S)
    except RayTaskError as error:
        if isinstance(error.cause, OstroError):
            raise error.cause from None
        raise OstroError(f"it failed: {error.cause!r}") from None
    except (RayError, TimeoutError) as error:
        raise ShardLostError(type(error).__name__) from None
