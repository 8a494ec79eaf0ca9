"""The router by itself, without ranks."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from engine_fakes import make_request

from ostro.actors.errors import ShardLostError
from ostro.actors.fabric.messages import Message, Rejected
from ostro.actors.fabric.placement import initial_placement
from ostro.actors.router import Router, _Ground
from ostro.configs.load import load_deployment


class HeardConnection:
    """An ingress replica's connection, which keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Message] = []

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
