"""Where Ray Serve is told to listen, and what its processes make of it."""

import os

import pytest
from ray.serve._private import default_impl

from ostro.cluster.face_listeners import FaceListeners, listen_where_http_does
from ostro.configs.tls import TlsConfig

TLS = TlsConfig(cert_file="/c.pem", key_file="/k.pem", client_ca_file="/ca.pem")


class FakeServer:
    """A gRPC server that notes its addresses."""

    def __init__(self) -> None:
        self.addresses: list[str] = []

    def add_insecure_port(self, address: str) -> int:
        self.addresses.append(address)
        return 1


@pytest.mark.parametrize(
    ("listeners", "serve_host", "on_head"),
    [
        (FaceListeners(host="127.0.0.1"), "127.0.0.1", True),
        (FaceListeners(host="0.0.0.0"), "0.0.0.0", False),
        (FaceListeners(host="0.0.0.0", tls=TLS), "127.0.0.1", True),
        (FaceListeners(host="10.0.0.7", tls=TLS), "127.0.0.1", True),
    ],
)
def test_with_tls_nothing_of_serve_leaves_the_head(listeners, serve_host, on_head):
    assert listeners.serve_host() == serve_host
    assert listeners.on_head() is on_head
    assert FaceListeners.from_environment(listeners.to_environment()) == listeners


def test_serve_that_others_started_is_left_alone():
    assert FaceListeners.from_environment({}) is None


@pytest.mark.parametrize(
    ("listeners", "address"),
    [
        (FaceListeners(host="0.0.0.0", tls=TLS), "127.0.0.1:20000"),
        (FaceListeners(host="::1"), "[::1]:20000"),
        (FaceListeners(host="0.0.0.0"), "[::]:20000"),
    ],
)
def test_grpc_listens_where_http_does(monkeypatch, listeners, address):
    monkeypatch.setattr(default_impl, "add_grpc_address", default_impl.add_grpc_address)
    monkeypatch.setattr(os, "environ", os.environ | listeners.to_environment())
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    assert listen_where_http_does() == []
    server = FakeServer()
    default_impl.add_grpc_address(server, "[::]:20000")
    assert server.addresses == [address]
