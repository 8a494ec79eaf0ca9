"""A draft head whose steps of single rows are CUDA graphs.

Drafting three tokens launch by launch takes the host longer than a decode step of the model that is
one graph. Here each pass of the head is one launch too, but for its vocabulary product, whose rows
are fewer than those of the pass.

Shape letters: T tokens, R rows of them, D hidden.
"""

from __future__ import annotations

import torch

from ostro.actors.model.batch import Batch
from ostro.actors.model.cuda_graphs import RowGraphs
from ostro.actors.model.eagle_head import EagleHead
from ostro.actors.model.packed_copy import send_together


class GraphedHead:
    """See `EagleHead`.

    Attributes:
        cache: Latents of its layers.
    """

    def __init__(self, head: EagleHead) -> None:
        self._head = head
        self.cache = head.cache
        self._device = self.cache.layers[0].device
        self._graphs = RowGraphs(self.cache.page_size, self._device)

    @torch.inference_mode()
    def capture(self, *, max_rows: int, max_context: int, num_pages: int) -> None:
        """Capture every graph; arguments as `RowGraphs.capture`'s."""
        shape, dtype = (max_rows, self._head.hidden_size), self._head.dtype
        self._hidden_TD = torch.zeros(shape, dtype=dtype, device=self._device)
        self._state_TD = torch.empty(shape, dtype=dtype, device=self._device)
        self._graphs.capture(
            self._compute, max_rows=max_rows, max_context=max_context, num_pages=num_pages
        )

    @torch.inference_mode()
    def forward(
        self,
        hidden_TD: torch.Tensor,
        batch: Batch,
        rows_R: torch.Tensor | None = None,
        tokens_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `EagleHead.forward`; what comes back is good until the next call."""
        found = self._graphs.find(batch)
        if found is None:
            return self._head.forward(hidden_TD, batch, rows_R, tokens_T)
        self._hidden_TD[: batch.num_tokens].copy_(hidden_TD)
        self._graphs.run(found, tokens_T)
        if rows_R is None:
            return self._state_TD[: batch.num_tokens]
        (rows_R,) = send_together([rows_R], self._device)
        return self._state_TD.index_select(0, rows_R)

    def _compute(self, batch: Batch) -> None:
        num_rows = batch.num_tokens
        self._state_TD[:num_rows].copy_(self._head.forward(self._hidden_TD[:num_rows], batch))
