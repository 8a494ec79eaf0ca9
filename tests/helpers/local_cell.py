"""A whole cell without Ray: ranks in real processes, the router and an ingress client in the test.

Processes are kept and reused between cells, because importing torch costs seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import secrets
import signal
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from ostro.actors.engine.request import GenerationRequest, TokenEvent
from ostro.actors.errors import ShardLostError
from ostro.actors.rank import EpochSpec, RankHealth, RankSpec
from ostro.actors.router import Router
from ostro.cluster.cell_client import CellClient
from ostro.configs.deployment import DeploymentConfig

_SPAWN = multiprocessing.get_context("spawn")
_READY_TIMEOUT_S = 120.0
_SPAWN_TIMEOUT_S = 240.0  # of importing torch, on a machine that has a lot else to do


def _host(pipe: multiprocessing.connection.Connection, token_dir: str) -> None:
    """Child process: be whatever rank the test asks for."""
    import torch

    from ostro.actors.attention_shard import AttentionShard
    from ostro.actors.expert_shard import ExpertShard

    torch.set_num_threads(1)
    actor: AttentionShard | ExpertShard | None = None
    while True:
        try:
            call, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if call == "become":
                role, rank = arguments
                if actor is not None:
                    actor.leave()
                if role == "attention":
                    address = f"unix:{token_dir}/tokens-{rank}"
                    actor = AttentionShard(host="127.0.0.1", node_id="n", token_address=address)
                else:
                    actor = ExpertShard(host="127.0.0.1", node_id="n")
                answer = None
            else:
                answer = getattr(actor, call)(*arguments)
            pipe.send((True, answer))
        except Exception as error:  # noqa: BLE001  the test process raises it
            pipe.send((False, error))


class ProcessPeer:
    """A rank in a process of its own, behind `actors.rank.Peer`."""

    def __init__(self, name: str, token_dir: str) -> None:
        self.name = name
        self._token_dir = token_dir
        self._role: tuple[str, int] | None = None
        self._lock = asyncio.Lock()
        self._spawn()

    def _spawn(self) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_host, args=(theirs, self._token_dir), daemon=True)
        self.process.start()
        theirs.close()

    async def become(self, role: str, rank: int) -> None:
        self._lock = asyncio.Lock()
        self.name = f"{role}-{rank}"
        self._role = (role, rank)
        await self._call("become", (role, rank), _SPAWN_TIMEOUT_S)

    async def start(self, spec: RankSpec, *, timeout_s: float) -> None:
        await self._call("start", (spec,), timeout_s)

    async def join(self, epoch: EpochSpec, *, timeout_s: float) -> None:
        await self._call("join", (epoch,), timeout_s)

    async def leave(self, *, timeout_s: float) -> None:
        await self._call("leave", (), timeout_s)

    async def health(self, *, timeout_s: float) -> RankHealth:
        return await self._call("health", (), timeout_s)

    async def restart(self) -> None:
        self.kill()
        self._spawn()
        await self._call("become", self._role, _SPAWN_TIMEOUT_S)

    def kill(self, sig: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, sig)
        if sig == signal.SIGKILL:
            self.process.join()

    async def _call(self, call: str, arguments: object, timeout_s: float):
        async with self._lock:
            try:
                ok, answer = await asyncio.to_thread(self._ask, call, arguments, timeout_s)
            except (EOFError, OSError):
                raise ShardLostError(f"{self.name} is not running") from None
        if not ok:
            raise answer
        return answer

    def _ask(self, call: str, arguments: object, timeout_s: float):
        self._pipe.send((call, arguments))
        if not self._pipe.poll(timeout_s):
            raise ShardLostError(f"{self.name} did not answer within {timeout_s:.0f} s")
        return self._pipe.recv()


class ProcessPool:
    """Rank processes to build cells from."""

    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="ostro-test-")
        self._peers: list[ProcessPeer] = []

    def take(self, count: int) -> list[ProcessPeer]:
        self._peers = [peer for peer in self._peers if peer.process.is_alive()]
        while len(self._peers) < count:
            self._peers.append(ProcessPeer(f"spare-{len(self._peers)}", self.directory))
        return self._peers[:count]

    def close(self) -> None:
        for peer in self._peers:
            peer.kill(signal.SIGCONT)
            peer.kill()


class LocalCell:
    """A router, its ranks and one ingress client, all real but for Ray."""

    def __init__(self, router: Router, client: CellClient, peers: Sequence[ProcessPeer]) -> None:
        self.router = router
        self.client = client
        self.peers = peers

    async def generate(self, request: GenerationRequest) -> list[TokenEvent]:
        return [event async for event in self.client.submit(request)]

    async def wait_ready(self, timeout_s: float = _READY_TIMEOUT_S) -> None:
        async with asyncio.timeout(timeout_s):
            while not self.client.ready:
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def local_cell(
    pool: ProcessPool,
    deployment: DeploymentConfig,
    model_dir: Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    recovery_timeout_s: float = 0.0,
) -> AsyncIterator[LocalCell]:
    layout = deployment.layout
    peers = pool.take(layout.world_size())
    for rank, peer in enumerate(peers):
        await peer.become("attention" if rank in layout.attention_ranks() else "expert", rank)
    secret = secrets.token_bytes(16)
    router = Router(
        deployment,
        str(model_dir),
        peers,
        device=device,
        dtype=dtype,
        host="127.0.0.1",
        listen_address="unix:",
        secret=secret,
    )
    client = CellClient(
        router.address,
        secret,
        ingress_id="test",
        submit_timeout_s=10.0,
        recovery_timeout_s=recovery_timeout_s,
    )
    cell = LocalCell(router, client, peers)
    try:
        await router.start()
        client.start()
        await cell.wait_ready()
        yield cell
    finally:
        await client.close()
        await cell.router.stop()
