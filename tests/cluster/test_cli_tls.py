"""What the commands trust and show when they call a server."""

from __future__ import annotations

import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from certificates import Authority
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from typer.testing import CliRunner

from ostro.cluster.cli import app
from ostro.cluster.cli_tls import https_context, read_tls
from ostro.cluster.client_channel import Tls
from ostro.configs.errors import ConfigError


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


@pytest.fixture
def server(authority):
    return authority.issue("server", "localhost")


@pytest.fixture
def client(authority):
    return authority.issue("client", common_name="alice")


def handshake(server, tls: Tls | None) -> dict:
    """The subject of the client's certificate as a TLS server sees it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.cert, server.key)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.load_verify_locations(server.cert.parent / "ca.pem")
    ours, theirs = socket.socketpair()
    seen = {}

    def accept() -> None:
        with context.wrap_socket(theirs, server_side=True) as connection:
            seen.update(connection.getpeercert() or {})
            connection.sendall(b"hello")

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        with https_context(tls).wrap_socket(ours, server_hostname="localhost") as connection:
            assert connection.recv(5) == b"hello"
    finally:
        ours.close()
        thread.join(10)
    return seen


def test_without_options_the_address_decides():
    assert read_tls(None, None, None) is None


def test_an_authority_is_trusted_and_a_certificate_shown(authority, server, client):
    seen = handshake(server, read_tls(authority.ca, client.cert, client.key))
    assert ("commonName", "alice") in [pair for part in seen["subject"] for pair in part]


def test_a_servers_own_certificate_is_enough(server):
    assert handshake(server, read_tls(server.cert, None, None)) == {}


def test_the_environment_names_whom_to_trust(authority, server, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
    handshake(server, None)


def test_certificate_and_key_may_share_a_file(authority, server, client):
    client.cert.write_bytes(client.cert.read_bytes() + client.key.read_bytes())
    assert handshake(server, read_tls(authority.ca, client.cert, None))["subject"]


def test_a_key_alone_is_refused(client):
    with pytest.raises(ConfigError, match=r"--key .*--cert"):
        read_tls(None, None, client.key)


def test_what_cannot_be_used_is_named(authority, client):
    with pytest.raises(ConfigError, match=r"--ca /no/such: cannot be used: .*No such file"):
        read_tls(Path("/no/such"), None, None)
    with pytest.raises(ConfigError, match=r"--cert .*client\.pem: cannot be used"):
        read_tls(authority.ca, client.cert, None)


def test_an_encrypted_key_is_refused_and_not_asked_about(authority, client):
    key = load_pem_private_key(client.key.read_bytes(), None)
    locked = BestAvailableEncryption(b"secret")
    client.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked))
    with pytest.raises(ConfigError, match="the key is encrypted"):
        read_tls(authority.ca, client.cert, client.key)


# ---- what a command says where no connection comes about


@contextmanager
def listening(pair=None):
    """Port of a gRPC server that knows no method; over TLS with a certificate."""
    listener = grpc.server(ThreadPoolExecutor(1))
    if pair is None:
        port = listener.add_insecure_port("127.0.0.1:0")
    else:
        shown = (pair.key.read_bytes(), pair.cert.read_bytes())
        port = listener.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([shown]))
    listener.start()
    try:
        yield port
    finally:
        listener.stop(None).wait(10)


def status(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["status", *arguments])
    assert result.exit_code == 1
    return result.stderr


def test_an_address_is_called_over_tls_where_somebody_is_trusted(server, authority, monkeypatch):
    reached = "no Ostro of this version"
    with listening(server) as port:
        assert reached in status("--url", f"localhost:{port}", "--ca", str(authority.ca))
        monkeypatch.setenv("OSTRO_CA_FILE", str(authority.ca))
        assert reached in status("--url", f"localhost:{port}")
    with listening() as port:
        assert reached in status("--url", f"grpc://localhost:{port}")


def test_a_certificate_of_nobody_known_is_told(server):
    with listening(server) as port:
        assert "nobody we trust has signed its certificate" in status(
            "--url", f"https://localhost:{port}"
        )


def test_a_certificate_for_another_name_is_told(authority):
    with listening(authority.issue("other", "other.example.com")) as port:
        told = status("--url", f"https://localhost:{port}", "--ca", str(authority.ca))
    assert "its certificate is for other names" in told


def test_tls_where_clear_text_was_meant_is_told(server):
    with listening(server) as port:
        assert "write https://" in status("--url", f"localhost:{port}")


def test_clear_text_where_tls_was_meant_is_told():
    with listening() as port:
        assert "it speaks plain text" in status("--url", f"https://localhost:{port}")
