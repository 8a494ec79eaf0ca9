"""Where images are read and made ready: two threads of their own, and a queue that is not endless.

A large image takes some 400 MB and a second while it is made ready; many at once would take the
memory of the node and all threads that tokenize text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ostro.actors.errors import OverloadedError

_T = TypeVar("_T")

_NUM_THREADS = 2
_MAX_WAITING = 64


class ImageWorkers:
    """For one event loop; its threads start with the first work."""

    def __init__(self, *, max_waiting: int = _MAX_WAITING) -> None:
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="ostro-images")
        self._free = asyncio.Semaphore(_NUM_THREADS)
        self._max_waiting = max_waiting
        self._num_waiting = 0

    async def run(self, work: Callable[[], _T]) -> _T:
        """What `work` returns or raises.

        Work whose caller gives up while it waits is let go of at once; work that has begun keeps
        its thread to the end.

        Raises:
            OverloadedError: Too much waits already.
        """
        if self._num_waiting >= self._max_waiting:
            raise OverloadedError("too many images wait to be read", retry_after_s=1.0)
        self._num_waiting += 1
        try:
            # Waiting here and not for the executor, which would keep what was given up.
            await self._free.acquire()
            done = asyncio.get_running_loop().run_in_executor(self._threads, work)
            done.add_done_callback(lambda _: self._free.release())
            return await asyncio.shield(done)
        finally:
            self._num_waiting -= 1
