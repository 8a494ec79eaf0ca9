"""The environment that Ray and Ray Serve read when they are imported; set it before that.

On a cluster that runs already, these must be in the environment of every node's `ray start`;
`ray_cluster.yaml` exports them, and tuned node health checks with them. A single machine goes
without those: its only node must not be declared dead for being busy.
"""

from __future__ import annotations

import itertools
import os
import secrets
import socket
import sys
from pathlib import Path

from ostro.configs.deployment import ServingConfig

_FIXED = {
    # HAProxy in front of the replicas: 6 to 12 times the requests of Serve's Python proxy.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Our own drain has ended by the time Serve stops; its 30 s of grace would only be waited for.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    # A replica that comes or goes reloads HAProxy; streams in the old one may go on until then. As
    # long as a generation may take: less would cut the streams of everybody.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
    # A busy laptop takes longer than Serve's 5 s to bring its proxy up; it is not broken.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
    # A proxy is replaced after three checks that failed: 7 s without one instead of 28.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    # uvicorn would believe `x-forwarded-for` from loopback, where HAProxy passes on anybody's; see
    # `security.num_trusted_proxies`.
    "FORWARDED_ALLOW_IPS": "",
    # Ray runs actors at nice 15, behind whatever else there is; a cell is as slow as its last rank.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_ENVELOPE_BYTES = 2**20
_RANGE = 199
_SIDE_RANGE = range(30_000, 32_000)
_TRIES = 20
_SIDE_PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)


def prepare_environment(max_body_bytes: int = ServingConfig().max_body_bytes) -> None:
    """Set what is not set already; a local cluster gets a fresh token that never touches a disk.

    Args:
        max_body_bytes: The deployment's, which bounds gRPC messages as it does HTTP bodies.
    """
    for name, value in {**_FIXED, **_message_limits(max_body_bytes)}.items():
        os.environ.setdefault(name, value)
    # A cluster that runs has a token or none. It calls back: a process that asks it for a token it
    # does not have is taken for dead, and so is every actor of that process.
    if (os.environ.get("RAY_ADDRESS") or "local") == "local":
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if os.environ["RAY_AUTH_MODE"] == "token" and not _has_token():
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        # Ray on one machine alone, as it is by default on macOS: its ports open on loopback.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    elif _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    # HAProxy by way of `ostro.cluster.haproxy`, which says why.
    haproxy = Path(sys.executable).with_name("ostro-haproxy")
    if haproxy.exists():
        os.environ.setdefault("RAY_SERVE_HAPROXY_BINARY_PATH", str(haproxy))
    for name, port in zip(_SIDE_PORTS, _free_ports(len(_SIDE_PORTS)), strict=True):
        os.environ.setdefault(name, str(port))
    for face in ("HTTP", "GRPC"):
        first = _free_range()
        os.environ.setdefault(f"RAY_SERVE_DIRECT_INGRESS_MIN_{face}_PORT", str(first))
        os.environ.setdefault(f"RAY_SERVE_DIRECT_INGRESS_MAX_{face}_PORT", str(first + _RANGE))


def _message_limits(max_body_bytes: int) -> dict[str, str]:
    return {
        # Serve's own limit is 2 GiB.
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(max_body_bytes),
        # From Serve's own proxy, which stands in while HAProxy is down, to a replica.
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(max_body_bytes + _ENVELOPE_BYTES),
    }


def _has_token() -> bool:
    return "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ


def _free_range() -> int:
    """First port of a range for replicas' own listeners.

    Serve takes the same ports in every cluster and does not mind that another one on this machine
    has them: their calls would get mixed up.
    """
    for _ in range(_TRIES):
        first = 20_000 + secrets.randbelow(50) * (_RANGE + 1)
        if all(_is_free(port) for port in range(first, first + 3)):
            return first
    return first


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _free_ports(count: int) -> list[int]:
    """Different free ports that no connection of this machine is given meanwhile.

    HAProxy binds them seconds later. From 32768 on the system hands them out to whoever connects:
    one of those was gone by then.
    """
    candidates = secrets.SystemRandom().sample(_SIDE_RANGE, len(_SIDE_RANGE))
    return list(itertools.islice(filter(can_bind, candidates), count))


def can_bind(port: int) -> bool:
    """Whether a server could listen on a port now, on any address."""
    with socket.socket() as probe:
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
        return True
