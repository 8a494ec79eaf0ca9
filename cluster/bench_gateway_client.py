"""Processes that call the faces: one Python process alone would measure itself.

Each holds its connections over all runs. Times are of `time.perf_counter`, which on Linux is one
clock for all processes of a machine.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

from ostro.actors.errors import OstroError
from ostro.cluster.bench_face_calls import Call, Cell, Face, open_faces
from ostro.cluster.bench_load import ClosedLoop, run_load
from ostro.cluster.bench_statistics import LoadRun, Outcome
from ostro.cluster.bench_stream import Prompt

_SPAWN = multiprocessing.get_context("spawn")
_JOIN_TIMEOUT_S = 10.0
_REPORT_TIMEOUT_S = 600.0  # longer than any request may take


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One run of one client: so many streams at a time until all prompts are through.

    Attributes:
        pause_s: Before each request a random pause of up to so long. Without it a request would be
            sent as another one's step ends, and what its face costs would hide in the wait for the
            next step.
    """

    face: Face
    prompts: tuple[list[int], ...]
    concurrency: int
    new_tokens: int
    pause_s: float
    seed: str

    def part(self, index: int, num_parts: int) -> Work:
        """What one of several clients does of it."""
        return replace(
            self,
            prompts=self.prompts[index::num_parts],
            concurrency=len(range(index, self.concurrency, num_parts)),
            seed=f"{self.seed}-{index}",
        )


class ClientProcesses:
    """Several clients that begin together.

    Args:
        cell: What they call.
        num_clients: How many there are.
    """

    def __init__(self, cell: Cell, num_clients: int) -> None:
        self._clients = [_Client(cell, index) for index in range(num_clients)]

    def run(self, work: Work) -> list[LoadRun]:
        """Share a load out and wait for all of it; the runs of those that took part."""
        clients = self._clients[: min(work.concurrency, len(self._clients))]
        for index, client in enumerate(clients):
            client.send(work.part(index, len(clients)))
        for client in clients:
            client.receive()  # warm
        for client in clients:
            client.send(None)
        reports = [client.receive() for client in clients]
        return [report for report in reports if isinstance(report, LoadRun)]

    def close(self) -> None:
        """End them."""
        for client in self._clients:
            client.close()


@contextmanager
def client_processes(cell: Cell, num_clients: int) -> Iterator[ClientProcesses]:
    """Clients that are ended on exit."""
    clients = ClientProcesses(cell, num_clients)
    try:
        yield clients
    finally:
        clients.close()


class _Client:
    """The parent's end of a client process."""

    def __init__(self, cell: Cell, index: int) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=serve_work, args=(theirs, cell, index), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, message: Work | None) -> None:
        self._pipe.send(message)

    def receive(self) -> LoadRun | None:
        """What the client sends next.

        Raises:
            OstroError: It failed, died or is stuck.
        """
        try:
            if not self._pipe.poll(_REPORT_TIMEOUT_S):
                raise OstroError(
                    f"a client process of the benchmark was silent for {_REPORT_TIMEOUT_S:.0f} s; "
                    f"ask for fewer --streams or a shorter --pace"
                )
            report: LoadRun | OstroError | None = self._pipe.recv()
        except EOFError:
            raise OstroError("a client process of the benchmark died") from None
        if isinstance(report, OstroError):
            raise report
        return report

    def close(self) -> None:
        self._pipe.close()
        self._process.join(_JOIN_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()


def serve_work(pipe: Connection, cell: Cell, index: int) -> None:
    """A client process: work comes in, "ready" goes out; a go comes in, the run goes out."""
    try:
        asyncio.run(_serve_work(pipe, cell, index))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return  # the benchmark is over
    except OstroError as error:
        pipe.send(OstroError(error.message))


async def _serve_work(pipe: Connection, cell: Cell, index: int) -> None:
    async with open_faces(cell, f"client-{index}") as faces:
        while True:
            # A thread waits, so that connections stay alive meanwhile.
            work: Work = await asyncio.to_thread(pipe.recv)
            call = faces[work.face]
            first = work.prompts[0]
            await asyncio.gather(
                *(call(first, 1, f"{work.seed}-w{n}", 0.0) for n in range(work.concurrency))
            )
            pipe.send(None)
            await asyncio.to_thread(pipe.recv)
            pipe.send(await _run(call, work))


async def _run(call: Call, work: Work) -> LoadRun:
    names, draw = itertools.count(), random.Random(work.seed)

    async def send(prompt: Prompt, due_s: float) -> Outcome:
        if isinstance(prompt, str):
            raise TypeError("the faces are given token ids")
        if work.pause_s:
            await asyncio.sleep(draw.uniform(0.0, work.pause_s))
            due_s = time.perf_counter()
        return await call(prompt, work.new_tokens, f"{work.seed}-{next(names)}", due_s)

    loop = ClosedLoop(work.concurrency)
    return await run_load(loop, send, work.prompts, work.seed, lambda: None)
