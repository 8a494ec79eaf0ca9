"""What the speculation head learns from: conversations of the target's own making, and its H.

A head drafts what the target says, right or wrong, so most conversations end in the target's own
words, greedy or sampled, thinking cut at the budgets that are served. Their hidden states are
computed once; training goes over them several times.

Shape letters: B sequences, T tokens, D hidden, I image tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from encoding import END_THINK, EOS, IMG, PAD, THINK, Dialogue, Encoder, collate
from export import BUDGETS
from images import image_example
from mixture import text_example
from transformers import DynamicCache

_IMAGE_SHARE, _OWN_SHARE, _GREEDY_SHARE, _CUT_SHARE = 0.25, 0.25, 0.7, 0.4
_TEMPERATURE = 0.8
MOST_SAID = 320  # tokens of an answer, thinking included


@dataclass(frozen=True, slots=True)
class Opening:
    """A conversation that the target is to go on with.

    Attributes:
        ids: All that stands before its turn.
        budget: Thinking tokens, the closing phrase included; None is no limit.
        temperature: 0 is greedy.
    """

    ids: list[int]
    image: np.ndarray | None = None
    budget: int | None = None
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class Heard:
    """A conversation and the target's states of it.

    Attributes:
        ids_T: Tokens.
        said_T: Whether each is the model's to say.
        hidden_TD: H after the final norm, float16.
        images_ID: What stands for the image tokens' embeddings, float16.
    """

    ids_T: torch.Tensor
    said_T: torch.Tensor
    hidden_TD: torch.Tensor
    images_ID: torch.Tensor


class Target:
    """The frozen model: goes on with conversations, and gives its states of them."""

    def __init__(self, model: Any, encoder: Encoder) -> None:
        self.model = model
        self.config = model.config.text_config
        self.table_VD = model.get_input_embeddings().weight
        self.head_VD = model.lm_head.weight
        self.norm = model.model.language_model.norm.weight
        self._phrase = encoder.closing
        self._embedded: torch.Tensor | None = None
        model.model.language_model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, _module: Any, _inputs: Any, keywords: dict[str, Any]) -> None:
        self._embedded = keywords["inputs_embeds"]

    @torch.no_grad()
    def hear(self, dialogues: Sequence[Dialogue]) -> list[Heard]:
        """States of whole conversations."""
        batch = collate(dialogues)
        images = {}
        if batch.pixels is not None:
            images = {"pixel_values": batch.pixels, "image_sizes": batch.sizes_B2}
        out = self.model.model(input_ids=batch.ids_BT, use_cache=False, **images)
        heard = []
        for row, dialogue in enumerate(dialogues):
            ids, length = torch.tensor(dialogue.ids), len(dialogue.ids)
            seen = self._embedded[row, :length][ids == IMG]
            hidden = out.last_hidden_state[row, :length]
            said = torch.tensor(dialogue.said)
            heard.append(Heard(ids, said, hidden.half(), seen.half()))
        return heard

    @torch.no_grad()
    def go_on(self, openings: Sequence[Opening], seed: int = 0) -> list[list[int]]:
        """What the target says to each, up to EOS or `MOST_SAID` tokens."""
        text_config = self.model.model.language_model.config
        fast, text_config._attn_implementation = text_config._attn_implementation, "sdpa"
        try:
            return self._go_on(openings, torch.Generator().manual_seed(seed))
        finally:
            text_config._attn_implementation = fast

    def _go_on(self, openings: Sequence[Opening], generator: torch.Generator) -> list[list[int]]:
        said: list[list[int]] = [[] for _ in openings]
        running = list(range(len(openings)))
        cache = DynamicCache()
        inputs, mask_BT = self._first_inputs(openings)
        position_B = mask_BT.sum(1) - 1
        while running:
            logits_BV = self.model(
                attention_mask=mask_BT, past_key_values=cache, logits_to_keep=1, **inputs
            ).logits[:, -1]
            for place, index in enumerate(running):
                said[index].append(
                    self._forced(said[index], openings[index].budget)
                    or _choose(logits_BV[place], openings[index].temperature, generator)
                )
            left = [
                place
                for place, index in enumerate(running)
                if said[index][-1] != EOS and len(said[index]) < MOST_SAID
            ]
            if len(left) < len(running):
                running = [running[place] for place in left]
                kept = torch.tensor(left, dtype=torch.long)
                cache.batch_select_indices(kept)
                mask_BT, position_B = mask_BT[kept], position_B[kept]
            position_B = position_B + 1
            mask_BT = torch.nn.functional.pad(mask_BT, (0, 1), value=1)
            inputs = {
                "input_ids": torch.tensor([[said[index][-1]] for index in running]),
                "position_ids": position_B[:, None],
            }
        return said

    def _first_inputs(self, openings: Sequence[Opening]) -> tuple[dict[str, Any], torch.Tensor]:
        """Padded on the left, so that all go on in the same column."""
        longest = max(len(opening.ids) for opening in openings)
        batch = collate([Dialogue(o.ids, [False] * len(o.ids), o.image) for o in openings])
        ids_BT = torch.full((len(openings), longest), PAD)
        mask_BT = torch.zeros((len(openings), longest), dtype=torch.long)
        for row, opening in enumerate(openings):
            ids_BT[row, longest - len(opening.ids) :] = torch.tensor(opening.ids)
            mask_BT[row, longest - len(opening.ids) :] = 1
        inputs = {"input_ids": ids_BT, "position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0)}
        if batch.pixels is not None:
            inputs |= {"pixel_values": batch.pixels, "image_sizes": batch.sizes_B2}
        return inputs, mask_BT

    def _forced(self, said: list[int], budget: int | None) -> int | None:
        """The closing phrase and mark, where a budget ends, as the server forces them."""
        if budget is None or said[:1] != [THINK] or END_THINK in said:
            return None
        over = len(said) - 1 - (budget - len(self._phrase))
        return [*self._phrase, END_THINK][over] if over >= 0 else None


def _choose(logits_V: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    share_V = (logits_V / temperature).softmax(-1)
    return int(torch.multinomial(share_V, 1, generator=generator))


def _opening(rng: random.Random, dialogue: Dialogue) -> tuple[int, Opening]:
    """A conversation up to one of the model's turns, and about how much follows."""
    starts = [
        place
        for place in range(1, len(dialogue.ids))
        if dialogue.said[place] and not dialogue.said[place - 1]
    ]
    start = rng.choice(starts)
    budget = rng.choice(list(BUDGETS.values())) if rng.random() < _CUT_SHARE else None
    temperature = 0.0 if rng.random() < _GREEDY_SHARE else _TEMPERATURE
    opening = Opening(dialogue.ids[:start], dialogue.image, budget, temperature)
    return min(len(dialogue.ids) - start, budget or MOST_SAID), opening


