"""Ranks as real processes: one pool for all tests of this folder, since importing torch is slow."""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import pytest

_SCRIPT = Path(__file__).with_name("rank_process.py")
_ANSWER_TIMEOUT_S = 60.0


class RankError(Exception):
    """The TransportError that a rank raised."""

    def __init__(self, message: str, peer: int | None) -> None:
        super().__init__(message)
        self.peer = peer


class RankPool:
    """Processes that take commands; `rank_process` says which."""

    def __init__(self) -> None:
        from ostro.actors.fabric.epoch import host_store

        self._key = secrets.token_bytes(16)
        self._listener = Listener(family="AF_UNIX", authkey=self._key)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._epochs = itertools.count(1)
        self._store = host_store("127.0.0.1")

    @property
    def store_port(self) -> int:
        return self._store.port

    def next_epoch(self) -> int:
        return next(self._epochs)

    def ensure(self, num_ranks: int) -> None:
        """Start processes until there are so many; replace dead ones."""
        alive = [place for place, process in enumerate(self._processes) if process.poll() is None]
        self._processes = [self._processes[place] for place in alive]
        self._connections = [self._connections[place] for place in alive]
        starting = {}
        for place in range(len(alive), num_ranks):
            command = [sys.executable, str(_SCRIPT), self._listener.address, self._key.hex()]
            starting[place] = subprocess.Popen([*command, str(place)])
        arrived = {}
        for _ in starting:
            connection = self._listener.accept()
            arrived[connection.recv()] = connection
        for place, process in starting.items():
            self._processes.append(process)
            self._connections.append(arrived[place])

    def tell(self, place: int, command: str, /, **keywords: Any) -> None:
        self._connections[place].send((command, keywords))

    def answer(self, rank: int) -> Any:
        """What the last command returned; raises RankError for the rank's TransportError."""
        if not self._connections[rank].poll(_ANSWER_TIMEOUT_S):
            self._give_up()
            raise TimeoutError(f"rank {rank} did not answer the test")
        kind, value = self._connections[rank].recv()
        if kind == "error":
            raise RankError(*value)
        return value

    def run(self, num_ranks: int, command: str, **keywords: Any) -> list[Any]:
        """The same command on ranks 0 .. n-1, each told its `rank`; answers in rank order."""
        self.ensure(num_ranks)
        for rank in range(num_ranks):
            self.tell(rank, command, rank=rank, **keywords)
        return [self.answer(rank) for rank in range(num_ranks)]

    def run_in_epoch(self, num_ranks: int, command: str, **keywords: Any) -> list[Any]:
        return self.run(
            num_ranks, command, epoch=self.next_epoch(), store_port=self.store_port, **keywords
        )

    def errors(self, ranks: Sequence[int]) -> dict[int, RankError]:
        """The errors that these ranks raised; each must have raised one."""
        raised = {}
        for rank in ranks:
            with pytest.raises(RankError) as caught:
                self.answer(rank)
            raised[rank] = caught.value
        return raised

    def stop(self, rank: int, signal_number: int) -> None:
        """Signal a rank; a killed one is reaped."""
        os.kill(self._processes[rank].pid, signal_number)
        if signal_number == signal.SIGKILL:
            self._processes[rank].wait(10)

    def close(self) -> None:
        self._give_up()
        self._listener.close()

    def _give_up(self) -> None:
        """End every process; a later test starts new ones."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
            process.wait(10)
        self._connections, self._processes = [], []


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()
