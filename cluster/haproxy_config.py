"""What Ray Serve writes for HAProxy, made ours: TLS on the public ports, nothing else in public.

Serve's text is changed line by line. A line that is not there as expected keeps HAProxy from
starting at all: that a public port speaks clear text would go unnoticed, that none opens does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ostro.actors.errors import OstroError
from ostro.cluster.face_listeners import CLIENT_SUBJECT_HEADER, FaceListeners, bracketed
from ostro.cluster.haproxy_refusals import error_files, grpc_refusal, http_refusal
from ostro.configs.tls import TlsConfig

_RELOAD_SCRIPT = Path(__file__).with_name("haproxy_reload.lua")
_RELOAD_PERIOD_S = 2
# Without it a connection that never finishes its headers is kept for as long as a silent client.
_HEADER_TIMEOUT = "timeout http-request 20s"
# Mozilla's "intermediate" list without DHE; TLS 1.3 has its own.
_CIPHERS = (
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:"
    "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384:"
    "ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305"
)
_NO_CERTIFICATE = "this server asks for a client certificate that an authority it knows has signed"
_ERROR = {
    "message": _NO_CERTIFICATE,
    "type": "authentication_error",
    "param": None,
    "code": "client_certificate_required",
}


class UnknownHaproxyConfigError(OstroError):
    """Ray Serve writes another configuration than the one that this code knows."""

    code = "unknown_haproxy_config"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Face:
    """One of Serve's two frontends.

    Attributes:
        frontend: Its name in Serve's text.
        alpn: What it speaks over TLS.
        open_paths: What load balancers and kubelets ask, who bring no client certificate.
        refusal: The answer to others without one, in HAProxy's words.
    """

    frontend: str
    alpn: str
    open_paths: str
    refusal: str


_FACES = (
    _Face(
        frontend="http_frontend",
        alpn="h2,http/1.1",
        open_paths="/live /ready /health /-/healthz",
        refusal="status 401 content-type application/json "
        f"string '{json.dumps({'error': _ERROR, 'object': 'error', **_ERROR})}'",
    ),
    _Face(
        frontend="grpc_frontend",
        alpn="h2",
        open_paths="/grpc.health.v1.Health/Check /grpc.health.v1.Health/Watch",
        # Trailers only, as gRPC answers: with another status a client would not read them.
        refusal="status 200 hdr content-type application/grpc hdr grpc-status 16 "
        f'hdr grpc-message "{_NO_CERTIFICATE}"',
    ),
)


@dataclass(frozen=True, slots=True)
class HaproxyFolder:
    """Where Serve keeps the files of one HAProxy, and we what belongs to it."""

    path: Path

    def pem(self) -> Path:
        """The certificate of the faces; HAProxy looks for the key beside it."""
        return self.path / "faces.pem"

    def client_ca(self) -> Path:
        """Who signs the certificates of clients."""
        return self.path / "clients.pem"

    def client_crl(self) -> Path:
        """Which of those do not count any more."""
        return self.path / "revoked.pem"

    def reload_script(self) -> Path:
        """What reads them again."""
        return self.path / "reload.lua"

    def error_file(self, status: int) -> Path:
        """What is said in place of a status of HAProxy's own."""
        return self.path / f"ostro-{status}.http"

    def write_error_files(self) -> None:
        """Make what `error_file` names."""
        for status, answer in error_files().items():
            self.error_file(status).write_text(answer, newline="")

    def link(self, tls: TlsConfig) -> None:
        """Give the files names that HAProxy pairs and needs no quotes for; nothing is copied."""
        files: dict[Path, str | Path] = {
            self.reload_script(): _RELOAD_SCRIPT,
            self.pem(): tls.cert_file,
            self.path / "faces.pem.key": tls.key_file,
        }
        if tls.client_ca_file is not None:
            files[self.client_ca()] = tls.client_ca_file
        if tls.client_crl_file is not None:
            files[self.client_crl()] = tls.client_crl_file
        for name, file in files.items():
            name.unlink(missing_ok=True)
            name.symlink_to(file)


