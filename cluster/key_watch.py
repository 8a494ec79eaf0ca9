"""Publishes a key file to a running deployment, again whenever it changes.

One process reads it, where the deployment was started. The router hands the table to every ingress
replica on the connection that it has with each, so all nodes change over within milliseconds, and
no other node needs the file.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from ostro.actors.errors import NotReadyError, OstroError
from ostro.cluster.key_file import read_keys
from ostro.configs.errors import ConfigError
from ostro.configs.key_table import KeyTable
from ostro.configs.security import SecurityConfig

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_JOIN_TIMEOUT_S = 5.0
_CALL_TIMEOUT_S = 30.0

Mark = tuple[int, int, int, int] | None


def no_keys() -> None:
    """Publishes nothing, of a deployment without keys."""


def key_publishing(
    security: SecurityConfig, router: Any, *, start_timeout_s: float
) -> AbstractContextManager[Callable[[], None]]:
    """Publishes a deployment's keys by way of its router actor, as `published_keys` does.

    The first time it waits `start_timeout_s`: the actor's process is still importing torch.
    """
    if security.key_file is None:
        return nullcontext(no_keys)
    timeouts_s = itertools.chain([start_timeout_s], itertools.repeat(_CALL_TIMEOUT_S))

    def publish(table: KeyTable) -> None:
        try:
            ray.get(router.set_keys.remote(table), timeout=next(timeouts_s))
        except (RayError, TimeoutError) as error:
            raise NotReadyError(f"the router does not take them: {type(error).__name__}") from None

    return published_keys(Path(security.key_file).expanduser(), publish)


@contextmanager
def published_keys(
    path: Path, publish: Callable[[KeyTable], None], poll_s: float = _POLL_S
) -> Iterator[Callable[[], None]]:
    """Publish the keys now and, from a thread, whenever the file has changed.

    Gives a function that publishes those in force again, for a router that knows none. A file that
    cannot be read later on leaves the keys as they were; a publication that fails is tried again.
    Both are logged.

    Args:
        path: The key file.
        publish: Raises OstroError if it fails.
        poll_s: Between two looks at the file. A change counts once two looks in a row saw the
            same, so that a file is not read while it is being written.

    Raises:
        ConfigError: The file cannot be read at first.
        OstroError: The first publication failed.
    """
    mark, in_force = _mark(path), _InForce(publish)
    in_force.replace(read_keys(path))
    ending = threading.Event()
    watch = threading.Thread(
        target=_watch, args=(path, in_force, poll_s, mark, ending), name="key-watch", daemon=True
    )
    watch.start()
    try:
        yield in_force.publish_again
    finally:
        ending.set()
        watch.join(_JOIN_TIMEOUT_S)


class _InForce:
    """The table that was published last; two threads may publish, and never an older one."""

    def __init__(self, publish: Callable[[KeyTable], None]) -> None:
        self._publish = publish
        self._lock = threading.Lock()
        self._table = KeyTable()

    def replace(self, table: KeyTable) -> None:
        with self._lock:
            self._publish(table)
            self._table = table

    def publish_again(self) -> None:
        with self._lock:
            self._publish(self._table)


def _watch(
    path: Path,
    in_force: _InForce,
    poll_s: float,
    published: Mark,
    ending: threading.Event,
) -> None:
    seen = published
    while not ending.wait(poll_s):
        before, seen = seen, _mark(path)
        if seen == published or seen != before:
            continue
        try:
            table = read_keys(path)
            in_force.replace(table)
        except ConfigError as error:
            logger.warning("the keys stay as they were: %s", error)
        except OstroError as error:
            logger.warning("the keys could not be published: %s", error)
            continue
        else:
            logger.info("%d keys are in force", len(table.keys))
        published = seen


def _mark(path: Path) -> Mark:
    """What tells one state of a file from another; None if there is none."""
    try:
        about = path.stat()
    except OSError:
        return None
    # The change time too, for a `chmod` that mends a file which was refused.
    return about.st_mtime_ns, about.st_ctime_ns, about.st_size, about.st_ino
