"""Hours of mixed, hostile use in a few minutes: nothing breaks, hangs, leaks or tells.

From the environment: OSTRO_SOAK_S is how many seconds the load runs before anything is killed,
OSTRO_SOAK_CLIENTS how many call at once, OSTRO_SOAK_SEED makes the same requests again.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest
from process_census import Process, count_roles, table
from soak_load import Load, clients
from soak_server import PICTURES, QUESTIONS, SoakServer
from soak_site import CANARY

LENGTH_S = float(os.environ.get("OSTRO_SOAK_S", "90"))
NUM_CLIENTS = int(os.environ.get("OSTRO_SOAK_CLIENTS", "24"))
SEED = int(os.environ.get("OSTRO_SOAK_SEED") or random.SystemRandom().randrange(10**6))
WARM_UP_SHARE = 1 / 3  # of the load, before which pools and caches fill
# On a machine that others use too; nothing is measured by them.
DRAIN_S, BACK_S = 120.0, 240.0
SETTLE_S = 8.0
# What Ray opens now and then, and pools that had not been full yet.
MORE_FILES, MORE_THREADS = 24, 8
# Memory that a process may have grown by: so much, and so much for each minute of load.
GROWTH_MIB, GROWTH_MIB_PER_MINUTE = 64, 2
KILLED = ("attention", "expert", "ingress", "router", "haproxy")

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(LENGTH_S + 2400),
]
# Failures that Ray writes down of itself: a port of its dashboard that another cluster of this
# machine has, that HAProxy was killed, and gRPC streams whose caller has gone, which it ends as it
# should.
OF_RAY = re.compile(r"(dashboard|dashboard_agent|monitor)\.log")
OF_RAY_AFTER_KILLS = re.compile(rf"{OF_RAY.pattern}|(proxy|controller)_.*\.log")
LEFT_STREAM = re.compile(r"yield message\.SerializeToString\(\)\\n',\)\('GeneratorExit")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoakServer]:
    with SoakServer(tmp_path_factory.mktemp("soak")) as served:
        yield served


@pytest.fixture(scope="module")
def answers(served: SoakServer) -> list[list[int]]:
    """What the model says with nobody else there."""
    return [served.answer(question) for question in QUESTIONS]


@asynccontextmanager
async def soaking(served: SoakServer) -> AsyncIterator[Load]:
    """The load; at its end every request has ended as one may."""
    async with clients(
        served.http_port,
        served.grpc_port,
        NUM_CLIENTS,
        keys=served.keys,
        poor_key=served.poor_key,
        pictures=PICTURES,
        seed=SEED,
    ) as sites:
        load = Load(sites)
        load.start()
        try:
            yield load
        finally:
            await load.stop()
    told = f"OSTRO_SOAK_SEED={SEED}\n{load.tally}\n"
    sys.stdout.write(told)
    assert load.tally.total("ok") > NUM_CLIENTS, told
    assert not load.tally.findings, told + "\n".join(load.tally.findings)


def until(holds: Callable[[], None], timeout_s: float) -> None:
    """Return once it no longer fails."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            return holds()
        except (AssertionError, httpx.HTTPError):
            if time.monotonic() > deadline_s:
                raise
        time.sleep(0.5)


def check_drained(served: SoakServer) -> None:
    """Nothing runs, waits or holds a page or a picture."""

    def drained() -> None:
        held = served.held()
        assert not any(held.values()), held

    until(drained, DRAIN_S)
    # Two fill what pictures may take: the second one is refused while the first is still counted.
    assert [served.look_at(picture) for picture in PICTURES] == [200] * len(PICTURES)


def check_resources(served: SoakServer, before: list[Process], minutes: float) -> None:
    """Processes, descriptors, threads and memory are what they were."""
    most_mib = GROWTH_MIB + GROWTH_MIB_PER_MINUTE * minutes

    def back() -> None:
        was, after = {process.pid: process for process in before}, served.look()
        told = table(before, after)
        assert count_roles(after) == count_roles(before), told
        for process in after:
            then = was[process.pid]
            assert process.num_files <= then.num_files + MORE_FILES, told
            assert process.num_threads <= then.num_threads + MORE_THREADS, told
            assert process.rss_mib <= then.rss_mib + most_mib, told

    until(back, DRAIN_S)


def check_logs(served: SoakServer, excused: re.Pattern[str]) -> None:
    """No failure that nobody foresaw, and no word that a caller said."""
    for path in served.logs():
        text = path.read_text(errors="replace")
        assert CANARY not in text, f"{path}: {_around(text, CANARY)}"
        lines = [line for line in text.splitlines() if "Traceback" in line]
        strange = [line for line in lines if not LEFT_STREAM.search(line)]
        assert not strange or excused.fullmatch(path.name), f"{path}: {strange[0][-2000:]}"


def _around(text: str, word: str) -> str:
    return next(line for line in text.splitlines() if word in line)[:500]


def test_load_leaves_nothing_behind(served: SoakServer, answers: list[list[int]]) -> None:
    async def run() -> list[Process]:
        async with soaking(served):
            await asyncio.sleep(LENGTH_S * WARM_UP_SHARE)
            warm = await asyncio.to_thread(served.look)
            await asyncio.sleep(LENGTH_S * (1 - WARM_UP_SHARE))
        return warm

    warm = asyncio.run(run())
    check_drained(served)
    check_resources(served, warm, minutes=LENGTH_S / 60)
    check_logs(served, OF_RAY)
    assert [served.answer(question) for question in QUESTIONS] == answers


def test_all_that_is_killed_comes_back(served: SoakServer, answers: list[list[int]]) -> None:
    """One after the other, while the load goes on."""
    roles = count_roles(served.look())
    dice = random.Random(SEED)

    def is_back(role: str, killed: int) -> None:
        pids = served.pids(role)
        assert killed not in pids
        assert len(pids) == roles[role], f"{role}: {pids}"
        assert served.is_ready(), served.log.read_text()[-2000:]

    async def run() -> None:
        async with soaking(served) as load:
            for role in KILLED:
                await asyncio.sleep(SETTLE_S)
                killed = dice.choice(await asyncio.to_thread(served.pids, role))
                load.weather.begin()
                os.kill(killed, signal.SIGKILL)
                await asyncio.to_thread(until, lambda: is_back(role, killed), BACK_S)  # noqa: B023
                await asyncio.sleep(SETTLE_S)  # what was lost is told to those who waited for it
                load.weather.end()
            await asyncio.sleep(SETTLE_S)

    asyncio.run(run())
    check_drained(served)
    assert count_roles(served.look()) == roles
    check_logs(served, OF_RAY_AFTER_KILLS)
    assert [served.answer(question) for question in QUESTIONS] == answers
