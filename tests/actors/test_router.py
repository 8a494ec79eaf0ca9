"""The router by itself, without ranks."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from engine_fakes import make_request

from ostro.actors import router as router_module
from ostro.actors.errors import QuotaError, ShardLostError
from ostro.actors.fabric.channel import AsyncConnection
from ostro.actors.fabric.messages import Cancel, CountRequest, Message, Rejected, decode, encode
from ostro.actors.fabric.placement import initial_placement
from ostro.actors.router import Router, _Ground
from ostro.cluster.cell_client import CellClient
from ostro.configs.key_table import Key, KeyTable, Quota, Scope
from ostro.configs.load import load_deployment


class HeardConnection:
    """An ingress replica's connection, which keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Message] = []
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True

    def send(self, message: Message) -> None:
        self.told.append(message)


def make_router(**layout: float) -> Router:
    deployment = load_deployment("laptop_single")
    return Router(
        replace(deployment, layout=replace(deployment.layout, **layout)),
        "",
        [],
        device="cpu",
        dtype="float32",
        host="127.0.0.1",
        listen_address="unix:",
        secret=b"secret",
    )


def test_an_epoch_that_replaces_another_takes_no_requests_over_in_silence() -> None:
    router, replica = make_router(join_timeout_s=0.01), HeardConnection()
    store: Any = SimpleNamespace(port=0)
    connection: Any = replica
    router._ingresses.add("i", connection)
    router._requests.place(make_request("lost"), "i")
    with pytest.raises(ShardLostError, match="did not connect"):
        asyncio.run(router._begin_epoch(_Ground(initial_placement(4, [0], 0), store, "unix:")))
    (told,) = replica.told
    assert isinstance(told, Rejected)
    assert (told.request_id, told.error) == ("lost", "ShardLostError")
    assert router._quotas._num_live == {}


def test_a_replica_that_dials_again_has_given_up_on_what_it_had_asked_for() -> None:
    """Its last connection may not have been found broken here yet."""
    router, rank, earlier = make_router(), HeardConnection(), HeardConnection()
    sent: list[tuple[int, Message]] = []
    epoch: Any = SimpleNamespace(
        number=3, serving=False, send=lambda rank, message: sent.append((rank, message))
    )
    router._epoch = epoch
    router._ingresses.add("i", cast(AsyncConnection, earlier))
    router._requests.place(make_request("left"), "i")
    router._requests.place(make_request("of another"), "j")

    async def hangs_up() -> None:
        return None

    again: Any = rank
    again.receive = hangs_up
    asyncio.run(router._serve_ingress(again, "i"))
    assert sent[0] == (0, Cancel(3, "left"))
    assert earlier.is_closed


class JoinedConnection:
    """Both ends of an ingress replica's connection: what one says the other reads at once."""

    def __init__(self, router: Router, client: CellClient) -> None:
        self._router, self._client = router, client

    def send(self, message: Message) -> bool:
        read = decode(encode(message))
        if isinstance(read, CountRequest):
            self._router._answer(cast(AsyncConnection, self), "i", read)
        else:
            self._client._take(read)
        return True


def test_a_request_that_generates_nothing_is_counted_for_its_tenant() -> None:
    router = make_router()
    digest = "0" * 64
    key = Key(tenant="acme", sha256=digest, scopes=(Scope.GENERATE,))
    table = KeyTable(keys=(key,), quotas={"acme": Quota(requests_per_minute=2)})

    async def nowhere() -> str:
        raise AssertionError

    async def run() -> QuotaError:
        await router.set_keys(table)
        client = CellClient(nowhere, b"secret", ingress_id="i", submit_timeout_s=1)
        client._router = cast(AsyncConnection, JoinedConnection(router, client))
        for tenant in ("acme", "acme", "other"):
            await client.count_request(tenant)
        with pytest.raises(QuotaError, match="requests_per_minute of 2") as caught:
            await client.count_request("acme")
        return caught.value

    error = asyncio.run(run())
    assert (error.param, error.retry_after_s) == ("requests_per_minute", pytest.approx(30, abs=2))


def test_mending_goes_on_after_an_error_that_nobody_expected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router = make_router()
    store: Any = SimpleNamespace(port=0)
    router._ground = _Ground(initial_placement(4, [0], 0), store, "unix:")
    ends = iter([RuntimeError("a bug"), OSError("no such thing"), None])
    begun: list[object] = []

    async def begin(ground: _Ground) -> None:
        begun.append(ground)
        if (error := next(ends)) is not None:
            raise error

    monkeypatch.setattr(router, "_begin_epoch", begin)
    monkeypatch.setattr(router_module, "_MEND_PAUSE_S", (0.0,))
    asyncio.run(asyncio.wait_for(router._mend(), 20))
    assert len(begun) == 3
