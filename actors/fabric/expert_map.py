"""A placement as tensors: logical to physical, physical to rank, physical to local.

Every table ends in a -1, so that an id of -1 (no expert) stays -1.

Shape letters: T tokens, R rows, K experts per token.
"""

from __future__ import annotations

import torch

from ostro.actors.fabric.placement import Placement

NOWHERE = -1


class ExpertMap:
    """Lookups of one placement; all of them stay on the device.

    Attributes:
        placement: Which.
        is_plain: Whether every logical expert's only copy is the local one of the same number.
    """

    def __init__(self, placement: Placement, device: torch.device, *, rank: int) -> None:
        """`rank` is whose slots are local, and where its round over replicas starts."""
        self.placement = placement
        replicas = [placement.replicas_of(logical) for logical in range(placement.num_logical)]
        most = max(len(copies) for copies in replicas)
        self._has_copies = most > 1
        self._first_turn = rank
        # A row of `_physical_EX` repeats its copies, so that X turns serve every count.
        padded = [copies + copies[:1] * (most - len(copies)) for copies in replicas]
        self._physical_EX = _table([*padded, (NOWHERE,) * most], device)
        self._only_E = self._physical_EX[:, 0].contiguous()
        self._num_copies_E = _table([*(len(copies) for copies in replicas), 1], device)
        self._rank_of = _table([*placement.rank_of_physical, NOWHERE], device)
        slots = placement.local_slots(rank)
        local_of = [
            physical - slots.start if physical in slots else NOWHERE
            for physical in range(placement.num_physical)
        ]
        self._local_of = _table([*local_of, NOWHERE], device)
        self.is_plain = most == 1 and all(
            local_of[copies[0]] == logical for logical, copies in enumerate(replicas)
        )

    def to_physical(self, expert_TK: torch.Tensor) -> torch.Tensor:
        """Physical ids of logical ones; copies take turns by token, starting at the rank's own."""
        if not self._has_copies:
            return self._only_E[expert_TK]
        turn_T = torch.arange(
            self._first_turn, self._first_turn + len(expert_TK), device=expert_TK.device
        )
        return self._physical_EX[expert_TK, turn_T[:, None] % self._num_copies_E[expert_TK]]

    def to_rank(self, physical_TK: torch.Tensor) -> torch.Tensor:
        """Rank that holds each physical expert."""
        return self._rank_of[physical_TK]

    def to_local(self, physical_RK: torch.Tensor) -> torch.Tensor:
        """int64 local ids of this rank's own experts, -1 for all others."""
        return self._local_of[physical_RK]


def _table(values: list[int] | list[tuple[int, ...]], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
