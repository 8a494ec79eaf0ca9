"""How the commands that call a server speak TLS to it: whom they trust, what they show."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import grpc
import typer

from ostro.configs.errors import ConfigError

Ca = Annotated[
    Path | None,
    typer.Option(
        "--ca",
        metavar="FILE",
        envvar="OSTRO_CA_FILE",
        help="Certificates to trust, in PEM; without it SSL_CERT_FILE or the system's.",
    ),
]
Cert = Annotated[
    Path | None,
    typer.Option(
        "--cert",
        metavar="FILE",
        envvar="OSTRO_CERT_FILE",
        help="Client certificate in PEM, for a server that asks for one.",
    ),
]
Key = Annotated[
    Path | None,
    typer.Option(
        "--key",
        metavar="FILE",
        envvar="OSTRO_KEY_FILE",
        help="Its private key, if the certificate's file does not hold it.",
    ),
]


@dataclass(frozen=True, slots=True)
class ClientTls:
    """What a client trusts and shows.

    Attributes:
        ca: Certificates to trust; None is `SSL_CERT_FILE` or the system's.
        cert: The client's certificate; None shows none.
        key: Its key; None where `cert` holds it.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if self.key is not None and self.cert is None:
            raise ConfigError(f"--key {self.key}: give the certificate too, with --cert")

    def is_given(self) -> bool:
        """Whether somebody asked for TLS."""
        return self.ca is not None or self.cert is not None

    def context(self) -> ssl.SSLContext:
        """For HTTP.

        Raises:
            ConfigError: A file cannot be used.
        """
        try:
            context = ssl.create_default_context(cafile=self.ca)
            # As curl and gRPC do: a server's own certificate is enough to trust it.
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            if self.cert is not None:
                # A password would be asked for on the terminal, for ever.
                context.load_cert_chain(self.cert, self.key, password=_no_password)
        except (OSError, ValueError) as error:  # SSLError is an OSError
            raise ConfigError(f"{self._named()}: cannot be used: {error}") from None
        return context

    def credentials(self) -> grpc.ChannelCredentials:
        """For gRPC. Raises what `context` raises, which reads the same files."""
        self.context()
        system = ssl.get_default_verify_paths().cafile
        ca = self.ca or (Path(system) if system else None)
        return grpc.ssl_channel_credentials(
            root_certificates=None if ca is None else ca.read_bytes(),
            private_key=None if self.cert is None else (self.key or self.cert).read_bytes(),
            certificate_chain=None if self.cert is None else self.cert.read_bytes(),
        )

    def _named(self) -> str:
        given = {"--ca": self.ca, "--cert": self.cert, "--key": self.key}
        return " ".join(f"{option} {file}" for option, file in given.items() if file is not None)


def _no_password() -> str:
    raise ValueError("the key is encrypted")
