"""How the faces speak TLS."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from ostro.configs.errors import ConfigError


class TlsVersion(StrEnum):
    """The oldest protocol that a client may speak."""

    TLS_1_2 = "1.2"
    TLS_1_3 = "1.3"

    @classmethod
    def _missing_(cls, value: object) -> TlsVersion | None:
        # YAML reads a version without quotes as a number.
        return cls(str(value)) if isinstance(value, float) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """Certificate of both faces; the files are read on the head node, again when they change.

    Attributes:
        cert_file: The server's certificate in PEM, then the intermediate ones.
        key_file: Its private key in PEM, not encrypted.
        client_ca_file: Certificates in PEM that sign those of clients. Where it is set, a client
            without a certificate is refused everything but the health checks.
        client_crl_file: Lists in PEM of certificates that those authorities have revoked, one of
            each of them. It is read again as the others are while it has at most 16 KiB; a larger
            one counts from the next start on.
        min_version: The oldest protocol that a client may speak.
    """

    cert_file: str
    key_file: str
    client_ca_file: str | None = None
    client_crl_file: str | None = None
    min_version: TlsVersion = TlsVersion.TLS_1_2

    def __post_init__(self) -> None:
        for name, file in self.files().items():
            if not file.strip():
                raise ConfigError(f"{name}: must name a file")
        if self.client_crl_file is not None and self.client_ca_file is None:
            raise ConfigError(
                f"client_crl_file={self.client_crl_file}: clients show no certificates; set "
                f"client_ca_file too"
            )

    def files(self) -> dict[str, str]:
        """The files that are set, by their fields' names."""
        files = {
            "cert_file": self.cert_file,
            "key_file": self.key_file,
            "client_ca_file": self.client_ca_file,
            "client_crl_file": self.client_crl_file,
        }
        return {name: file for name, file in files.items() if file is not None}

    def absolute(self) -> TlsConfig:
        """The same, its files named from the root: who reads them may stand elsewhere."""
        named = {
            name: str(Path(file).expanduser().absolute()) for name, file in self.files().items()
        }
        return replace(self, **named)  # type: ignore[arg-type]