def make_ours(config: str, listeners: FaceListeners, folder: HaproxyFolder) -> str:
    """Serve's configuration, changed for a deployment.

    Each request carries its client's address, behind those that others say it came by, and headers
    that do not come are given up. Where no replica answers, callers are told to try again. Beside
    the faces: HAProxy's metrics, which Ray exports too, and statistics stay on loopback, and its
    admin socket is for the user that runs it.

    Raises:
        UnknownHaproxyConfigError: A line to change is not there, or not once.
    """
    config = _change(config, r"(defaults\n    mode http)$", rf"\g<1>\n    {_HEADER_TIMEOUT}")
    config = _change(config, r"(    stats socket \S+ mode )666 ", r"\g<1>600 ")
    config = _change(config, r"(frontend prometheus\n    bind ):", r"\g<1>127.0.0.1:")
    config = _change(config, r"(listen stats\n  bind )\*:", r"\g<1>127.0.0.1:")
    for face in _FACES:
        config = _open_face(config, face, listeners, folder)
    config = _refuse_kindly(config, folder)
    return config if listeners.tls is None else _reload_files(config, listeners.tls, folder)


def _refuse_kindly(config: str, folder: HaproxyFolder) -> str:
    """Have HAProxy say itself what a replica would say that cannot serve now."""
    for status in error_files():
        file = folder.error_file(status)
        config = _change(config, rf"    errorfile {status} \S+$", f"    errorfile {status} {file}")
    nowhere = r"(backend default_backend\n    http-request return ).*$"
    config = _change(config, nowhere, lambda found: found[1] + http_refusal())
    if "backend default_grpc_backend\n" in config:  # while no replica is known
        nowhere = r"(backend default_grpc_backend\n(?:    .*\n)*?    http-request return ).* if .*$"
        config = _change(config, nowhere, lambda found: found[1] + grpc_refusal())
    return config


def _open_face(config: str, face: _Face, listeners: FaceListeners, folder: HaproxyFolder) -> str:
    """A face on its public address, and what its requests pass first."""
    tls = listeners.tls

    def ours(found: re.Match[str]) -> str:
        bind = found["bind"]
        if tls is not None:
            port = found["port"]
            bind = f"{_public(listeners.host, port)}{found['proto']} {_speak(face, tls, folder)}"
        rules = [f"del-header {CLIENT_SUBJECT_HEADER}", "add-header x-forwarded-for %[src]"]
        rules += [] if tls is None else _rules(face, tls)
        return "\n    ".join((found["head"] + bind, *(f"http-request {rule}" for rule in rules)))

    pattern = (
        rf"(?P<head>frontend {face.frontend}\n(?:    #.*\n)*    bind )"
        r"(?P<bind>\S+:(?P<port>\d+)(?P<proto>(?: proto h2)?))$"
    )
    return _change(config, pattern, ours)


def _public(host: str, port: str) -> str:
    return f"[::]:{port} v4v6" if host == "::" else f"{bracketed(host)}:{port}"


def _speak(face: _Face, tls: TlsConfig, folder: HaproxyFolder) -> str:
    # `optional`, for the open paths; a certificate that is shown must be a good one all the same.
    clients = f" ca-file {folder.client_ca()} verify optional" if tls.client_ca_file else ""
    clients += f" crl-file {folder.client_crl()}" if tls.client_crl_file else ""
    return (
        f"ssl crt {folder.pem()} alpn {face.alpn} ssl-min-ver TLSv{tls.min_version} "
        f"ciphers {_CIPHERS} no-tls-tickets{clients}"
    )


def _rules(face: _Face, tls: TlsConfig) -> list[str]:
    rules = ["set-header x-forwarded-proto https"]
    if tls.client_ca_file is not None:
        rules += [
            f"return {face.refusal} if !{{ ssl_c_used }} !{{ path {face.open_paths} }}",
            f"set-header {CLIENT_SUBJECT_HEADER} %[ssl_c_s_dn(,0,rfc2253)] if {{ ssl_c_used }}",
        ]
    return rules


def _reload_files(config: str, tls: TlsConfig, folder: HaproxyFolder) -> str:
    """Read the files again when they change; a stream that is under way keeps what it has."""

    def ours(found: re.Match[str]) -> str:
        clients = f" {folder.client_ca()}" if tls.client_ca_file is not None else ""
        clients += f" {folder.client_crl()}" if tls.client_crl_file is not None else ""
        return (
            f"{found[0]}\n    lua-load {folder.reload_script()} {found['socket']} "
            f"{_RELOAD_PERIOD_S} {folder.pem()}{clients}"
        )

    return _change(config, r"    stats socket (?P<socket>\S+) .*$", ours)


def _change(config: str, pattern: str, by: str | Callable[[re.Match[str]], str]) -> str:
    changed, times = re.subn(rf"^{pattern}", by, config, flags=re.MULTILINE)
    if times != 1:
        raise UnknownHaproxyConfigError(
            f"Ray Serve's configuration of HAProxy fits {pattern!r} {times} times, not once: "
            f"Ostro does not know this version of Ray"
        )
    return changed
