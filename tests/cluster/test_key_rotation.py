"""Keys on their way from the router to every ingress replica, at first and when they change."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from hashlib import sha256

import pytest

from ostro.actors.errors import NotReadyError, OstroError
from ostro.actors.router import Router
from ostro.cluster.cell_client import CellClient
from ostro.cluster.key_ring import KeyRing
from ostro.configs.key_table import Key, KeyTable, Scope
from ostro.configs.load import load_deployment

WAIT_S = 20


def table(*keys: str) -> KeyTable:
    return KeyTable(
        keys=tuple(
            Key(
                tenant="acme",
                sha256=sha256(key.encode()).hexdigest(),
                scopes=(Scope.GENERATE,),
            )
            for key in keys
        )
    )


class Replica:
    """An ingress replica, as far as keys go."""

    def __init__(self, address: str, name: str) -> None:
        self.ring = KeyRing(is_open=False)

        async def find_router() -> str:
            return address

        self.client = CellClient(
            find_router, b"secret", ingress_id=name, submit_timeout_s=5, on_keys=self.ring.replace
        )
        self.client.start()

    def knows(self, key: str) -> bool:
        try:
            return self.ring.caller(key).tenant == "acme"
        except OstroError:
            return False


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not holds():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def router_that_listens():
    router = Router(
        load_deployment("laptop_single"),
        "",
        [],
        device="cpu",
        dtype="float32",
        host="127.0.0.1",
        listen_address="unix:",
        secret=b"secret",
    )
    address = await router._server.start()
    try:
        yield router, address
    finally:
        await router.stop()


def test_keys_reach_every_replica_and_change_without_a_restart():
    async def run():
        async with router_that_listens() as (router, address):
            await router.set_keys(table("old"))
            replicas = [Replica(address, name) for name in ("first", "second")]
            with pytest.raises(NotReadyError):
                replicas[0].ring.caller("old")
            await until(lambda: all(replica.knows("old") for replica in replicas))
            await router.set_keys(table("old", "new"))
            await until(lambda: all(replica.knows("new") for replica in replicas))
            assert all(replica.knows("old") for replica in replicas)
            await router.set_keys(table("new"))
            await until(lambda: not any(replica.knows("old") for replica in replicas))
            replicas.append(Replica(address, "late"))
            await until(lambda: replicas[-1].knows("new"))
            assert not replicas[-1].knows("old")
            for replica in replicas:
                await replica.client.close()

    asyncio.run(run())
