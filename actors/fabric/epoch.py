"""Epochs: forming and leaving the process group of one membership of a cell.

The router hosts a store; every rank of epoch n meets the others under the store's prefix "ep<n>"
and builds its process groups directly, with no global `init_process_group`, so any number of
epochs can follow each other in one process (12 ms each on Gloo). An epoch's number is never used
twice, not even after a failed attempt.

Neither the store nor Gloo authenticates: both listen on the cell's own interface only.

NCCL, which no test has run yet: `TORCH_NCCL_ASYNC_ERROR_HANDLING=0` is set for the process before
its first group, since the default ends the process when a peer dies; hangs are found by the
deadlines of `links` and ended by `EpochGroup.abort`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import (  # torch.distributed re-exports them without types
    PrefixStore,
    ProcessGroupGloo,
    Store,
    TCPStore,
)

from ostro.actors.errors import TransportError

_GLOO_THREADS = 2
_DEVICE_POLL_S = 50e-6
# A tag that nobody sends on; `abort` waits on it in vain.
_ABORT_TAG = 0x0DEAD


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """One rank's place in one epoch.

    Attributes:
        store_host: Where the router's store listens.
        timeout_s: How long the others may take to come.
    """

    epoch: int
    rank: int
    world_size: int
    store_host: str
    store_port: int
    timeout_s: float


def host_store(host: str) -> TCPStore:
    """Host the store that epochs meet at, on a free port of `host` alone; see its `port`.

    It must outlive the epochs. A TCPStore left to itself would listen on every interface.
    """
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server((host, 0), family=family, backlog=128)
    port = listener.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


class EpochGroup:
    """The process groups of one rank in one epoch.

    Rows and replies have a communicator each on CUDA: NCCL runs one's messages in the order they
    were issued, and with two micro-batches a reply must be able to overtake rows.
    """

    def __init__(self, membership: Membership, device: torch.device, backends: list[Any]) -> None:
        self.epoch = membership.epoch
        self.rank = membership.rank
        self.world_size = membership.world_size
        self.device = device
        self._backends = backends
        self._lock = threading.Lock()
        self._left = False

    @property
    def rows(self) -> Any:
        """The backend that carries rows out to experts."""
        return self._backend(0)

    @property
    def replies(self) -> Any:
        """The backend that carries rows back."""
        return self._backend(-1)

    @property
    def is_left(self) -> bool:
        """Whether this rank has left."""
        return self._left

    def abort(self) -> None:
        """Make every wait on this epoch fail now, here and at the peers; safe from any thread.

        Gloo's own abort() interrupts nothing, but a wait that runs out closes all connections of
        its group, and other threads' waits with them (8 ms, measured).
        """
        with self._lock:
            if self._left:
                return
            self._left = True
            for backend in self._backends:
                if self.device.type == "cuda":
                    backend.abort()
                else:
                    self._close_pairs(backend)

    def leave(self) -> None:
        """Abort and drop the groups."""
        self.abort()
        self._backends = []

    def _backend(self, index: int) -> Any:
        if self._left:
            raise TransportError(f"rank {self.rank} has left epoch {self.epoch}")
        return self._backends[index]

    def _close_pairs(self, backend: Any) -> None:
        for peer in range(self.world_size):
            if peer != self.rank:
                with contextlib.suppress(RuntimeError):
                    nothing = torch.empty(1, dtype=torch.uint8)
                    backend.recv([nothing], peer, _ABORT_TAG).wait(timedelta(milliseconds=1))


def join(membership: Membership, device: torch.device | str, *, host: str) -> EpochGroup:
    """Meet the other ranks of an epoch.

    Args:
        membership: Which epoch, as which rank.
        device: Where rows live; chooses NCCL for "cuda" and Gloo for "cpu".
        host: This node's address in the cell, which Gloo binds to; left alone it would take
            whatever the host's name resolves to.

    Raises:
        TransportError: The store cannot be reached, or ranks did not come; the message and
            `peer` name them.
    """
    device = torch.device(device)
    store = _meet(membership)
    try:
        if device.type == "cuda":
            backends = [_nccl(membership, store, device, lane) for lane in ("rows", "replies")]
        else:
            backends = [_gloo(membership, store, host)]
    except RuntimeError as error:
        raise TransportError(
            f"rank {membership.rank} could not connect to its peers in epoch {membership.epoch}: "
            f"{error}"
        ) from error
    return EpochGroup(membership, device, backends)


def leave(group: EpochGroup) -> None:
    """Leave an epoch; its peers' waits for this rank fail. Harmless to call twice."""
    group.leave()


def _meet(membership: Membership) -> Store:
    timeout = timedelta(seconds=membership.timeout_s)
    try:
        root = TCPStore(
            membership.store_host,
            membership.store_port,
            is_master=False,
            wait_for_workers=False,
            timeout=timeout,
        )
        store = PrefixStore(f"ep{membership.epoch}", root)
        store.set(f"here/{membership.rank}", "1")
    except RuntimeError as error:
        raise TransportError(
            f"rank {membership.rank} cannot reach the store of epoch {membership.epoch} at "
            f"{membership.store_host}:{membership.store_port}: {error}"
        ) from error
    try:
        store.wait([f"here/{rank}" for rank in range(membership.world_size)], timeout)
    except RuntimeError as error:
        raise _absence(membership, store) from error
    return store


def _absence(membership: Membership, store: Store) -> TransportError:
    try:
        missing = [r for r in range(membership.world_size) if not store.check([f"here/{r}"])]
    except RuntimeError:
        return TransportError(f"the store of epoch {membership.epoch} is gone")
    names = ", ".join(str(rank) for rank in missing)
    return TransportError(
        f"{'ranks' if len(missing) > 1 else 'rank'} {names} did not come to epoch "
        f"{membership.epoch} within {membership.timeout_s} s",
        peer=missing[0] if missing else None,
    )


def _gloo(membership: Membership, store: Store, host: str) -> Any:
    gloo: Any = ProcessGroupGloo  # its options are not typed
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host)]
    options._threads = _GLOO_THREADS
    options._timeout = timedelta(seconds=membership.timeout_s)
    return gloo(store, membership.rank, membership.world_size, options)


def _nccl(membership: Membership, store: Store, device: torch.device, lane: str) -> Any:
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    nccl: Any = torch.distributed.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timedelta(seconds=membership.timeout_s)
    options.is_high_priority_stream = True
    backend = nccl(PrefixStore(lane, store), membership.rank, membership.world_size, options)
    # The communicator forms at its first use, which every rank must take part in; a rank with no
    # tokens in the first step would not.
    with torch.cuda.device(device):
        backend.allreduce([torch.ones(1, device=device)]).wait()
    if not wait_for_device(device, membership.timeout_s):
        backend.abort()
        raise TransportError(f"NCCL did not connect epoch {membership.epoch} in time")
    return backend


def wait_for_device(device: torch.device, timeout_s: float) -> bool:
    """Whether all work on the current CUDA stream ended in time; never blocks past that.

    A stream that waits for a dead peer never ends, and neither would `synchronize()`.
    """
    reached: Any = torch.cuda.Event()
    reached.record(torch.cuda.current_stream(device))
    deadline = time.monotonic() + timeout_s
    while not reached.query():
        if time.monotonic() > deadline:
            return False
        time.sleep(_DEVICE_POLL_S)
    return True
