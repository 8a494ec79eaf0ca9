"""Who signs the certificates of clients, and which of those were revoked: judged before a start.

HAProxy (by OpenSSL) refuses every client of an authority whose list of revoked certificates is
missing or too old: a file that would do that is refused here, where somebody reads why.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from ostro.cluster.tls_files import at_minute, problem, read_certificates, read_crls
from ostro.configs.tls import TlsConfig


def check_clients(tls: TlsConfig, now: datetime) -> None:
    """See that clients could get in.

    Raises:
        ConfigError: A file cannot be read or used, all authorities have expired, or one of them
            has no list of revoked certificates that counts now; the text names the field.
    """
    if tls.client_ca_file is None:
        return
    authorities = read_certificates(tls, "client_ca_file")
    last = max(authority.not_valid_after_utc for authority in authorities)
    if last <= now:
        raise problem(tls, "client_ca_file", f"expired on {at_minute(last)}; renew it")
    if tls.client_crl_file is not None:
        _check_crls(tls, authorities, read_crls(tls), now)


def _check_crls(
    tls: TlsConfig,
    authorities: Sequence[x509.Certificate],
    crls: Sequence[x509.CertificateRevocationList],
    now: datetime,
) -> None:
    for authority in authorities:
        name = authority.subject.rfc4514_string()
        own = [crl for crl in crls if _has_signed(authority, crl)]
        if not own:
            raise problem(
                tls,
                "client_crl_file",
                f"holds no list of {name}, which is in {tls.client_ca_file}: none of its clients "
                f"would get in; add its list, or take it out",
            )
        if all(crl.next_update_utc is not None and crl.next_update_utc <= now for crl in own):
            end = max(crl.next_update_utc for crl in own if crl.next_update_utc is not None)
            raise problem(
                tls,
                "client_crl_file",
                f"the list of {name} was to be renewed by {at_minute(end)}: none of its clients "
                f"would get in",
            )


def _has_signed(authority: x509.Certificate, crl: x509.CertificateRevocationList) -> bool:
    if crl.issuer != authority.subject:
        return False
    try:
        return crl.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
    except (InvalidSignature, UnsupportedAlgorithm, TypeError, ValueError):
        return False
