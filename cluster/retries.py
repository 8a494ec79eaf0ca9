"""How long to wait before a failed call is made again. Needs nothing but the standard library."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How often a call is made again, and how patiently.

    Attributes:
        most: Retries in a row; 0 makes every failure final.
        first_delay_s: Wait before the first one; it doubles from one to the next.
        longest_delay_s: Where the doubling ends.
    """

    most: int = 6
    first_delay_s: float = 0.5
    longest_delay_s: float = 30.0

    def delay_s(self, num_failures: int, asked_s: float | None = None) -> float:
        """Seconds to wait after so many failures in a row.

        Between half and all of the doubled delay, so that callers who failed together do not come
        back together; on top of what the server asked for, if it asked.
        """
        longest_s = min(self.first_delay_s * 2.0 ** min(num_failures - 1, 64), self.longest_delay_s)
        return (asked_s or 0.0) + longest_s * random.uniform(0.5, 1.0)
