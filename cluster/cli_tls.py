"""How the commands that call a server speak TLS to it: whom they trust, what they show."""

from __future__ import annotations

import contextlib
import socket
import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from ostro.cluster.client_channel import Tls, parse_address, tls_of
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

_HANDSHAKE_TIMEOUT_S = 5.0


def read_tls(ca: Path | None, cert: Path | None, key: Path | None) -> Tls | None:
    """What the options ask for; None if they ask for nothing.

    Raises:
        ConfigError: A file cannot be used, or a key comes without its certificate.
    """
    if key is not None and cert is None:
        raise ConfigError(f"--key {key}: give the certificate too, with --cert")
    if ca is None and cert is None:
        return None
    tls = Tls(ca_file=ca, certificate_file=cert, key_file=key or cert)
    https_context(tls)  # gRPC would tell at the first call, and not why
    return tls


def https_context(tls: Tls | None) -> ssl.SSLContext:
    """The same for HTTP; without options it trusts whom the system trusts.

    Raises:
        ConfigError: A file cannot be used.
    """
    tls = tls or Tls()
    try:
        context = ssl.create_default_context(cafile=tls.ca_file)
        # As curl and gRPC do: a server's own certificate is enough to trust it.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        if tls.certificate_file is not None:
            # A password would be asked for on the terminal, for ever.
            context.load_cert_chain(tls.certificate_file, tls.key_file, password=_no_password)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise ConfigError(f"{_named(tls)}: cannot be used: {error}") from None
    return context


def certificate_end(url: str, tls: Tls | None) -> datetime | None:
    """When the certificate that a gRPC face shows expires, in UTC; None if none can be seen.

    Args:
        url: As the user typed it.
        tls: The user's options.
    """
    tls = tls_of(url, tls)
    if tls is None:
        return None
    host, _, port = parse_address(url).rpartition(":")
    host = host.strip("[]")
    context = https_context(tls)
    context.set_alpn_protocols(["h2"])
    with (
        contextlib.suppress(OSError, KeyError, ValueError),  # SSLError is an OSError
        socket.create_connection((host, int(port)), _HANDSHAKE_TIMEOUT_S) as connection,
        context.wrap_socket(connection, server_hostname=tls.server_name or host) as secure,
    ):
        shown = secure.getpeercert() or {}
        return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(shown["notAfter"])), UTC)
    return None


def _named(tls: Tls) -> str:
    given = {"--ca": tls.ca_file, "--cert": tls.certificate_file, "--key": tls.key_file}
    return " ".join(f"{option} {file}" for option, file in given.items() if file is not None)


def _no_password() -> str:
    raise ValueError("the key is encrypted")
