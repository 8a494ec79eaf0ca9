"""The real HAProxy on what Ray Serve writes for it and we change, before servers of the test."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
from certificates import Authority, tls_config
from free_port import free_port
from haproxy_stubs import backends
from ray.serve._private.common import RequestProtocol
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions, gRPCOptions
from wait_for import wait_for

from ostro.cluster.face_listeners import CLIENT_SUBJECT_HEADER, FaceListeners
from ostro.cluster.haproxy_config import HaproxyFolder, UnknownHaproxyConfigError, make_ours
from ostro.configs.tls import TlsConfig, TlsVersion

WAIT_S = 30
ECHO = "/test.Echo/Metadata"


@dataclass
class Proxy:
    """A running HAProxy and its public ports."""

    http_port: int
    grpc_port: int
    folder: Path
    process: subprocess.Popen
    go_on: object
    authority: Authority

    def url(self, path: str = "/echo") -> str:
        return f"https://localhost:{self.http_port}{path}"

    def trust(self, client=None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.authority.ca)
        if client is not None:
            context.load_cert_chain(client.cert, client.key)
        return context

    def get(self, path: str = "/echo", client=None, **fields) -> httpx.Response:
        return httpx.get(self.url(path), verify=self.trust(client), timeout=WAIT_S, **fields)

    def call(self, method: str = ECHO, client=None, metadata=()) -> dict[str, str]:
        key, cert = (client.key, client.cert) if client else (None, None)
        credentials = grpc.ssl_channel_credentials(
            self.authority.ca.read_bytes(),
            key and key.read_bytes(),
            cert and cert.read_bytes(),
        )
        with grpc.secure_channel(f"localhost:{self.grpc_port}", credentials) as channel:
            answer = channel.unary_unary(method)(b"", metadata=metadata, timeout=WAIT_S)
        return json.loads(answer)

    def shown(self) -> str:
        """The certificate that a new connection is shown."""
        return ssl.get_server_certificate(("127.0.0.1", self.http_port), timeout=WAIT_S)

    def log(self) -> str:
        return (self.folder / "log").read_text()


def write_config(folder: Path, http_port: int, grpc_port: int, behind: tuple[int, ...]) -> Path:
    """What Serve writes for an application with one replica; `behind` empty: before it knows it."""
    file = folder / "haproxy.cfg"
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=http_port),
        grpc_options=gRPCOptions(port=grpc_port, grpc_servicer_functions=["any"]),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "server-state"),
        metrics_socket_path=str(folder / "metrics.sock"),
        metrics_port=free_port(),
        stats_port=free_port(),
        has_received_routes=True,
        has_received_servers=True,
    )
    apps = {
        f"{protocol.value}-app": BackendConfig(
            name=f"{protocol.value}-app".lower(),
            path_prefix="/",
            app_name="app",
            protocol=protocol,
            servers=[ServerConfig(name="replica", host="127.0.0.1", port=port)],
        )
        for protocol, port in zip(
            (RequestProtocol.HTTP, RequestProtocol.GRPC), behind, strict=False
        )
    }

    async def write() -> None:
        HAProxyApi(config, apps, str(file))._generate_config_file_internal()

    asyncio.run(write())
    return file


@contextmanager
def running(folder: Path, authority: Authority, listeners: FaceListeners):
    http_port, grpc_port = free_port(), free_port()
    with backends() as (*behind, go_on):
        file = write_config(folder, http_port, grpc_port, tuple(behind))
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "ostro.cluster.haproxy", "-db", "-f", file],
                env=os.environ | listeners.to_environment(),
                stderr=log,
            )
        try:
            wait_open(process, folder, http_port)
            yield Proxy(http_port, grpc_port, folder, process, go_on, authority)
        finally:
            process.kill()
            process.wait(WAIT_S)


def wait_open(process: subprocess.Popen, folder: Path, port: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, (folder / "log").read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError((folder / "log").read_text())


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """Who signs the certificates of clients."""
    return Authority(tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def alice(clients):
    return clients.issue("alice", common_name="alice")


@pytest.fixture(scope="module")
def proxy(tmp_path_factory, authority):
    tls = tls_config(authority.issue("server", "localhost", "127.0.0.1"))
    folder = tmp_path_factory.mktemp("haproxy")
    with running(folder, authority, FaceListeners(host="0.0.0.0", tls=tls)) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def mutual(tmp_path_factory, authority, clients):
    """It asks clients for a certificate, and speaks the newest TLS only."""
    tls = tls_config(
        authority.issue("mutual", "localhost"), clients.ca, min_version=TlsVersion.TLS_1_3
    )
    folder = tmp_path_factory.mktemp("haproxy")
    with running(folder, authority, FaceListeners(host="127.0.0.1", tls=tls)) as proxy:
        yield proxy


# ---- TLS


@pytest.mark.parametrize("protocol", ["h2", "http/1.1"])
def test_http_speaks_both_versions_over_tls(proxy, protocol):
    context = proxy.trust()
    context.set_alpn_protocols([protocol])
    with (
        socket.create_connection(("127.0.0.1", proxy.http_port), WAIT_S) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as encrypted,
    ):
        assert encrypted.selected_alpn_protocol() == protocol


def test_both_faces_answer_over_tls(proxy):
    assert proxy.get().status_code == 200
    assert proxy.call()["x-forwarded-proto"] == "https"


def test_clear_text_is_refused(proxy):
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{proxy.http_port}/echo", timeout=WAIT_S)
    with (
        grpc.insecure_channel(f"127.0.0.1:{proxy.grpc_port}") as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        channel.unary_unary(ECHO)(b"", timeout=WAIT_S)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_callers_forge_neither_their_address_nor_a_certificate(proxy):
    forged = {"x-forwarded-for": "1.2.3.4", CLIENT_SUBJECT_HEADER: "CN=root"}
    for seen in (proxy.get(headers=forged).json(), proxy.call(metadata=list(forged.items()))):
        assert seen["x-forwarded-for"].split(", ")[-1] == "127.0.0.1"
        assert CLIENT_SUBJECT_HEADER not in seen


def test_headers_that_do_not_come_are_given_up(proxy):
    config = (proxy.folder / "haproxy.cfg").read_text()
    assert "defaults\n    mode http\n    timeout http-request 20s\n" in config


def test_nothing_but_the_faces_is_out_in_public(proxy):
    config = (proxy.folder / "haproxy.cfg").read_text()
    binds = [line.split()[1] for line in config.splitlines() if line.strip().startswith("bind ")]
    public = {address for address in binds if not address.startswith("127.0.0.1:")}
    assert public == {f"0.0.0.0:{proxy.http_port}", f"0.0.0.0:{proxy.grpc_port}"}
    assert len(binds) == 4
    assert (proxy.folder / "admin.sock").stat().st_mode & 0o077 == 0


def test_no_key_is_copied(proxy):
    assert (proxy.folder / "faces.pem.key").is_symlink()


# ---- certificates of clients


def test_a_client_without_a_certificate_is_told_so(mutual):
    answer = mutual.get("/v1/models")
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "client_certificate_required"
    with pytest.raises(grpc.RpcError) as refused:
        mutual.call()
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "client certificate" in refused.value.details()


@pytest.mark.parametrize("path", ["/live", "/ready", "/health"])
def test_health_needs_no_certificate(mutual, path):
    assert mutual.get(path).status_code == 200
    assert mutual.call("/grpc.health.v1.Health/Check")


@pytest.mark.parametrize(
    "path", ["/ready/", "//ready", "/ready/../v1/models", "/READY", "/metrics"]
)
def test_what_only_looks_like_health_needs_one(mutual, path):
    assert mutual.get(path).status_code == 401


def test_the_application_learns_who_a_client_is(mutual, alice):
    forged = {CLIENT_SUBJECT_HEADER: "CN=root"}
    http = mutual.get(client=alice, headers=forged).json()
    over_grpc = mutual.call(client=alice, metadata=list(forged.items()))
    for seen in (http, over_grpc):
        assert seen[CLIENT_SUBJECT_HEADER].startswith("CN=alice,")


def test_a_certificate_that_somebody_else_signed_is_refused(mutual, authority):
    stranger = authority.issue("stranger", common_name="alice")
    with pytest.raises(httpx.TransportError):
        mutual.get("/ready", client=stranger)
    with pytest.raises(grpc.RpcError):
        mutual.call("/grpc.health.v1.Health/Check", client=stranger)


def test_an_older_protocol_than_allowed_is_refused(mutual):
    context = mutual.trust()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(httpx.ConnectError):
        httpx.get(mutual.url("/ready"), verify=context, timeout=WAIT_S)


# ---- revocation


def test_a_revoked_certificate_is_refused_also_while_it_runs(tmp_path, authority, clients, alice):
    bob = clients.issue("bob", common_name="bob")
    crl = clients.revoke(bob)
    server = authority.issue("revoking", "localhost")
    tls = tls_config(server, clients.ca, client_crl_file=str(crl))
    with running(tmp_path, authority, FaceListeners(host="127.0.0.1", tls=tls)) as proxy:
        assert accepts(proxy, alice)
        assert not accepts(proxy, bob)
        with pytest.raises(grpc.RpcError):
            proxy.call(client=bob)
        assert proxy.call(client=alice)
        clients.revoke(alice)
        wait_for(lambda: accepts(proxy, bob))
        assert not accepts(proxy, alice)
        crl.write_text("no list")
        wait_for(lambda: "kept as it was: ssl crl-file" in proxy.log())
        assert accepts(proxy, bob)
        assert not accepts(proxy, alice)


# ---- renewal


def test_new_certificates_are_shown_and_streams_go_on(tmp_path, authority, clients, alice):
    server = authority.issue("renewed", "localhost", "127.0.0.1")
    client_ca = tmp_path / "clients.crt"
    client_ca.write_bytes(clients.ca.read_bytes())
    listeners = FaceListeners(host="127.0.0.1", tls=tls_config(server, client_ca))
    with (
        running(tmp_path, authority, listeners) as proxy,
        httpx.Client(verify=proxy.trust(alice), timeout=WAIT_S) as client,
        client.stream("GET", proxy.url("/drip")) as stream,
    ):
        lines = stream.iter_lines()
        assert next(lines) == "first"
        first = proxy.shown()
        # Half of a renewal: the new certificate without its key.
        old_key = server.key.read_bytes()
        authority.issue("renewed", "localhost", "127.0.0.1")
        new_key = server.key.read_bytes()
        server.key.write_bytes(old_key)
        wait_for(lambda: "kept as it was" in proxy.log())
        assert proxy.shown() == first
        server.key.write_bytes(new_key)
        wait_for(lambda: proxy.shown() != first)
        other = Authority(tmp_path / "other")
        # More than HAProxy takes at a time: 16 KiB.
        many = [Authority(tmp_path / f"ca-{i}").ca.read_bytes() for i in range(30)]
        bundle = b"\n".join([*many, other.ca.read_bytes()])
        assert len(bundle) > 2**14
        client_ca.write_bytes(bundle)
        bob = other.issue("bob", common_name="bob")
        wait_for(lambda: accepts(proxy, bob))
        assert not accepts(proxy, alice)
        proxy.go_on.set()
        assert list(lines) == ["last"]


def accepts(proxy: Proxy, client) -> bool:
    try:
        return proxy.get(client=client).status_code == 200
    except httpx.TransportError:
        return False


# ---- starting and ending


@pytest.fixture
def served_config(tmp_path):
    return write_config(tmp_path, free_port(), free_port(), (free_port(), free_port()))


def test_without_tls_the_public_ports_stay_as_serve_wrote_them(served_config):
    written = served_config.read_text()
    ours = make_ours(written, FaceListeners(host="::1"), HaproxyFolder(served_config.parent))
    http, grpc_bind = [line for line in written.splitlines() if "bind 127.0.0.1" in line]
    assert http in ours.splitlines()
    assert grpc_bind in ours.splitlines()
    assert " ssl " not in ours
    assert ours.count(f"del-header {CLIENT_SUBJECT_HEADER}") == 2


@pytest.mark.parametrize(
    ("host", "bind"), [("::", "bind [::]:{} v4v6 "), ("2001:db8::1", "bind [2001:db8::1]:{} ")]
)
def test_public_ports_open_on_ipv6(served_config, host, bind):
    written = served_config.read_text()
    tls = TlsConfig(cert_file="/c.pem", key_file="/k.pem")
    folder = HaproxyFolder(served_config.parent)
    ours = make_ours(written, FaceListeners(host=host, tls=tls), folder)
    ports = [
        line.split()[1].rpartition(":")[2] for line in written.splitlines() if "bind 127" in line
    ]
    assert all(bind.format(port) in ours for port in ports)


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("frontend grpc_frontend", "changed"),
        ("listen stats", "changed"),
        ("mode 666", "changed"),
        ("listen stats\n  bind *:", "listen stats\n  bind *:1\nlisten stats\n  bind *:"),
    ],
)
def test_a_configuration_that_is_not_known_starts_nothing(served_config, line, instead):
    written = served_config.read_text()
    assert line in written
    served_config.write_text(written.replace(line, instead))
    listeners = FaceListeners(host="0.0.0.0")
    with pytest.raises(UnknownHaproxyConfigError):
        make_ours(served_config.read_text(), listeners, HaproxyFolder(served_config.parent))
    started = subprocess.run(
        [sys.executable, "-m", "ostro.cluster.haproxy", "-db", "-f", served_config],
        env=os.environ | listeners.to_environment(),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert started.returncode == 1
    assert "Ostro does not know this version of Ray" in started.stderr


@contextmanager
def alone(folder: Path, *behind: int):
    """HAProxy with nobody behind it; gives both its ports."""
    http_port, grpc_port = free_port(), free_port()
    file = write_config(folder, http_port, grpc_port, behind)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ostro.cluster.haproxy", "-db", "-f", file],
            env=os.environ | FaceListeners(host="127.0.0.1").to_environment(),
            stderr=log,
        )
    try:
        wait_open(process, folder, http_port)
        yield http_port, grpc_port
    finally:
        process.kill()
        process.wait(WAIT_S)


@pytest.mark.parametrize("num_known", [0, 2], ids=["knows none", "reaches none"])
def test_where_no_replica_answers_callers_are_told_to_try_again(tmp_path, num_known):
    with alone(tmp_path, *(free_port() for _ in range(num_known))) as (http_port, grpc_port):
        answer = httpx.get(f"http://127.0.0.1:{http_port}/v1/models", timeout=WAIT_S)
        with (
            grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel,
            pytest.raises(grpc.RpcError) as refused,
        ):
            channel.unary_unary("/ostro.v1.GenerationService/Chat")(b"", timeout=WAIT_S)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    body = answer.json()
    assert body["error"]["type"] == body["type"] == "unavailable_error"
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_it_ends_with_the_process_that_started_it(served_config):
    starter = (
        "import subprocess, sys; print(subprocess.Popen([sys.executable, '-m', "
        "'ostro.cluster.haproxy', '-db', '-f', sys.argv[1]]).pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", starter, served_config],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with parent:
        pid = int(parent.stdout.readline())
        socket_file = served_config.parent / "admin.sock"
        wait_for(socket_file.exists)
        parent.kill()
    wait_for(lambda: has_ended(pid))


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
