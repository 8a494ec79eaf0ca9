"""What Ray finds in the environment."""

import os
import socket

import pytest

from ostro.cluster.ray_environment import _SIDE_PORTS, can_bind, prepare_environment


@pytest.fixture
def environment(monkeypatch):
    """An empty environment."""
    empty: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", empty)
    return empty


def test_a_cluster_of_our_own_gets_a_token(environment):
    prepare_environment()
    assert environment["RAY_AUTH_MODE"] == "token"
    assert len(environment["RAY_AUTH_TOKEN"]) == 64


def test_a_token_that_is_there_is_kept(environment):
    environment["RAY_AUTH_TOKEN_PATH"] = "/somewhere"
    prepare_environment()
    assert "RAY_AUTH_TOKEN" not in environment


def test_a_cluster_that_runs_keeps_its_own_way_of_authentication(environment):
    environment["RAY_ADDRESS"] = "10.0.0.1:6379"
    prepare_environment()
    assert not {name for name in environment if name.startswith("RAY_AUTH")}
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"


def test_a_cluster_that_runs_is_shown_the_token_that_is_there(environment):
    environment |= {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_TOKEN": "secret"}
    prepare_environment()
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN"] == "secret"


def test_side_ports_differ_and_are_none_that_the_system_hands_out(environment):
    prepare_environment()
    ports = {int(environment[name]) for name in _SIDE_PORTS}
    assert len(ports) == len(_SIDE_PORTS)
    assert all(port < 32_768 for port in ports)


def test_a_port_that_is_taken_is_not_free():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        port = taken.getsockname()[1]
        assert not can_bind(port)
