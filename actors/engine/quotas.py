"""What tenants have used of their quotas, over all ingress replicas of a cell.

The router asks before it places a request and tells when one ends, so the count is exact however
many replicas there are. Budgets per minute are buckets that refill evenly: a tenant that was silent
for a minute may use a whole minute's worth at once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

from ostro.actors.errors import InvalidRequestError, QuotaError, SpentQuotaError
from ostro.configs.key_table import Quota

_MINUTE_S = 60.0
_CONCURRENCY_RETRY_S = 1.0  # when one of a tenant's own requests ends, nobody knows


class Bucket:
    """A budget of so much a minute; its level may fall below 0 and then has to recover first."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._filled_s = now_s

    def wait_s(self, wanted: int, now_s: float) -> float:
        """Seconds until `wanted` is there; what is more than a whole bucket needs a full one."""
        self._refill(now_s)
        missing = min(wanted, self.per_minute) - self._level
        return max(0.0, missing) * _MINUTE_S / self.per_minute

    def take(self, amount: int) -> None:
        """Use some of it, or give some back."""
        self._level = min(self._level - amount, float(self.per_minute))

    def resize(self, per_minute: int, now_s: float) -> None:
        """Change the budget; what was used of it stays used."""
        self._refill(now_s)
        self._level += per_minute - self.per_minute
        self.per_minute = per_minute

    def _refill(self, now_s: float) -> None:
        gained = (now_s - self._filled_s) * self.per_minute / _MINUTE_S
        self._level = min(self._level + gained, float(self.per_minute))
        self._filled_s = now_s


class TenantQuotas:
    """Counts what each tenant uses and refuses what is too much."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._quotas: Mapping[str, Quota] = {}
        self._requests: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}
        self._num_live: Counter[str] = Counter()

    def configure(self, quotas: Mapping[str, Quota]) -> None:
        """Put new quotas in force; what tenants have used of the old ones counts."""
        self._quotas = quotas
        now_s = self._clock()
        for buckets, name in (
            (self._requests, "requests_per_minute"),
            (self._tokens, "tokens_per_minute"),
        ):
            limits = {tenant: getattr(quota, name) for tenant, quota in quotas.items()}
            for tenant in [tenant for tenant in buckets if limits.get(tenant) is None]:
                del buckets[tenant]
            for tenant, limit in limits.items():
                if limit is None:
                    continue
                if tenant in buckets:
                    buckets[tenant].resize(limit, now_s)
                else:
                    buckets[tenant] = Bucket(limit, now_s)

    def begin(self, tenant: str, num_prompt_tokens: int, num_choices: int = 1) -> None:
        """Count a request in: its prompt once, and each of its choices as running.

        Raises:
            InvalidRequestError: It has more choices than the tenant may have running at all.
            QuotaError: It is too much; nothing was counted. `retry_after_s` is when the budget has
                recovered, if nobody else of the tenant comes first. A SpentQuotaError if the
                smallest of requests would be too much.
        """
        self._check_concurrency(tenant, num_choices)
        now_s = self._clock()
        requests, tokens = self._requests.get(tenant), self._tokens.get(tenant)
        if requests is not None:
            _check(tenant, "requests_per_minute", requests, 1, now_s)
        if tokens is not None:
            _check(tenant, "tokens_per_minute", tokens, num_prompt_tokens, now_s)
            tokens.take(num_prompt_tokens)
        if requests is not None:
            requests.take(1)
        self._num_live[tenant] += num_choices

    def count_request(self, tenant: str) -> None:
        """Count a request that generates nothing, and of whose tokens none counts.

        Raises:
            QuotaError: It is one too many; otherwise as in `begin`.
        """
        requests = self._requests.get(tenant)
        if requests is not None:
            _check(tenant, "requests_per_minute", requests, 1, self._clock())
            requests.take(1)

    def resume(self, tenant: str, num_choices: int = 1) -> None:
        """Count in choices that were let in before and lost: they run, and cost nothing so far."""
        self._num_live[tenant] += num_choices

    def end(self, tenant: str, num_output_tokens: int) -> None:
        """Count out a choice of a request that was begun, and what it brought."""
        self._leave(tenant, 1)
        if tenant in self._tokens:
            self._tokens[tenant].take(num_output_tokens)

    def undo(self, tenant: str, num_prompt_tokens: int, num_choices: int = 1) -> None:
        """Forget choices that were begun and then not served, by no fault of the tenant's.

        With `num_prompt_tokens`, the request too that they were begun with.
        """
        self._leave(tenant, num_choices)
        if num_prompt_tokens and tenant in self._tokens:
            self._tokens[tenant].take(-num_prompt_tokens)
        if num_prompt_tokens and tenant in self._requests:
            self._requests[tenant].take(-1)

    def _leave(self, tenant: str, num_choices: int) -> None:
        self._num_live[tenant] -= num_choices
        if self._num_live[tenant] <= 0:
            del self._num_live[tenant]

    def _check_concurrency(self, tenant: str, num_choices: int) -> None:
        quota = self._quotas.get(tenant)
        limit = None if quota is None else quota.concurrent_requests
        if limit is None:
            return
        if num_choices > limit:
            raise InvalidRequestError(
                f"{num_choices} answers to one prompt are more than the {limit} that tenant "
                f"{tenant} may have at a time, its concurrent_requests",
                code="above_quota",
                param="n",
            )
        if self._num_live[tenant] + num_choices > limit:
            raise QuotaError(
                f"{self._num_live[tenant]} answers to tenant {tenant} are being made, its "
                f"concurrent_requests is {limit}; try again when one has ended",
                param="concurrent_requests",
                retry_after_s=_CONCURRENCY_RETRY_S,
            )


def _check(tenant: str, name: str, bucket: Bucket, wanted: int, now_s: float) -> None:
    wait_s = bucket.wait_s(wanted, now_s)
    if wait_s > 0:
        is_spent = bucket.wait_s(1, now_s) >= SpentQuotaError.HOLDS_S
        raise (SpentQuotaError if is_spent else QuotaError)(
            f"tenant {tenant} has used up its {name} of {bucket.per_minute}; "
            f"try again in {wait_s:.1f} s",
            param=name,
            retry_after_s=wait_s,
        )
