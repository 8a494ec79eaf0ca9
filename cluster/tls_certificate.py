"""The certificate of the faces: read, judged in words, and asked whom it is for."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from ostro.cluster.tls_clients import check_clients
from ostro.cluster.tls_files import (
    Expiry,
    at_minute,
    expiries,
    problem,
    read_certificates,
    read_file,
)
from ostro.configs.tls import TlsConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FaceCertificate:
    """What clients are shown.

    Attributes:
        leaf_pem: The certificate without those that sign it.
        names: Host names and addresses that it is for, host names first.
        not_after: Until when it is valid.
        expiries: Until when each file counts, its own among them.
    """

    leaf_pem: str
    names: tuple[str, ...]
    not_after: datetime
    expiries: tuple[Expiry, ...] = ()

    def covers(self, host: str) -> bool:
        """Whether a client that connects to this host accepts it."""
        labels = host.lower().rstrip(".").split(".")
        wildcard = ".".join(["*", *labels[1:]])
        names = {name.lower() for name in self.names}
        return _canonical(host) in names or (len(labels) > 2 and wildcard in names)

    def name_for(self, host: str) -> str:
        """By what name a client should call this host: by one that the certificate is for."""
        if self.covers(host):
            return host
        return next((name for name in self.names if not name.startswith("*")), host)

    def notes(self, host: str, now: datetime | None = None) -> list[str]:
        """What an operator should know: a name that it misses, an end that is near."""
        now = now or datetime.now(UTC)
        told = []
        if not self.covers(host):
            told.append(
                f"the certificate is for {', '.join(self.names) or 'no name at all'}; "
                f"clients that call {host} refuse it"
            )
        told += [note for expiry in self.expiries if (note := expiry.note(now)) is not None]
        return told


def read_certificate(tls: TlsConfig, now: datetime | None = None) -> FaceCertificate:
    """The certificate that the faces would show now.

    Raises:
        ConfigError: A file cannot be read or used, the key is another certificate's, a certificate
            is not valid now, or no client could get in; the text names the field.
    """
    now = now or datetime.now(UTC)
    leaf, *chain = read_certificates(tls, "cert_file")
    _check_key(tls, leaf)
    _check_dates(tls, leaf, now)
    for other in chain:
        _check_chain_date(tls, other, now)
    check_clients(tls, now)
    return FaceCertificate(
        leaf_pem=leaf.public_bytes(Encoding.PEM).decode(),
        names=_names(leaf),
        not_after=leaf.not_valid_after_utc,
        expiries=tuple(expiries(tls)),
    )


def trust_only(certificate: FaceCertificate) -> ssl.SSLContext:
    """For a client that knows the server's certificate: by whatever name, no other passes."""
    context = ssl.create_default_context(cadata=certificate.leaf_pem)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.check_hostname = False
    return context


def _check_key(tls: TlsConfig, leaf: x509.Certificate) -> None:
    pem = read_file(tls, "key_file")
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise problem(
            tls, "key_file", "is encrypted; decrypt it, and let nobody else read it"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise problem(tls, "key_file", "holds no private key in PEM") from None
    if key.public_key() != leaf.public_key():
        raise problem(tls, "key_file", f"is not the key of {tls.cert_file}")


def _check_dates(tls: TlsConfig, leaf: x509.Certificate, now: datetime) -> None:
    first, last = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    if last <= now:
        text = f"expired on {at_minute(last)}; renew it"
    elif first > now:
        text = f"is not valid before {at_minute(first)}, and it is {at_minute(now)}"
    else:
        return
    raise problem(tls, "cert_file", text)


def _check_chain_date(tls: TlsConfig, other: x509.Certificate, now: datetime) -> None:
    """An intermediate certificate's end is the end of the one that it signs."""
    if other.not_valid_after_utc <= now:
        name, end = other.subject.rfc4514_string(), at_minute(other.not_valid_after_utc)
        raise problem(tls, "cert_file", f"the certificate of {name} in it expired on {end}")


def _names(leaf: x509.Certificate) -> tuple[str, ...]:
    try:
        alternatives = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    hosts = alternatives.get_values_for_type(x509.DNSName)
    addresses = alternatives.get_values_for_type(x509.IPAddress)
    return (*hosts, *(str(address) for address in addresses))


def _canonical(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower().rstrip(".")
