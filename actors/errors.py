"""Errors by whose fault they are; `cluster` maps them to HTTP and gRPC in one table."""


class OstroError(Exception):
    """Any failure that Ostro names.

    Attributes:
        code: Machine-readable snake_case reason, stable across versions.
        param: The request field at fault, if one is.
        retry_after_s: When trying again is likely to succeed, if known.
    """

    code = "internal"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequestError(OstroError, ValueError):
    """The caller can fix it."""

    code = "invalid_value"


class UnauthenticatedError(OstroError):
    """The caller showed no key, or none that is known."""

    code = "invalid_api_key"


class ForbiddenError(OstroError):
    """The caller's key is not good for this."""

    code = "missing_scope"


class NotFoundError(OstroError):
    """No such model, route or generation."""

    code = "not_found"


class TooLargeError(OstroError):
    """The body is larger than the server takes."""

    code = "body_too_large"


class OverloadedError(OstroError):
    """The caller can wait: queues are full."""

    code = "queue_full"


class QuotaError(OverloadedError):
    """The caller can wait: its tenant has used up what it may; `param` names the quota."""

    code = "quota_exceeded"


class SpentQuotaError(QuotaError):
    """The same, and so it is for whatever its tenant asks for in the next second.

    Attributes:
        HOLDS_S: For how long; the ingress refuses without tokenizing meanwhile.
    """

    HOLDS_S = 1.0


class SlowBodyError(OstroError):
    """The body did not arrive in time."""

    code = "body_timeout"


class NotReadyError(OstroError):
    """The cell is loading, draining or being mended."""

    code = "not_ready"


class ShardLostError(OstroError):
    """A rank died or did not answer in time; its name is in the message."""

    code = "shard_lost"


class DeadlineError(OstroError):
    """The request's own time limit passed."""

    code = "deadline_exceeded"


class CheckpointError(OstroError, ValueError):
    """A checkpoint that cannot be served; the message names file and tensor."""

    code = "bad_checkpoint"


class TransportError(OstroError):
    """Rows could not be exchanged with a peer rank.

    Attributes:
        peer: The rank that did not answer or closed its connection, if one can be named.
    """

    code = "transport_failed"

    def __init__(self, message: str, *, peer: int | None = None) -> None:
        super().__init__(message)
        self.peer = peer


class InvalidTransitionError(RuntimeError):
    """A state machine was asked for a move that its table forbids: a bug of ours."""
