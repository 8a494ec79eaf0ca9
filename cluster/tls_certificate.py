"""The certificate of the faces: read, judged in words, and asked whom it is for."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from ostro.configs.errors import ConfigError
from ostro.configs.tls import TlsConfig

_SOON = timedelta(days=14)


@dataclass(frozen=True, slots=True, kw_only=True)
class FaceCertificate:
    """What clients are shown.

    Attributes:
        leaf_pem: The certificate without those that sign it.
        names: Host names and addresses that it is for, host names first.
        not_after: Until when it is valid.
    """

    leaf_pem: str
    names: tuple[str, ...]
    not_after: datetime

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
        if self.not_after - now < _SOON:
            told.append(f"the certificate expires on {self.not_after:%Y-%m-%d %H:%M} UTC")
        return told


def read_certificate(tls: TlsConfig, now: datetime | None = None) -> FaceCertificate:
    """The certificate that the faces would show now.

    Raises:
        ConfigError: A file cannot be read or used, the key is another certificate's, or the
            certificate is not valid now; the text names the field.
    """
    texts = {name: _read(name, Path(file)) for name, file in tls.files().items()}
    leaf = _certificates("cert_file", tls.cert_file, texts["cert_file"])[0]
    if tls.client_ca_file is not None:
        _certificates("client_ca_file", tls.client_ca_file, texts["client_ca_file"])
    _check_key(tls, texts["key_file"], leaf)
    _check_dates(tls, leaf, now or datetime.now(UTC))
    return FaceCertificate(
        leaf_pem=leaf.public_bytes(Encoding.PEM).decode(),
        names=_names(leaf),
        not_after=leaf.not_valid_after_utc,
    )


def trust_only(certificate: FaceCertificate) -> ssl.SSLContext:
    """For a client that knows the server's certificate: by whatever name, no other passes."""
    context = ssl.create_default_context(cadata=certificate.leaf_pem)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.check_hostname = False
    return context


def _read(name: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _problem(name, str(file), f"cannot be read: {error.strerror}") from None


def _certificates(name: str, file: str, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise _problem(name, file, "holds no certificate in PEM") from None


def _check_key(tls: TlsConfig, pem: bytes, leaf: x509.Certificate) -> None:
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise _problem(
            "key_file", tls.key_file, "is encrypted; decrypt it, and let nobody else read it"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise _problem("key_file", tls.key_file, "holds no private key in PEM") from None
    if key.public_key() != leaf.public_key():
        raise _problem("key_file", tls.key_file, f"is not the key of {tls.cert_file}")


def _check_dates(tls: TlsConfig, leaf: x509.Certificate, now: datetime) -> None:
    first, last = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    if last <= now:
        text = f"expired on {last:%Y-%m-%d %H:%M} UTC; renew it"
    elif first > now:
        text = f"is not valid before {first:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M} UTC"
    else:
        return
    raise _problem("cert_file", tls.cert_file, text)


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


def _problem(name: str, file: str, text: str) -> ConfigError:
    return ConfigError(f"serving.tls.{name}={file}: {text}")
