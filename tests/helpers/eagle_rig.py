"""`ModelRig` with a draft head beside it, and steps whose tokens the test chooses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from model_rig import ModelRig

from ostro.actors.eagle_drafter import EagleDrafter, EagleParts
from ostro.actors.engine.request import RequestProgress, RequestState
from ostro.actors.engine.step import ScheduledRequest, ScheduledStep
from ostro.actors.model.batch import build_batches
from ostro.actors.model.draft_head import find_draft_head, load_head_weights
from ostro.actors.model.eagle_head import EagleHead
from ostro.actors.model.latent_cache import LatentCache


class EagleRig(ModelRig):
    """The head's cache starts as NaN too; pages are never short unless `may_grow` is False."""

    def __init__(self, directory: Path, head_directory: Path, **options: Any) -> None:
        super().__init__(directory, **options)
        self.decoder.keeps_hidden = True
        found = find_draft_head(head_directory, self.config)
        dtype = options.get("dtype", torch.float32)
        weights = load_head_weights(found, device=options.get("device", "cpu"), dtype=dtype)
        cache = LatentCache(
            found.config,
            num_pages=self.cache.num_pages,
            page_size=self.cache.page_size,
            device=options.get("device", "cpu"),
            dtype=self.cache.dtype,
        )
        for layer_NSW in cache.layers:
            layer_NSW.view(torch.uint8).fill_(0xFF)
        self.head = EagleHead(found.config, weights, cache, self.decoder.embed)
        self.drafter = EagleDrafter(EagleParts(self.head, self.decoder), self.grow)
        self.may_grow = True

    def grow(self, progress: RequestProgress, num_tokens: int) -> bool:
        """As the scheduler's: pages for so many tokens, or none."""
        if not self.may_grow:
            return len(progress.pages) * self.cache.page_size >= num_tokens
        while len(progress.pages) * self.cache.page_size < num_tokens:
            progress.pages.append(self._free_pages.pop())
        return True

    def advance(
        self,
        parts: Sequence[tuple[RequestProgress, int]],
        num_drafts: int,
        *,
        tokens: Sequence[Sequence[int]] = (),
        drafts: Sequence[Sequence[int]] = (),
    ) -> None:
        """One step as the engine makes it, and the drafts after it.

        Args:
            parts: Requests and how many of their known tokens each computes.
            num_drafts: Asked for afterwards.
            tokens: What each request's step chose; nothing where its prompt goes on.
            drafts: What each verifies besides; its own are replaced.
        """
        entries = []
        for index, (progress, count) in enumerate(parts):
            if progress.state is RequestState.WAITING:
                progress.move_to(RequestState.RUNNING)
            verified = list(drafts[index]) if drafts else []
            entries.append(self._entry(progress, count, verified))
        batches = build_batches(
            entries,
            page_size=self.cache.page_size,
            num_micro_batches=self._num_micro_batches,
        )
        self.decoder.forward(batches, self.exchange)
        for index, (progress, _) in enumerate(parts):
            chosen = list(tokens[index]) if tokens else []
            # Of its drafts those are accepted that were chosen: all its new tokens but the last.
            progress.num_computed_tokens += max(len(chosen) - 1, 0)
            progress.output_token_ids += chosen
            progress.draft_token_ids = []
        step = ScheduledStep(index=0, scheduled_s=0.0, entries=entries)
        self.drafter.draft(step, batches, num_drafts)

    def _entry(self, progress: RequestProgress, count: int, drafts: list[int]) -> ScheduledRequest:
        start = progress.num_computed_tokens
        self.grow(progress, start + count + len(drafts))
        progress.num_computed_tokens = start + count
        known = progress.known_tokens(start, start + count)
        return ScheduledRequest(
            progress=progress,
            start=start,
            num_tokens=count + len(drafts),
            token_ids=[*known, *drafts],
            pages=progress.pages,
            samples=start + count == progress.num_known_tokens,
            num_drafts=len(drafts),
        )
