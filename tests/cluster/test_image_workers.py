"""ImageWorkers: off the event loop, a few at a time, and no endless queue."""

from __future__ import annotations

import asyncio
import threading

import pytest

from ostro.actors.errors import InvalidRequestError, OverloadedError
from ostro.cluster.image_workers import ImageWorkers


def test_work_runs_in_a_thread_and_its_error_comes_back() -> None:
    async def run() -> None:
        workers = ImageWorkers()
        assert await workers.run(threading.get_ident) != threading.get_ident()

        def refuse() -> None:
            raise InvalidRequestError("no")

        with pytest.raises(InvalidRequestError):
            await workers.run(refuse)

    asyncio.run(run())


def test_two_run_at_once_and_what_cannot_wait_is_refused() -> None:
    async def run() -> None:
        workers = ImageWorkers(max_waiting=4)
        go, running, most = threading.Event(), [0], [0]

        def work() -> None:
            running[0] += 1
            most[0] = max(most[0], running[0])
            go.wait(10)
            running[0] -= 1

        tasks = [asyncio.create_task(workers.run(work)) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError) as caught:
            await workers.run(work)
        assert caught.value.retry_after_s == 1.0
        go.set()
        await asyncio.gather(*tasks)
        assert most[0] <= 2
        await workers.run(work)

    asyncio.run(run())
