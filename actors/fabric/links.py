"""Point-to-point messages between the ranks of one epoch, each wait under a deadline.

The two backends differ in how a wait ends:

    Gloo  a message is sent or received on its own; a wait blocks the thread, and names its peer.
    NCCL  one batch of sends and receives is one device operation; a wait orders the current
          stream behind it and returns at once, so nothing here blocks in a step. A dead peer
          shows in `finish`, which cannot name it. Tests run this path with a stand-in that keeps
          NCCL's order on top of Gloo; the calls into NCCL itself have not been run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any, NamedTuple

import torch

from ostro.actors.errors import TransportError
from ostro.actors.fabric.epoch import EpochGroup, wait_for_device


class Lane(IntEnum):
    """Messages of one lane keep their order; lanes do not wait for each other on Gloo."""

    HEADERS = 0
    ROWS = 1
    REPLIES = 2


class Part(NamedTuple):
    """One peer's share of an exchange."""

    peer: int
    tensor: torch.Tensor


class Pending(NamedTuple):
    """A message on its way; `peer` is None for a batch with several."""

    peer: int | None
    work: Any


@dataclass(frozen=True, slots=True)
class Moment:
    """Where in an epoch a wait takes place, for errors."""

    step: int
    layer: int

    def __str__(self) -> str:
        return f"in step {self.step}, layer {self.layer}"


class Links:
    """The connections of one rank."""

    def __init__(
        self, group: EpochGroup, *, timeout_s: float, role_of: Callable[[int], str]
    ) -> None:
        """`role_of` says what a rank is, for errors: "expert shard"."""
        self.group = group
        self.batched = group.device.type == "cuda"
        self._timeout_s = timeout_s
        self._timeout = timedelta(seconds=timeout_s)
        self._role_of = role_of

    def post(
        self, lane: Lane, *, sends: Sequence[Part] = (), receives: Sequence[Part] = ()
    ) -> list[Pending]:
        """Start an exchange: receives first in the answer, then sends, each in the order given.

        Tensors must stay as they are until their wait is over. On NCCL the sizes of both ends
        must be equal; on Gloo a receive may be larger than what comes, never smaller.

        Raises:
            TransportError: A connection is broken already.
        """
        if not sends and not receives:
            return []
        backend = self.group.replies if lane is Lane.REPLIES else self.group.rows
        if self.batched:
            return self._post_batch(backend, sends, receives)
        peer: int | None = None
        pending = []
        try:
            for peer, tensor in receives:
                pending.append(Pending(peer, backend.recv([tensor], peer, lane)))
            for peer, tensor in sends:
                pending.append(Pending(peer, backend.send([tensor], peer, lane)))
        except RuntimeError as error:
            raise self._broken(peer, None, error) from error
        return pending

    def wait(self, pending: Iterable[Pending], moment: Moment) -> None:
        """Wait for messages, each at most the deadline.

        Raises:
            TransportError: Names the peer that did not answer or closed its connection.
        """
        for peer, work in pending:
            if self.batched:
                work.wait()
                continue
            try:
                work.wait(self._timeout)
            except RuntimeError as error:
                raise self._broken(peer, moment, error) from error

    def finish(self, moment: Moment) -> None:
        """On CUDA, wait for the step's device work; on CPU there is nothing left to wait for.

        Raises:
            TransportError: It did not end in time; the epoch is aborted, its peer unknown.
        """
        if self.batched and not wait_for_device(self.group.device, self._timeout_s):
            self.group.abort()
            raise TransportError(
                f"the device did not finish within {self._timeout_s} s {moment}: a peer is lost"
            )

    def _post_batch(
        self, backend: Any, sends: Sequence[Part], receives: Sequence[Part]
    ) -> list[Pending]:
        backend._start_coalescing()
        for peer, tensor in sends:
            backend.send([tensor], peer, 0)
        for peer, tensor in receives:
            backend.recv([tensor], peer, 0)
        return [Pending(None, backend._end_coalescing())]

    def _broken(
        self, peer: int | None, moment: Moment | None, error: RuntimeError
    ) -> TransportError:
        if self.group.is_left:
            return TransportError(f"rank {self.group.rank} has left epoch {self.group.epoch}")
        when = f" {moment}" if moment else ""
        name = "a peer" if peer is None else f"rank {peer} ({self._role_of(peer)})"
        if str(error).find("Timed out") >= 0:
            return TransportError(
                f"{name} did not answer within {self._timeout_s} s{when}", peer=peer
            )
        return TransportError(f"{name} closed its connection{when}", peer=peer)
