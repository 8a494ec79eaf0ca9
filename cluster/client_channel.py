"""The way to a cluster's gRPC face: address, TLS, key and patience; what both clients share."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from ostro.actors.errors import OstroError
from ostro.cluster.client_errors import error_of_call
from ostro.cluster.client_streams import Attempts
from ostro.cluster.retries import Retries
from ostro.configs.errors import ConfigError
from ostro.protos import cluster_pb2_grpc, generation_pb2_grpc

DEFAULT_PORT = 9000
DEFAULT_ADDRESS = f"127.0.0.1:{DEFAULT_PORT}"

_TLS_SCHEMES = ("grpcs://", "https://")
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_OPTIONS = (
    # An answer with logprobs passes grpc's own 4 MiB.
    ("grpc.max_receive_message_length", 64 * 2**20),
    # Finds a peer that is gone without a word. Servers end connections that ask more often than
    # every 300 s while nothing is sent.
    ("grpc.keepalive_time_ms", 310_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)

Options = list[tuple[str, int | str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """How to speak TLS.

    Attributes:
        ca_file: PEM file of the authorities to trust; None takes the system's.
        certificate_file: The caller's own certificate, for mutual TLS.
        key_file: Its key.
        server_name: Name that the server's certificate must have; None takes the address's host.
    """

    ca_file: str | Path | None = None
    certificate_file: str | Path | None = None
    key_file: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate_file is None) != (self.key_file is None):
            raise ConfigError("certificate_file and key_file go together: give both or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files.

        Raises:
            ConfigError: One cannot be read.
        """
        return grpc.ssl_channel_credentials(
            root_certificates=_read("ca_file", self.ca_file or _system_authorities()),
            private_key=_read("key_file", self.key_file),
            certificate_chain=_read("certificate_file", self.certificate_file),
        )


class ClientChannel:
    """A channel to one address, and what both kinds of client know of their calls."""

    _grpc: Any  # the module that opens channels of the client's kind

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
        retries: Retries = Retries(),  # noqa: B008  frozen
        timeout_s: float = 3600.0,
        lookup_timeout_s: float = 10.0,
    ) -> None:
        """Make a channel; it connects at the first call.

        Args:
            address: HOST:PORT of the gRPC face; after "grpcs://" it speaks TLS.
            api_key: Sent with every call.
            tls: How to speak TLS; None speaks plain text, or trusts who the system trusts.
            retries: How often a call is made again.
            timeout_s: How long a generation may take, all its calls together.
            lookup_timeout_s: The same for everything that generates nothing.

        Raises:
            ConfigError: No such address, a key that cannot be sent, a file that cannot be read.
        """
        self.address, tls = parse_address(address), tls_of(address, tls)
        self._metadata = _key_metadata(api_key)
        self._retries = retries
        self._timeout_s = timeout_s
        self._lookup_timeout_s = lookup_timeout_s
        options = _channel_options(self.address, tls)
        if tls is None:
            self._channel = self._grpc.insecure_channel(self.address, options)
        else:
            self._channel = self._grpc.secure_channel(self.address, tls.credentials(), options)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._cluster = cluster_pb2_grpc.ClusterServiceStub(self._channel)

    def _attempts(self, timeout_s: float | None) -> Attempts:
        return Attempts(self._retries, self._timeout_s if timeout_s is None else timeout_s)

    def _named(self, error: grpc.RpcError | OstroError) -> OstroError:
        return error if isinstance(error, OstroError) else error_of_call(error, self.address)


def parse_address(address: str) -> str:
    """`host:port` of what a user typed.

    Example:
        "grpc://box" -> "box:9000"

    Raises:
        ConfigError: This is no such address.
    """
    bare = address
    for scheme in ("grpc://", *_TLS_SCHEMES):
        bare = bare.removeprefix(scheme)
    bare = bare.rstrip("/")
    host, colon, port = bare.rpartition(":")
    if not colon or bare.endswith("]"):
        host, port = bare, str(DEFAULT_PORT)
    is_bare_ipv6 = ":" in host and not (host[0] == "[" and host[-1] == "]")
    is_port = port.isdecimal() and 0 < int(port) < 65536
    if not host or "/" in host or is_bare_ipv6 or not is_port:
        raise ConfigError(
            f"{address}: must be HOST:PORT of the gRPC face, as {DEFAULT_ADDRESS} or "
            f"[::1]:{DEFAULT_PORT}"
        )
    return f"{host}:{port}"


def tls_of(address: str, asked: Tls | None) -> Tls | None:
    """How to speak TLS to an address: as asked, or as its scheme says; None for plain text."""
    return Tls() if asked is None and address.startswith(_TLS_SCHEMES) else asked


def _channel_options(address: str, tls: Tls | None) -> Options:
    """The options of a channel to `host:port`."""
    options: Options = list(_OPTIONS)
    if address.rpartition(":")[0] in _LOOPBACK:
        # A proxy of the environment is not asked for this machine's own addresses.
        options.append(("grpc.enable_http_proxy", 0))
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def _key_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """What every call carries to say whose it is.

    Raises:
        ConfigError: No header can carry the key.
    """
    if not api_key:
        return ()
    if not api_key.isascii() or not api_key.isprintable():
        raise ConfigError("api_key: must be printable ASCII")
    return (("authorization", f"Bearer {api_key}"),)


def _system_authorities() -> str | None:
    """The file of `SSL_CERT_FILE`, else OpenSSL's; grpc knows neither, and has its own list."""
    return ssl.get_default_verify_paths().cafile


def _read(name: str, path: str | Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: expanduser's, for "~nobody"
        raise ConfigError(f"{name} {path}: {getattr(error, 'strerror', None) or error}") from None
