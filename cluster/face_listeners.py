"""Who listens where: the public ports of HTTP and gRPC, and what Ray Serve keeps behind them.

Serve knows one host, for HTTP alone; its gRPC servers, in replicas and in the proxy that stands in
for HAProxy, listen on every address. The callback below puts them where HTTP listens. With TLS that
is the head's loopback, and only HAProxy, as `ostro.cluster.haproxy` starts it, is out in public.

Serve hands its controller's environment down to its proxies and replicas; `FaceListeners` travels
in it. This module imports Ray inside functions only: HAProxy's start need not wait for it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ostro.configs.deployment import ServingConfig
from ostro.configs.tls import TlsConfig

# Who a client's certificate says that it is (RFC 4514), for the application behind HAProxy. Its
# value is HAProxy's alone only where `serving.tls.client_ca_file` is set.
CLIENT_SUBJECT_HEADER = "x-client-certificate-subject"

ANY_ADDRESS = ("0.0.0.0", "::")  # hosts that stand for every address of a machine
_VARIABLE = "OSTRO_FACE_LISTENERS"
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class FaceListeners:
    """Where HTTP and gRPC listen; the ports are Serve's own options.

    Attributes:
        host: Of the public ports.
        tls: How HAProxy speaks there; None is clear text.
    """

    host: str
    tls: TlsConfig | None = None

    @classmethod
    def of(cls, serving: ServingConfig) -> FaceListeners:
        """What a deployment asks for."""
        return cls(host=serving.host, tls=serving.tls)

    def serve_host(self) -> str:
        """What Ray Serve is told, so where replicas listen."""
        return self.host if self.tls is None else _LOOPBACK

    def on_head(self) -> bool:
        """Whether all of it is on the head: one address is one machine's, and so is loopback."""
        return self.serve_host() not in ANY_ADDRESS

    def to_environment(self) -> dict[str, str]:
        """Variables for the processes of Serve."""
        return {
            _VARIABLE: json.dumps(asdict(self)),
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.listen_where_http_does",
        }

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> FaceListeners | None:
        """The inverse of `to_environment`; None where no launch of ours started Serve."""
        if _VARIABLE not in environment:
            return None
        values = json.loads(environment[_VARIABLE])
        tls = values["tls"]
        return cls(host=values["host"], tls=None if tls is None else TlsConfig(**tls))


def listen_where_http_does() -> list[Any]:
    """Called by Ray Serve in replicas and proxies, before their servers start.

    Returns:
        No middlewares, which is what Serve asks such a callback for.
    """
    from ray.serve._private import default_impl
    from ray.util import get_node_ip_address

    listeners = FaceListeners.from_environment(os.environ)
    if listeners is None:
        return []
    host = listeners.serve_host()
    faces = _listening_on(host, default_impl.add_grpc_address)
    default_impl.add_grpc_address = faces  # type: ignore[assignment]  # its names are its own
    # What replicas ask each other asks for Ray's token, and comes in by the node's own address.
    if replica := sys.modules.get("ray.serve._private.replica"):
        own = _listening_on(get_node_ip_address(), replica.add_port_to_grpc_server)
        replica.add_port_to_grpc_server = own  # type: ignore[attr-defined]
    return []


def _listening_on(host: str, add: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """A function that adds an address to a gRPC server, on one host instead of on all."""

    def add_here(server: Any, address: str) -> Any:
        port = address.rpartition(":")[2]
        return add(server, address if host in ANY_ADDRESS else f"{bracketed(host)}:{port}")

    return add_here


def bracketed(host: str) -> str:
    """A host as it stands before a port.

    Example:
        "::1" -> "[::1]"
    """
    return f"[{host}]" if ":" in host else host
