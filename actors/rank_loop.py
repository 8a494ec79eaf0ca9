"""The thread that owns a rank's device during one epoch, and what a rank tells about itself."""

from __future__ import annotations

import logging
import resource
import threading
import time
from pathlib import Path
from typing import Protocol

import torch

from ostro.actors.errors import TransportError
from ostro.actors.fabric.channel import ChannelError, SyncConnection
from ostro.actors.fabric.messages import RankFailed
from ostro.actors.full_collections import FullCollections
from ostro.actors.rank import RankHealth, RankState

logger = logging.getLogger(__name__)

_PAGE_BYTES = resource.getpagesize()


class Engine(Protocol):
    """What a rank does in an epoch."""

    num_steps: int

    def turn(self) -> None:
        """Wait a moment for messages and do what they ask.

        Raises:
            TransportError: A peer failed.
            ChannelError: The router closed the epoch.
        """
        ...

    def is_at_rest(self) -> bool:
        """Whether nobody waits for anything that it does."""
        ...


class RankLoop:
    """Turns an engine until `stop()` or until the epoch fails; a failure is told to the router."""

    def __init__(self, rank: int, epoch: int, connection: SyncConnection, engine: Engine) -> None:
        self.rank = rank
        self.epoch = epoch
        self.engine = engine
        self._connection = connection
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ostro-engine", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Have the thread end at its next turn; a wait for messages ends at once."""
        self._stopping.set()
        self._connection.hang_up()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the thread to end; False if it is stuck."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._turn_until_stopped()
        except TransportError as error:
            self._fail(error.peer, error.message)
        except ChannelError:
            logger.info("rank %d: the router closed epoch %d", self.rank, self.epoch)
        except Exception as error:
            # The thread's last line: nothing else would tell the router.
            logger.exception("rank %d: the engine failed", self.rank)
            self._fail(self.rank, f"{type(error).__name__}: {error}")
        finally:
            self._connection.close()

    def _turn_until_stopped(self) -> None:
        engine = self.engine
        with FullCollections() as collections:
            while not self._stopping.is_set():
                engine.turn()
                collections.take_if_due(engine.num_steps, is_at_rest=engine.is_at_rest())

    def _fail(self, suspect: int | None, reason: str) -> None:
        if self._stopping.is_set():
            return
        logger.error("rank %d: epoch %d failed: %s", self.rank, self.epoch, reason)
        try:
            self._connection.send(RankFailed(self.epoch, self.rank, suspect, reason))
        except ChannelError:
            logger.info("rank %d: the router had closed the epoch already", self.rank)


class RankStatus:
    """A rank's account of itself, kept without touching the device."""

    def __init__(self, role: str, node_id: str) -> None:
        self.role = role
        self.state = RankState.STARTING
        self.rank = -1
        self.device = "cpu"
        self.latest_epoch: int | None = None
        self.bytes_loaded = 0
        self.bytes_to_load = 0
        self.stage_seconds: dict[str, float] = {}
        self._node_id = node_id
        self._started_at_s = time.time()

    def count_bytes(self, num_bytes: int) -> None:
        """Note bytes of weights that were read."""
        self.bytes_loaded += num_bytes

    def health(self, loop: RankLoop | None) -> RankHealth:
        """The account at this moment; `loop` is the running epoch's, if any."""
        used_bytes, total_bytes = self._memory()
        progress = self.bytes_loaded / self.bytes_to_load if self.bytes_to_load else 0.0
        return RankHealth(
            rank=self.rank,
            role=self.role,
            state=self.state,
            epoch=self.latest_epoch,
            node_id=self._node_id,
            device=self.device,
            load_progress=1.0 if self.state is RankState.READY else min(progress, 1.0),
            memory_used_bytes=used_bytes,
            memory_total_bytes=total_bytes,
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            num_steps=loop.engine.num_steps if loop else 0,
            started_at_s=self._started_at_s,
            stage_seconds=dict(self.stage_seconds),
        )

    def _memory(self) -> tuple[int, int]:
        if self.device.startswith("cuda"):
            # The allocator's own counters: no call reaches the device.
            return torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * _PAGE_BYTES, resource_total_bytes()


def resource_total_bytes() -> int:
    """Memory of this node."""
    first = Path("/proc/meminfo").read_text().split("\n", 1)[0]
    return int(first.split()[1]) * 1024
