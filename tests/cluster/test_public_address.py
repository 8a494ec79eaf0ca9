"""Which addresses are public: every kind that is not, and none that Python calls otherwise."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostro.cluster.public_address import is_public_address

PUBLIC = ["1.1.1.1", "93.184.215.14", "172.32.0.1", "100.128.0.1", "223.255.255.1"]
PUBLIC_V6 = ["2606:4700:4700::1111", "2a00:1450:4001::200e", "2001:4860:4860::8888"]
REFUSED = {
    "this network": ["0.0.0.0", "0.1.2.3"],
    "loopback": ["127.0.0.1", "127.255.255.254", "::1"],
    "private": ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fc00::1", "fd00::1"],
    "link-local": ["169.254.1.1", "fe80::1", "fe80::1%1", "fe80::1%eth0"],
    "metadata": ["169.254.169.254", "fd00:ec2::254", "100.100.100.200", "192.0.0.192"],
    "Azure's own": ["168.63.129.16"],
    "CGNAT": ["100.64.0.1", "100.127.255.255"],
    "assignments": ["192.0.0.8", "192.88.99.1", "2001::1", "2001:10::1"],
    "documentation": ["192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1"],
    "benchmarks": ["198.18.0.1", "2001:2::1"],
    "multicast": ["224.0.0.1", "224.0.1.1", "239.255.255.255", "ff02::1", "ff0e::1"],
    "reserved": ["240.0.0.1", "255.255.255.255", "::", "4000::1", "fec0::1", "100::1"],
    "IPv4-mapped": ["::ffff:10.0.0.1", "::ffff:127.0.0.1", "::ffff:1.1.1.1", "::127.0.0.1"],
    "6to4": ["2002:7f00:1::1", "2002:101:101::1"],
    "NAT64": ["64:ff9b::10.0.0.1", "64:ff9b::1.1.1.1", "64:ff9b:1::1"],
    "with a zone": ["2606:4700:4700::1111%1"],
    "no name": ["", "localhost", "a.b"],
    "no way to write one": ["127.1", "2130706433", "0x7f.0.0.1", "0177.0.0.1", "1.1.1.1:443"],
}  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC + PUBLIC_V6)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public_address(address)


@pytest.mark.parametrize(
    "address", [pytest.param(a, id=f"{kind}-{a}") for kind, all_ in REFUSED.items() for a in all_]
)
def test_all_others_are_not(address: str) -> None:
    assert not is_public_address(address)


@given(st.ip_addresses())
def test_what_python_does_not_call_global_is_not_public(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    if not address.is_global or address.is_multicast or address.is_reserved:
        assert not is_public_address(str(address))


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_within_an_ipv6_one_is_never_public(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    mapped = ipaddress.IPv6Address(0xFFFF << 32 | number)
    nat64 = ipaddress.IPv6Address(0x64FF9B << 96 | number)
    six_to_four = ipaddress.IPv6Address(0x2002 << 112 | number << 80 | 1)
    compatible = ipaddress.IPv6Address(number)
    assert not any(map(is_public_address, map(str, (mapped, nat64, six_to_four, compatible))))


@given(st.ip_addresses(v=6, network="2a00::/12"))
def test_addresses_of_a_registry_are_public(address: ipaddress.IPv6Address) -> None:
    assert is_public_address(str(address))
