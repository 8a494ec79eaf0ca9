"""One trace per request, for those who ask for them: what is known of it goes out at its end.

Nothing here knows OpenTelemetry, which is imported where traces are wanted and nowhere else. A
trace never has any text of a prompt or an answer.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ostro.cluster.generation import Finished, Started
from ostro.configs.errors import ConfigError
from ostro.configs.observability import ObservabilityConfig

logger = logging.getLogger(__name__)

# Values of `gen_ai.operation.name`.
CHAT = "chat"
TEXT_COMPLETION = "text_completion"

_ENDPOINTS = (
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
)
_EXPORTER = "opentelemetry.exporter.otlp.proto.http"
_PROTOCOL = "http/protobuf"
_INSTALL = "it needs the extra otel: pip install 'ostro[otel]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a face knows of a request besides what it asks for.

    Attributes:
        operation: CHAT or TEXT_COMPLETION.
        traceparent: The caller's W3C trace context, as it came.
        tracestate: Likewise.
    """

    operation: str = CHAT
    traceparent: str | None = None
    tracestate: str | None = None

    @classmethod
    def of(cls, headers: Mapping[str, str], operation: str = CHAT) -> Origin:
        """From HTTP headers or gRPC metadata, names in lower case."""
        return cls(
            operation=operation,
            traceparent=headers.get("traceparent"),
            tracestate=headers.get("tracestate"),
        )


UNKNOWN = Origin()


class RequestTrace(Protocol):
    """The trace of one request; one of these is called, once, at its end."""

    def finish(self, started: Started, finished: Finished) -> None:
        """It ended well."""
        ...

    def fail(self, started: Started | None, error: Exception) -> None:
        """It failed; `started` tells whether it had begun."""
        ...

    def leave(self, started: Started | None) -> None:
        """Its caller is gone."""
        ...


class Tracer(Protocol):
    """Makes traces of requests."""

    def begin(self, origin: Origin) -> RequestTrace:
        """The trace of a request that has just arrived."""
        ...

    def close(self) -> None:
        """Send what waits to be sent and end; takes a second at most."""
        ...


class _NoTraces:
    """Nobody wants to know."""

    def begin(self, origin: Origin) -> RequestTrace:
        return self

    def finish(self, started: Started, finished: Finished) -> None: ...

    def fail(self, started: Started | None, error: Exception) -> None: ...

    def leave(self, started: Started | None) -> None: ...

    def close(self) -> None: ...


NO_TRACES: Tracer = _NoTraces()


def check_exporter(config: ObservabilityConfig) -> None:
    """Raise ConfigError if traces are to be sent and the means to send them are not installed."""
    if config.otlp_endpoint is not None and not _is_installed():
        raise ConfigError(f"observability.otlp_endpoint={config.otlp_endpoint!r}: {_INSTALL}")


def make_tracer(
    config: ObservabilityConfig, model: str, instance_id: str, environ: Mapping[str, str]
) -> Tracer:
    """What the configuration or the standard OTEL_* variables ask for; `NO_TRACES` if nothing.

    Args:
        config: Its endpoint goes before that of the variables.
        model: Name of the served model.
        instance_id: Tells this replica from others.
        environ: The process's environment.

    Raises:
        ConfigError: As `check_exporter`.
    """
    endpoint = config.otlp_endpoint
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return NO_TRACES
    if endpoint is None and not any(environ.get(name) for name in _ENDPOINTS):
        return NO_TRACES
    check_exporter(config)
    why_not = _why_not(environ) if endpoint is None else None
    if why_not is not None:
        logger.warning("an OTLP endpoint is in the environment, and nothing is sent: %s", why_not)
        return NO_TRACES
    from ostro.cluster.tracing_otel import connect

    return connect(config, model, instance_id, environ)


def _why_not(environ: Mapping[str, str]) -> str | None:
    """What keeps the variables' wish from being followed; they may be there for other programs."""
    if not _is_installed():
        return _INSTALL
    if environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", _PROTOCOL) != _PROTOCOL:
        return f"OTEL_EXPORTER_OTLP_PROTOCOL must be {_PROTOCOL}"
    return None


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec(_EXPORTER) is not None
    except ModuleNotFoundError:
        return False
