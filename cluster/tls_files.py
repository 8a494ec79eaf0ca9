"""The files of `serving.tls`: read, taken apart, and until when what they hold counts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from ostro.cluster.human_numbers import days_left
from ostro.configs.errors import ConfigError
from ostro.configs.tls import TlsConfig

_SOON = timedelta(days=14)
_CRL = re.compile(rb"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----", re.DOTALL)
_WHAT = {
    "cert_file": "the certificate expires",
    "client_ca_file": "a certificate that signs those of clients expires",
    "client_crl_file": "the list of revoked certificates must be renewed, or no client gets in,",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Expiry:
    """Until when a file counts.

    Attributes:
        field: Of `serving.tls`.
        file: Its value.
        at: In UTC.
    """

    field: str
    file: str
    at: datetime

    def note(self, now: datetime) -> str | None:
        """What an operator should know of an end that is near."""
        left = self.at - now
        if left >= _SOON:
            return None
        return f"{_WHAT[self.field]} {days_left(left)}, on {at_minute(self.at)}: {self.file}"


def at_minute(moment: datetime) -> str:
    """A moment for people."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def expiries(tls: TlsConfig) -> list[Expiry]:
    """Until when each file counts as it lies there now; those that cannot be read are left out."""
    found = []
    for field in tls.files():
        try:
            at = _end_of(tls, field)
        except ConfigError:
            continue  # half of a renewal; what was read before is in use
        if at is not None:
            found.append(Expiry(field=field, file=tls.files()[field], at=at))
    return found


def _end_of(tls: TlsConfig, field: str) -> datetime | None:
    if field == "client_crl_file":
        return first_end(crl.next_update_utc for crl in read_crls(tls))
    if field == "key_file":
        return None
    return first_end(one.not_valid_after_utc for one in read_certificates(tls, field))


def first_end(ends: Iterable[datetime | None]) -> datetime | None:
    """The earliest; None where nothing ends."""
    return min((end for end in ends if end is not None), default=None)


def read_file(tls: TlsConfig, field: str) -> bytes:
    """What a field's file holds.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return Path(tls.files()[field]).read_bytes()
    except OSError as error:
        raise problem(tls, field, f"cannot be read: {error.strerror}") from None


def read_certificates(tls: TlsConfig, field: str) -> list[x509.Certificate]:
    """The certificates in a field's file, in their order.

    Raises:
        ConfigError: There are none.
    """
    pem = read_file(tls, field)
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise problem(tls, field, "holds no certificate in PEM") from None


def read_crls(tls: TlsConfig) -> list[x509.CertificateRevocationList]:
    """The lists of revoked certificates.

    Raises:
        ConfigError: There are none, or one is broken.
    """
    texts = _CRL.findall(read_file(tls, "client_crl_file"))
    try:
        crls = [x509.load_pem_x509_crl(text) for text in texts]
    except ValueError:
        crls = []
    if not crls:
        raise problem(tls, "client_crl_file", "holds no list of revoked certificates in PEM")
    return crls


def problem(tls: TlsConfig, field: str, text: str) -> ConfigError:
    """What is wrong with a field's file."""
    return ConfigError(f"serving.tls.{field}={tls.files()[field]}: {text}")
