"""Ray Serve in front of a cell: HTTP and gRPC up, and known to answer."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, gRPCOptions

from ostro.actors.errors import NotReadyError
from ostro.cluster.app import SERVICERS, IngressSpec, build_app
from ostro.configs.deployment import ServingConfig

_APP_NAME = "ostro"
_READY_TIMEOUT_S = 120.0
_POLL_S = 0.1


def start_ingress(spec: IngressSpec) -> None:
    """Serve a cell over HTTP and gRPC; returns once the replicas run.

    Raises:
        NotReadyError: Ray Serve did not come up.
    """
    serving = spec.deployment.serving
    with _named_failure():
        serve.start(
            proxy_location="EveryNode",
            http_options=HTTPOptions(host=serving.host, port=serving.http_port),
            grpc_options=gRPCOptions(
                port=serving.grpc_port, grpc_servicer_functions=list(SERVICERS)
            ),
        )
        serve.run(build_app(spec), name=_APP_NAME, route_prefix="/")


def wait_ready(serving: ServingConfig) -> None:
    """Wait until the ingress says that the cell takes requests.

    Raises:
        NotReadyError: It did not in time.
    """
    any_address = serving.host in ("0.0.0.0", "::")
    host = "127.0.0.1" if any_address else serving.host
    url = f"http://{host}:{serving.http_port}/ready"
    deadline_s = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            with urllib.request.urlopen(url, timeout=2.0):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(_POLL_S)
    raise NotReadyError(f"the ingress did not answer on {url} within {_READY_TIMEOUT_S:.0f} s")


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
