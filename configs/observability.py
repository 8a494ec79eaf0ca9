"""What a deployment tells of itself, and to whom; nothing leaves it unless this says so."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from ostro.configs.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservabilityConfig:
    """Metrics and traces.

    Attributes:
        otlp_endpoint: Root of a collector that takes OTLP over HTTP, such as
            "http://collector:4318"; None sends nothing, unless OTEL_EXPORTER_OTLP_ENDPOINT or its
            sisters are set where the ingress runs. Needs the extra `otel`.
        trace_ratio: Share of the requests that are traced, 0..1, where the caller did not decide
            (by `traceparent`) and OTEL_TRACES_SAMPLER is not set.
        expert_layers: Whether the rows of every expert are served layer by layer: thousands of
            series instead of one for each expert.
        max_tenants: Tenants with series of their own at one ingress replica; all that come to it
            later share "other".
    """

    otlp_endpoint: str | None = None
    trace_ratio: float = 1.0
    expert_layers: bool = False
    max_tenants: int = 100

    def __post_init__(self) -> None:
        if self.otlp_endpoint is not None:
            parts = urlsplit(self.otlp_endpoint)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ConfigError(
                    f"otlp_endpoint={self.otlp_endpoint!r}: must be an http:// or https:// URL, "
                    f"such as http://collector:4318"
                )
        if not 0.0 <= self.trace_ratio <= 1.0:
            raise ConfigError(f"trace_ratio={self.trace_ratio}: must be in [0, 1]")
        if self.max_tenants < 0:
            raise ConfigError(f"max_tenants={self.max_tenants}: must not be negative")