def _dialogue(rng: random.Random, encoder: Encoder) -> Dialogue:
    if rng.random() < _IMAGE_SHARE:
        return encoder.sequence(rng, image_example(rng, held_out=False), [])
    example = text_example(rng)
    before = []
    if not example.tools and rng.random() < 0.15:
        before = [turn for turn in [text_example(rng)] if not turn.tools]
    return encoder.sequence(rng, example, before)


def draw(rng: random.Random, encoder: Encoder, target: Target, count: int) -> list[Heard]:
    """So many conversations of the training's mixture and their states."""
    dialogues = [_dialogue(rng, encoder) for _ in range(count)]
    num_own = round(_OWN_SHARE * count)
    openings = [_opening(rng, dialogue) for dialogue in dialogues[:num_own]]
    openings.sort(key=lambda pair: pair[0])
    own = []
    for part in _parts([opening for _, opening in openings], 256):
        for opening, said in zip(part, target.go_on(part, rng.getrandbits(32)), strict=True):
            whose = [False] * len(opening.ids) + [True] * len(said)
            own.append(Dialogue(opening.ids + said, whose, opening.image))
    dialogues[:num_own] = own
    dialogues.sort(key=lambda dialogue: (dialogue.image is None, len(dialogue.ids)))
    return [heard for part in _parts(dialogues, 16) for heard in target.hear(part)]


def _parts(items: Sequence[Any], size: int) -> Iterator[Any]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
