"""How the commands that talk to a running cluster reach it."""

from __future__ import annotations

import os
from typing import Annotated
from urllib.parse import urlsplit

import typer

from ostro.cluster.client import Client
from ostro.cluster.client_channel import DEFAULT_ADDRESS, Tls
from ostro.cluster.retries import Retries
from ostro.configs.errors import ConfigError

Url = Annotated[
    str,
    typer.Option(
        "--url", metavar="HOST:PORT", help="The gRPC face of the cluster; https:// for TLS."
    ),
]
DEFAULT_URL = DEFAULT_ADDRESS
DEFAULT_HTTP_URL = "http://127.0.0.1:8000"
_CLEAR_SCHEME = "grpc://"
KEY_VARIABLE = "OSTRO_API_KEY"

# Somebody waits: where nothing answers, that is to be said at once.
_RETRIES = Retries(most=2, first_delay_s=0.2)


def api_key() -> str | None:
    """The caller's key, if the environment has one.

    Raises:
        ConfigError: No header can carry it.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{KEY_VARIABLE}: must be printable ASCII")
    return key or None


def base_url(url: str) -> str:
    """The base URL of the HTTP face that a user typed; the `/v1` of OpenAI's clients is taken off.

    Example:
        "box:8000/v1/" -> "http://box:8000"

    Raises:
        ConfigError: It is no URL of HTTP.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        is_fit = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # brackets or a port that are none
        is_fit = False
    if not is_fit or parts.query:
        raise ConfigError(f"{url!r}: must be the URL of an HTTP face, as {DEFAULT_HTTP_URL}")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"


def open_client(url: str, tls: Tls | None = None) -> Client:
    """A client of the gRPC face, with the key of OSTRO_API_KEY; connects at the first call.

    Over TLS where the URL says `https://`, or says nothing and there are options for it.

    Raises:
        ConfigError: This is no such address, or a key that no header can carry.
    """
    key = api_key()
    try:
        return Client(url, api_key=key, tls=asked_tls(url, tls), retries=_RETRIES)
    except ConfigError as error:
        raise ConfigError(f"--url {error}") from None


def asked_tls(url: str, tls: Tls | None) -> Tls | None:
    """The options for TLS, unless the URL says that there is none."""
    return None if url.startswith(_CLEAR_SCHEME) else tls
