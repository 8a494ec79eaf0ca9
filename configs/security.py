"""Who may reach a deployment, and what is written down of it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import PurePath

from ostro.configs.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityConfig:
    """Keys and the audit log.

    Attributes:
        key_file: The keys, as `ostro keys` writes them; read where `ostro serve` runs, again
            whenever it changes, and sent from there to every replica. None lets everybody in.
        allow_open: Without keys, faces may still open beyond this machine.
        open_metrics: `/metrics` asks for no key.
        share_prefix_cache: Tenants find each other's prompts in the prefix cache. It saves work
            where they have long prompts in common; by the time to a first token they can tell
            whether somebody else has sent theirs before.
        num_trusted_proxies: Proxies of yours in front of the faces that add their client's address
            to `x-forwarded-for`; as many addresses, from its end, are believed.
        audit_file: JSON lines, one a request, by each node for the requests it took; an absolute
            path. None writes none. A replica writes ten lines a second at most of calls without a
            good key.
        audit_file_bytes: Size at which the file is put aside and a new one begun.
        num_audit_files: Files that are put aside and kept, the oldest as `.N`.
    """

    key_file: str | None = None
    allow_open: bool = False
    open_metrics: bool = False
    share_prefix_cache: bool = False
    num_trusted_proxies: int = 0
    audit_file: str | None = None
    audit_file_bytes: int = 64 * 2**20
    num_audit_files: int = 4

    def __post_init__(self) -> None:
        for name, lowest in (
            ("num_trusted_proxies", 0),
            ("audit_file_bytes", 4096),
            ("num_audit_files", 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ConfigError(f"{name}={value!r}: must be a whole number of at least {lowest}")
        if self.audit_file is not None and not PurePath(self.audit_file).is_absolute():
            raise ConfigError(
                f"audit_file={self.audit_file!r}: must be an absolute path, as every node with a "
                f"replica writes there"
            )

    @property
    def has_keys(self) -> bool:
        """Whether callers must show a key."""
        return self.key_file is not None

    def check_exposure(self, host: str, *, knows_clients: bool) -> None:
        """Refuse to open faces to strangers beyond this machine.

        Args:
            host: Where the faces open.
            knows_clients: Clients show certificates, so those without a key are no strangers.

        Raises:
            ConfigError: The text names the ways out.
        """
        if self.has_keys or self.allow_open or knows_clients or is_loopback(host):
            return
        raise ConfigError(
            f"serving.host={host} lets whoever reaches it use and steer this server: make keys "
            f"with `ostro keys add --file keys.yaml TENANT` and set security.key_file=keys.yaml, "
            f"ask for certificates with serving.tls.client_ca_file, or set "
            f"security.allow_open=true if all who can reach it may"
        )


def is_loopback(host: str) -> bool:
    """Whether an address that a server binds to can be reached from its own machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
