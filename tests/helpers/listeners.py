"""On which addresses processes of this machine listen, from `/proc`."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from pathlib import Path

_LISTEN = "0A"


def listening(pids: Iterable[int]) -> set[tuple[str, int]]:
    """Address and port of every TCP listener of these processes; IPv4 in IPv6 counts as IPv4."""
    of_inode = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN:
                host, _, port = fields[1].partition(":")
                of_inode[fields[9]] = (_address(host), int(port, 16))
    return {of_inode[inode] for pid in pids for inode in _sockets(pid) if inode in of_inode}


def own_address() -> str | None:
    """An address of this machine that others could call; None if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.254", 9))  # sends nothing
        except OSError:
            return None
        address = probe.getsockname()[0]
    return None if ipaddress.ip_address(address).is_loopback else address


def _address(text: str) -> str:
    """`/proc` writes addresses as 32-bit words of this machine's byte order, in hex."""
    words = (text[i : i + 8] for i in range(0, len(text), 8))
    address = ipaddress.ip_address(b"".join(bytes.fromhex(word)[::-1] for word in words))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def _sockets(pid: int) -> Iterable[str]:
    try:
        links = [entry.readlink().name for entry in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return []
    return [link[len("socket:[") : -1] for link in links if link.startswith("socket:[")]
