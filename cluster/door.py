"""The door of an ingress replica: every call of either face comes in here and goes out again.

A face opens a `Call`, has it let in, and closes it. While it runs it is `current_call()`, by which
the guarded frontend knows whose generation it serves without any route having to pass it on: a
route that is written tomorrow cannot forget to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

from ostro.actors.engine.quotas import Bucket
from ostro.actors.errors import OstroError, QuotaError, SpentQuotaError
from ostro.cluster.access import OPEN, Needs, route_needs
from ostro.cluster.audit import AuditLog
from ostro.cluster.generation import Usage
from ostro.cluster.key_ring import STRANGER, Caller, KeyRing
from ostro.configs.security import SecurityConfig

_ADDRESS_CHARS = 64
_STRANGER_LINES_PER_MINUTE = 600


@dataclass(slots=True, kw_only=True)
class Call:
    """One request, and what the audit log will say of it.

    Attributes:
        request_id: `x-request-id`.
        route: Method and path, or the RPC's name.
        client: Address, as far as it is known.
        status: HTTP status, or name of the gRPC status; None if nobody was left to be told.
        usage: Of a generation that ended.
        finish_reason: Likewise; None if it was cut off.
    """

    request_id: str
    route: str
    client: str
    caller: Caller = STRANGER
    began_s: float = field(default_factory=time.monotonic)
    status: int | str | None = None
    generation_id: str | None = None
    num_prompt_tokens: int | None = None
    usage: Usage | None = None
    finish_reason: str | None = None


_current: ContextVar[Call] = ContextVar("ostro_call")


def current_call() -> Call:
    """The call that is being served.

    Raises:
        OstroError: There is none: somebody got past the door, which is a bug.
    """
    call = _current.get(None)
    if call is None:
        raise OstroError("a generation was asked for by nobody")
    return call


@contextmanager
def serving(call: Call) -> Iterator[None]:
    """Make a call the current one."""
    token = _current.set(call)
    try:
        yield
    finally:
        _current.reset(token)


class _Spent(NamedTuple):
    """What the router said of a tenant's quota, and when."""

    message: str
    quota: str | None
    retry_after_s: float
    said_s: float


class Door:
    """Lets callers in and writes down what they did."""

    def __init__(
        self,
        ring: KeyRing,
        audit: AuditLog,
        security: SecurityConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ring = ring
        self._audit = audit
        self._security = security
        self._clock = clock
        self._stranger_lines = Bucket(_STRANGER_LINES_PER_MINUTE, clock())
        self._num_left_out = 0
        self._spent: dict[str, _Spent] = {}  # by tenant

    @classmethod
    def wide_open(cls) -> Door:
        """Lets everybody in and writes no file."""
        security = SecurityConfig()
        return cls(KeyRing(is_open=True), AuditLog(security), security)

    @property
    def audits(self) -> bool:
        """Whether anybody reads what the log would say."""
        return self._audit.is_read

    def route_needs(self, path: str) -> Needs:
        """What a request to this path needs here."""
        return OPEN if path == "/metrics" and self._security.open_metrics else route_needs(path)

    def client(self, peer: str, forwarded_for: Sequence[str]) -> str:
        """The client's address, as far back as it can be believed.

        Args:
            peer: The other end of the connection.
            forwarded_for: Values of `x-forwarded-for`. The last address in them is HAProxy's word;
                those before it are of trusted proxies, then of anybody.
        """
        addresses = [part.strip() for value in forwarded_for for part in value.split(",")]
        place = min(1 + self._security.num_trusted_proxies, len(addresses))
        return addresses[-place][:_ADDRESS_CHARS] if addresses else peer

    def let_in(self, call: Call, shown: str | None, needs: Needs) -> None:
        """Find out who calls, and whether they may.

        Raises:
            UnauthenticatedError: Their key is missing, unknown or has expired.
            ForbiddenError: It is not good for this.
            NotReadyError: It is not known yet who may.
        """
        call.caller = self._ring.caller(shown)
        call.caller.check(needs)

    def check_quota(self, caller: Caller) -> None:
        """Refuse whose quota was spent a moment ago: to tokenize a prompt costs more than a "no".

        Raises:
            QuotaError: As the router said it then.
        """
        spent = self._spent.get(caller.tenant)
        if spent is None:
            return
        passed_s = self._clock() - spent.said_s
        if passed_s < SpentQuotaError.HOLDS_S:
            left_s = spent.retry_after_s - passed_s
            raise QuotaError(spent.message, param=spent.quota, retry_after_s=left_s)
        del self._spent[caller.tenant]

    def note_spent(self, caller: Caller, error: SpentQuotaError) -> None:
        """Remember what the router said of a caller's tenant."""
        self._spent[caller.tenant] = _Spent(
            error.message,
            error.param,
            error.retry_after_s or SpentQuotaError.HOLDS_S,
            self._clock(),
        )

    def close(self, call: Call) -> None:
        """Write down what became of a call; `time` is that of its end.

        Of strangers only so many a minute: who floods the log would push out what others did. The
        next line says how many were `left_out`; the metric of refused keys counts all.
        """
        if not self._audit.is_read or self._is_left_out(call):
            return
        usage = call.usage
        left_out = {"left_out": self._num_left_out} if self._num_left_out else {}
        self._num_left_out = 0
        self._audit.write(
            {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request_id": call.request_id,
                "generation_id": call.generation_id,
                "tenant": call.caller.tenant,
                "key_id": call.caller.key_id,
                "route": call.route,
                "status": call.status,
                "finish_reason": call.finish_reason,
                "prompt_tokens": call.num_prompt_tokens,
                "completion_tokens": None if usage is None else usage.completion_tokens,
                "duration_s": round(time.monotonic() - call.began_s, 4),
                "client": call.client,
                **left_out,
            }
        )

    def _is_left_out(self, call: Call) -> bool:
        if call.caller is not STRANGER:
            return False
        if self._stranger_lines.wait_s(1, self._clock()) > 0:
            self._num_left_out += 1
            return True
        self._stranger_lines.take(1)
        return False
