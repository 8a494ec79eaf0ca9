"""Ray Serve in front of a cell: HTTP and gRPC up, and known to answer."""

from __future__ import annotations

import logging
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, gRPCOptions

from ostro.actors.errors import NotReadyError
from ostro.cluster.app import SERVICERS, IngressSpec, build_app
from ostro.cluster.face_listeners import ANY_ADDRESS, FaceListeners, bracketed
from ostro.cluster.tls_certificate import FaceCertificate, trust_only
from ostro.configs.deployment import ServingConfig
from ostro.configs.errors import ConfigError
from ostro.configs.security import is_loopback

_APP_NAME = "ostro"
_READY_TIMEOUT_S = 120.0
_POLL_S = 0.1


def clear_ingress() -> None:
    """Make sure that Ray Serve does not run: a running one keeps the ports it has.

    Raises:
        ConfigError: It runs somebody's applications.
    """
    status = serve.status()
    others = sorted(set(status.applications) - {_APP_NAME})
    if others:
        raise ConfigError(
            f"Ray Serve on this cluster runs {', '.join(others)} on ports of its own; "
            f"end that with `serve shutdown`, or use another Ray cluster"
        )
    if status.proxies:  # left behind by a launch that was killed
        serve.shutdown()


def reachable_host(serving: ServingConfig, head_address: str | None) -> str:
    """The host at which this process reaches the faces.

    Args:
        serving: Where the faces will open.
        head_address: The head node's address; None if this process is on it.

    Raises:
        ConfigError: The faces would open on the head node's loopback, out of reach.
    """
    if serving.host in ANY_ADDRESS:
        return head_address or "127.0.0.1"
    if head_address is not None and is_loopback(serving.host):
        raise ConfigError(
            f"serving.host={serving.host}: HTTP and gRPC would open for the head node "
            f"{head_address} alone; run there, or set serving.host=0.0.0.0"
        )
    return serving.host


def start_ingress(spec: IngressSpec) -> None:
    """Serve a cell over HTTP and gRPC; returns once the replicas run.

    On any address: from the head and from every node with a replica. One address is one machine's,
    and replicas listen where the faces do; then all of it is on the head. So it is with TLS: what
    leaves a host is encrypted.

    Raises:
        NotReadyError: Ray Serve did not come up.
    """
    serving = spec.deployment.serving
    listeners = FaceListeners.of(serving)
    on_head = listeners.on_head()
    # Else it says on stderr, between our own lines and tables, what they tell.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with _named_failure():
        serve.start(
            proxy_location="HeadOnly" if on_head else "EveryNode",
            http_options=HTTPOptions(host=listeners.serve_host(), port=serving.http_port),
            grpc_options=gRPCOptions(
                port=serving.grpc_port, grpc_servicer_functions=list(SERVICERS)
            ),
            controller_options={"runtime_env": {"env_vars": listeners.to_environment()}},
        )
        serve.run(build_app(spec, on_head=on_head), name=_APP_NAME, route_prefix="/")


def wait_ready(host: str, http_port: int, certificate: FaceCertificate | None) -> None:
    """Wait until the ingress says that the cell takes requests.

    Args:
        host: Where this process reaches it.
        http_port: Likewise.
        certificate: What it shows; None if it speaks clear text.

    Raises:
        NotReadyError: It did not in time.
    """
    trust = None if certificate is None else trust_only(certificate)
    scheme = "http" if certificate is None else "https"
    url = f"{scheme}://{bracketed(host)}:{http_port}/ready"
    opener = urllib.request.build_opener(
        # Never by way of a proxy that the environment names for the outside.
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=trust),
    )
    last: OSError | None = None
    deadline_s = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            with opener.open(url, timeout=2.0):
                return
        except OSError as error:  # every failure of urllib's is one
            last = error
            time.sleep(_POLL_S)
    raise NotReadyError(
        f"the ingress did not answer on {url} within {_READY_TIMEOUT_S:.0f} s: {last}"
    )


def stop_ingress() -> None:
    """End Ray Serve; harmless if it does not run."""
    serve.shutdown()


@contextmanager
def _named_failure() -> Iterator[None]:
    """Ray's own failures as one of ours, in a line."""
    try:
        yield
    except (RayError, RuntimeError) as error:
        first = str(error).strip().split("\n", 1)[0]
        raise NotReadyError(f"HTTP and gRPC did not open: {first}; see Ray's logs") from error
