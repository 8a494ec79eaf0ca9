"""Which IP addresses are of the public internet: all that a server may reach for its callers.

Stricter than `ipaddress.is_global`, whose lists are as old as the Python they came with, which
calls multicast global, and which takes an IPv4 address within an IPv6 one for no address at all.
"""

from __future__ import annotations

import ipaddress

_V4_REFUSED = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "100.64.0.0/10",  # CGNAT
        "168.63.129.16/32",  # Azure's own services, at a public address within every machine
        "192.0.0.0/24",  # IETF protocol assignments
        "192.88.99.0/24",  # relays of 6to4
        "224.0.0.0/3",  # multicast, reserved, broadcast
    )
)
# All that is given out to hosts; mapped, NAT64, link-local, unique local and multicast lie outside.
_V6_UNICAST = ipaddress.IPv6Network("2000::/3")
_V6_REFUSED = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # Teredo, ORCHID and other protocol assignments
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which carries an IPv4 address
        "3fff::/20",  # documentation
    )
)


def is_public_address(text: str) -> bool:
    """Whether an address is public; what is no address, or has a zone, is not.

    Args:
        text: As in "93.184.215.14" or "2606:2800:21f::1"; no other way to write one is known.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not any(address in network for network in _V4_REFUSED)
    return (
        address.scope_id is None
        and address.is_global
        and address in _V6_UNICAST
        and not any(address in network for network in _V6_REFUSED)
    )
