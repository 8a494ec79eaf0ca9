"""Where the faces of a deployment answer, in words and in lines to try."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ostro.cluster.cli_connection import KEY_VARIABLE
from ostro.cluster.face_listeners import ANY_ADDRESS, bracketed
from ostro.configs.deployment import ServingConfig
from ostro.configs.security import SecurityConfig

if TYPE_CHECKING:
    from ostro.cluster.tls_certificate import FaceCertificate

_DEFAULT_GRPC = ("127.0.0.1", 9000)  # where `ostro chat` looks by itself


@dataclass(frozen=True, slots=True)
class AnnouncedFaces:
    """The faces as a user on this machine calls them.

    Attributes:
        certificate: What they show; None if they speak clear text.
        security: Whether they ask for keys.
    """

    serving: ServingConfig
    certificate: FaceCertificate | None
    security: SecurityConfig = field(default_factory=SecurityConfig)

    def http_url(self) -> str:
        """The base URL of OpenAI's clients."""
        scheme = "http" if self.certificate is None else "https"
        return f"{scheme}://{bracketed(self._host())}:{self.serving.http_port}/v1"

    def grpc_address(self) -> str:
        """The target of a gRPC channel."""
        return f"{bracketed(self._host())}:{self.serving.grpc_port}"

    def curl_line(self, model: str) -> str:
        """A question over HTTP."""
        body = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
        data = json.dumps({**body, "max_tokens": 64})
        url = f"{self.http_url()}/chat/completions"
        trust = self._trust("--cacert")
        key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if self.security.has_keys else ""
        return f"curl{trust} {url}{key} -H 'Content-Type: application/json' -d '{data}'"

    def chat_line(self) -> str:
        """A conversation over gRPC."""
        if self.certificate is not None:
            return f"ostro chat --url https://{self.grpc_address()}{self._trust('--ca')}"
        is_default = (self._host(), self.serving.grpc_port) == _DEFAULT_GRPC
        return "ostro chat" + ("" if is_default else f" --url {self.grpc_address()}")

    def keys_line(self) -> str:
        """Whether callers must show a key."""
        if not self.security.has_keys:
            return "none are asked for: whoever reaches the faces may use and steer them"
        return f"those in {self.security.key_file}; `ostro keys` edits it while this runs"

    def tls_lines(self) -> list[str]:
        """For whom the certificate is and until when, and what is wrong with that."""
        if self.certificate is None or self.serving.tls is None:
            return []
        told = f"certificate for {', '.join(self.certificate.names) or 'no name'}"
        told += f", valid until {self.certificate.not_after:%Y-%m-%d}"
        if client_ca := self.serving.tls.client_ca_file:
            told += f"; clients show one that {client_ca} has signed"
        if client_crl := self.serving.tls.client_crl_file:
            told += f" and {client_crl} does not revoke"
        return [told, *self.certificate.notes(_reachable(self.serving.host))]

    def _host(self) -> str:
        host = _reachable(self.serving.host)
        return host if self.certificate is None else self.certificate.name_for(host)

    def _trust(self, option: str) -> str:
        """Options that name the certificates of both sides; a server's own is enough to trust."""
        tls = self.serving.tls
        if tls is None:
            return ""
        shown = "" if tls.client_ca_file is None else " --cert CLIENT.pem --key CLIENT.key"
        return f" {option} {shlex.quote(tls.cert_file)}{shown}"


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ANY_ADDRESS else host
