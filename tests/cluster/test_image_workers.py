"""ImageWorkers: off the event loop, a few at a time, and no endless queue."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from functools import partial

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


class _Image:
    """Stands for megabytes that a request holds."""


def test_work_given_up_while_it_waits_is_let_go_of_and_never_runs() -> None:
    async def run() -> None:
        workers = ImageWorkers()
        go, ran = threading.Event(), []
        busy = [asyncio.create_task(workers.run(lambda: go.wait(10))) for _ in range(2)]
        await asyncio.sleep(0)
        image = _Image()
        held = weakref.ref(image)
        given_up = asyncio.create_task(workers.run(partial(ran.append, image)))
        del image
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait([given_up])
        del given_up
        gc.collect()
        assert held() is None
        go.set()
        await asyncio.gather(*busy)
        await workers.run(lambda: None)
        assert ran == []

    asyncio.run(run())


def test_work_given_up_while_it_runs_keeps_its_thread() -> None:
    async def run() -> None:
        workers = ImageWorkers()
        go, began = threading.Event(), threading.Semaphore(0)

        def work() -> None:
            began.release()
            go.wait(10)

        tasks = [asyncio.create_task(workers.run(work)) for _ in range(2)]
        await asyncio.sleep(0)
        for task in tasks:
            await asyncio.to_thread(began.acquire)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        third = asyncio.create_task(workers.run(threading.get_ident))
        await asyncio.sleep(0)
        assert not third.done()
        go.set()
        await third

    asyncio.run(run())
