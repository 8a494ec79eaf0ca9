"""Certificates for tests, made on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from ostro.configs.tls import TlsConfig


@dataclass(frozen=True)
class KeyPair:
    """A certificate and its key, as files."""

    cert: Path
    key: Path


class Authority:
    """Signs certificates; its own lies in `ca`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(self.ca)

    def issue(
        self, name: str, *hosts: str, common_name: str | None = None, days: float = 30
    ) -> KeyPair:
        """A certificate in files called `name`, overwritten if they are there.

        Args:
            name: Of the files.
            hosts: Whom it is for; a client's has a `common_name` instead.
            common_name: Of the subject.
            days: Until it expires; less than 0 for one that has.
        """
        made = self._authority.issue_cert(
            *hosts,
            common_name=common_name,
            not_before=datetime.now(UTC) - timedelta(days=60),
            not_after=datetime.now(UTC) + timedelta(days=days),
        )
        pair = KeyPair(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        pair.cert.write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))
        pair.key.write_bytes(made.private_key_pem.bytes())
        return pair

    def revoke(self, *pairs: KeyPair, days: float = 30) -> Path:
        """The list of these and no other certificates, in a file that is there already or not.

        Args:
            pairs: Whose certificates do not count any more.
            days: Until a newer list must be there; less than 0 for one that is too old.
        """
        own = x509.load_pem_x509_certificate(self._authority.cert_pem.bytes())
        now = datetime.now(UTC)
        crl = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(own.subject)
            .last_update(now - timedelta(days=60))
            .next_update(now + timedelta(days=days))
        )
        for pair in pairs:
            revoked = x509.load_pem_x509_certificate(pair.cert.read_bytes())
            entry = x509.RevokedCertificateBuilder().serial_number(revoked.serial_number)
            crl = crl.add_revoked_certificate(entry.revocation_date(now).build())
        key = load_pem_private_key(self._authority.private_key_pem.bytes(), None)
        file = self._folder / "revoked.crl"
        file.write_bytes(crl.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
        return file


def tls_config(pair: KeyPair, client_ca: Path | None = None, **fields: object) -> TlsConfig:
    """A server's section for these files."""
    ca = None if client_ca is None else str(client_ca)
    return TlsConfig(cert_file=str(pair.cert), key_file=str(pair.key), client_ca_file=ca, **fields)
