"""Which images a deployment fetches for its callers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ostro.configs.errors import ConfigError

_ANY = "*"
_HOST = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFetchConfig:
    """Images that requests name by URL: where they may come from, and what they may cost.

    They come over https alone and from public addresses alone, whatever is allowed here.

    Attributes:
        allowed_hosts: "example.com" is that host, "*.example.com" every one under it, "*" any;
            redirects must keep to them too.
        allowed_ports: Ports that a URL may name.
        timeout_s: How long one image may take, from its host's look-up to its last byte; it waits
            as long, at most, for its turn.
        max_redirects: Redirects that are followed for one image.
        max_concurrent: Images that one ingress replica fetches at a time.
    """

    allowed_hosts: tuple[str, ...]
    allowed_ports: tuple[int, ...] = (443,)
    timeout_s: float = 10.0
    max_redirects: int = 3
    max_concurrent: int = 16

    def __post_init__(self) -> None:
        if not self.allowed_hosts:
            raise ConfigError(
                'allowed_hosts=[]: must name a host; "*" allows any, and without image_fetch '
                "nothing is fetched"
            )
        for host in self.allowed_hosts:
            if host != _ANY and not _HOST.fullmatch(host):
                raise ConfigError(
                    f'allowed_hosts: {host!r}: must be as "example.com", "*.example.com" or "*": '
                    f"lower case, no scheme, no port, other letters as in xn--..."
                )
        if not self.allowed_ports or not all(1 <= port <= 65535 for port in self.allowed_ports):
            raise ConfigError(
                f"allowed_ports={list(self.allowed_ports)}: must be ports in 1..65535, such as 443"
            )
        if not 0 < self.timeout_s < math.inf:
            raise ConfigError(f"timeout_s={self.timeout_s}: must be positive and finite")
        for name, lowest in (("max_redirects", 0), ("max_concurrent", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ConfigError(f"{name}={value!r}: must be a whole number of at least {lowest}")

    def allows_host(self, host: str) -> bool:
        """Whether a host, in lower case and without a last dot, is among `allowed_hosts`."""
        return any(
            allowed in (_ANY, host) or (allowed.startswith("*.") and host.endswith(allowed[1:]))
            for allowed in self.allowed_hosts
        )
