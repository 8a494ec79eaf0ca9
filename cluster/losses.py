"""What has befallen one submission, and whether it waits for the cell to be mended."""

from __future__ import annotations

import asyncio

from ostro.actors.errors import OstroError, ShardLostError
from ostro.cluster.unfinished import Unfinished

_MOST = 3  # a request that kills its ranks is not to take the cell down for ever


class Losses:
    """Those of one submission; used on its event loop.

    Args:
        recovery_timeout_s: How long it waits after each.

    Attributes:
        latest: What it waits for the mending of; None once it brings tokens again.
        give_up_s: Until when, on the loop's clock.
    """

    def __init__(self, recovery_timeout_s: float) -> None:
        self.latest: OstroError | None = None
        self.give_up_s = 0.0
        self._recovery_timeout_s = recovery_timeout_s
        self._num = 0

    def can_go_on(self, error: OstroError, unfinished: Unfinished) -> bool:
        """Whether to wait after an error; False if it is to be raised.

        A refusal is none of a loss, but it may meet what was let in before, or a part of it: after
        a loss, or between its being noticed by the router and by the replica.
        """
        is_lost = isinstance(error, ShardLostError)
        self._num += is_lost
        if self._num == _MOST or not (is_lost or self.latest or unfinished.was_accepted):
            return False
        if is_lost or self.latest is None:
            self.latest = error
            self.give_up_s = asyncio.get_running_loop().time() + self._recovery_timeout_s
        return True
