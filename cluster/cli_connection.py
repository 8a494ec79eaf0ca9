"""How `ostro chat` and `ostro status` reach a cluster, and what they say when they do not."""

from __future__ import annotations

from typing import Annotated

import grpc
import typer

from ostro.actors.errors import InvalidRequestError, NotReadyError, OstroError
from ostro.configs.errors import ConfigError

DEFAULT_PORT = 9000
CALL_TIMEOUT_S = 10.0

Url = Annotated[
    str, typer.Option("--url", metavar="HOST:PORT", help="The gRPC face of the cluster.")
]
DEFAULT_URL = f"127.0.0.1:{DEFAULT_PORT}"
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_CALLER_FAULTS = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
)


def open_channel(url: str) -> grpc.Channel:
    """A channel to `host:port`; connects at the first call.

    Raises:
        ConfigError: This is no such address.
    """
    address = parse_address(url)
    host = address.rpartition(":")[0]
    # A proxy of the environment is not asked for this machine's own addresses.
    options = [("grpc.enable_http_proxy", 0)] if host in _LOOPBACK else []
    return grpc.insecure_channel(address, options)


def parse_address(url: str) -> str:
    """`host:port` of what a user typed.

    Example:
        "grpc://box" -> "box:9000"

    Raises:
        ConfigError: This is no such address.
    """
    address = url.removeprefix("grpc://").rstrip("/")
    host, colon, port = address.rpartition(":")
    if not colon or address.endswith("]"):
        host, port = address, str(DEFAULT_PORT)
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"--url {url}: must be HOST:PORT of the gRPC face, as {DEFAULT_URL}")
    return f"{host}:{port}"


def named_error(error: grpc.RpcError, url: str) -> OstroError:
    """An RPC's failure as an error of ours, told so that a user knows what to do."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and "connect" in details:
        return NotReadyError(f"nothing answers at {url}; start a cluster with `ostro serve`")
    if code is grpc.StatusCode.UNAVAILABLE:
        return NotReadyError(f"{url} is not ready: {details}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return NotReadyError(f"{url} did not answer in time: {details}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return NotReadyError(f"what answers at {url} is no Ostro of this version: {details}")
    if code in _CALLER_FAULTS:
        return InvalidRequestError(details)
    return OstroError(f"{url} failed: {code.name}: {details}")
