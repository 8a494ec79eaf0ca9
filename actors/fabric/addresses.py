"""Addresses of channels and the sockets behind them: "unix:/path" and "tcp:host:port".

Port 0 lets the system choose; "unix:" alone makes a path of its own. IPv6 hosts stand in
brackets: "tcp:[::1]:7000".
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from dataclasses import dataclass

from ostro.actors.fabric.framing import ChannelError

_BACKLOG = 128
_OWN_PREFIX = "ostro-channel-"
_OWN_NAME = "socket"
# Linux names a Unix socket by at most 108 bytes, a closing zero included.
_MAX_PATH_BYTES = 107
_KEEPALIVE = (
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 10),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 5),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
    (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
)


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket file."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host, by name or number, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


Address = UnixAddress | TcpAddress


def parse_address(text: str) -> Address:
    """Text to an address.

    Raises:
        ValueError: It is neither form; the message shows both.
    """
    scheme, _, rest = text.partition(":")
    if scheme == "unix":
        if len(os.fsencode(rest)) > _MAX_PATH_BYTES:
            raise ValueError(f"address {text!r}: a socket path takes {_MAX_PATH_BYTES} bytes")
        return UnixAddress(rest)
    host, _, port = rest.rpartition(":")
    if scheme == "tcp" and host and port.isdecimal() and int(port) < 65536:
        return TcpAddress(host.removeprefix("[").removesuffix("]"), int(port))
    raise ValueError(f"address {text!r}: must be 'unix:/path' or 'tcp:host:port'")


def listen(address: Address) -> tuple[socket.socket, Address]:
    """A listening socket and the address that peers dial.

    Raises:
        ChannelError: The address is taken or not ours.
    """
    try:
        if isinstance(address, UnixAddress):
            return _listen_unix(address.path or _own_path())
        return _listen_tcp(address)
    except OSError as error:
        raise ChannelError(f"cannot listen on {address}: {error}") from error


def _own_path() -> str:
    return os.path.join(tempfile.mkdtemp(prefix=_OWN_PREFIX), _OWN_NAME)


def _listen_unix(path: str) -> tuple[socket.socket, Address]:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener, UnixAddress(path)


def _listen_tcp(address: TcpAddress) -> tuple[socket.socket, Address]:
    family = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)
    return listener, TcpAddress(address.host, listener.getsockname()[1])


def unlisten(address: Address) -> None:
    """Remove what `listen` left on disk; harmless to call twice."""
    if isinstance(address, UnixAddress):
        with contextlib.suppress(OSError):
            os.unlink(address.path)
        directory, name = os.path.split(address.path)
        if name == _OWN_NAME and os.path.basename(directory).startswith(_OWN_PREFIX):
            with contextlib.suppress(OSError):
                os.rmdir(directory)


def dial(address: Address, timeout_s: float) -> socket.socket:
    """A connected socket.

    Raises:
        ChannelError: Nobody listens there, or not in time.
    """
    try:
        if isinstance(address, TcpAddress):
            return socket.create_connection((address.host, address.port), timeout_s)
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            peer.settimeout(timeout_s)
            peer.connect(address.path)
        except OSError:
            peer.close()
            raise
        return peer
    except OSError as error:
        raise ChannelError(f"cannot reach {address}: {error}") from error


def tune(peer: socket.socket) -> None:
    """Send small frames at once and notice that a peer's host vanished; TCP only."""
    if peer.family in (socket.AF_INET, socket.AF_INET6):
        for level, option, value in _KEEPALIVE:
            if hasattr(socket, option):
                peer.setsockopt(level, getattr(socket, option), value)
