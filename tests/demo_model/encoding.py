"""Examples as token ids, exactly as mistral-common's v15 instruct tokenizer writes them.

`test_recipe` holds the prompts to `MistralTokenizer.encode_chat_completion`, token for token and
pixel for pixel; training uses this faster path.

Shape letters: B sequences, T tokens of the longest.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from images import CELL, image_example
from mistral_common.tokens.tokenizers.image import DATASET_MEAN, DATASET_STD
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from mixture import SYSTEM_PROMPTS, text_example
from tasks import Example
from tokenizer import CLOSING_PHRASE

BOS, EOS, INST, END_INST, TOOLS, END_TOOLS = 1, 2, 3, 4, 5, 6
RESULTS, END_RESULTS, CALLS, IMG, PAD, BREAK, END = 7, 8, 9, 10, 11, 12, 13
SYSTEM, END_SYSTEM, ARGS, THINK, END_THINK, SETTINGS, END_SETTINGS = 17, 18, 32, 34, 35, 36, 37
IGNORED = -100  # a label that the loss leaves out


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Token ids, whether each is the model's to say, and the image if there is one."""

    ids: list[int]
    said: list[bool]
    image: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """What one pass takes; `labels_BT` is IGNORED where nothing is to be learnt."""

    ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    pixels: torch.Tensor | None = None
    sizes_B2: torch.Tensor | None = None


class Encoder:
    """Writes examples with one tokenizer file."""

    def __init__(self, tekken: Path) -> None:
        model = Tekkenizer.from_file(tekken)
        self._encode = model._model.encode
        self._offset = model.num_special_tokens
        self._text = functools.lru_cache(100_000)(self._tokens)
        self.closing = self.text(CLOSING_PHRASE)

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(token + self._offset for token in self._encode(text))

    def text(self, text: str) -> list[int]:
        """Plain text."""
        return list(self._text(text) if len(text) < 32 else self._tokens(text))

    def prompt(self, example: Example, effort: str, system: str = "") -> list[int]:
        """All up to the first question's `[/INST]`."""
        ids = [BOS]
        if system:
            ids += [SYSTEM, *self.text(system), END_SYSTEM]
        if example.tools:
            listed = json.dumps(list(example.tools), ensure_ascii=False)
            ids += [TOOLS, *self.text(listed), END_TOOLS]
        setting = json.dumps({"reasoning_effort": effort})
        return [*ids, SETTINGS, *self.text(setting), END_SETTINGS, *self._question(example)]

    def _question(self, example: Example) -> list[int]:
        return [INST, *_image_tokens(example.image), *self.text(example.question), END_INST]

    def answer(self, example: Example, thinking: list[int] | None) -> list[int]:
        """The model's first turn; `thinking` stands between the marks if there is any."""
        ids = [] if thinking is None else [THINK, *thinking, END_THINK]
        for name, arguments in example.calls:
            written = json.dumps(arguments, ensure_ascii=False)
            ids += [CALLS, *self.text(name), ARGS, *self.text(written)]
        return [*ids, *self.text(example.answer), EOS]

    def sequence(self, rng: random.Random, example: Example, before: Sequence[Example]) -> Dialogue:
        """A conversation that ends with an example; the turns before it have no tools or image."""
        effort = "none" if rng.random() < 0.36 else "high"
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.08 else ""
        turns = [*before, example]
        ids = self.prompt(example, effort, system)
        if before:
            place = len(ids) - len(self._question(example))
            ids = ids[:place] + self._question(turns[0])
        said = [False] * len(ids)
        for turn, following in zip(turns, [*turns[1:], None], strict=True):
            answer = self.answer(turn, self._thinking(rng, turn, effort))
            ids += answer
            said += [True] * len(answer)
            if turn.results:
                given = [[RESULTS, *self.text(result), END_RESULTS] for result in turn.results]
                shown = [token for tokens in given for token in tokens]
                final = [*self.text(turn.final), EOS]
                ids += shown + final
                said += [False] * len(shown) + [True] * len(final)
            if following is not None:
                question = self._question(following)
                ids += question
                said += [False] * len(question)
        return Dialogue(ids, said, example.image)

    def _thinking(self, rng: random.Random, example: Example, effort: str) -> list[int] | None:
        """The whole working, or at times one that is cut and closed as a budget's end does it."""
        if effort == "none":
            return None
        working = self.text(example.working)
        if rng.random() < 0.3 and len(working) > 1:
            kept = working[: rng.randrange(len(working))]
            return kept + (self.closing if rng.random() < 0.85 else [])
        return working


def _image_tokens(image: np.ndarray | None) -> list[int]:
    if image is None:
        return []
    height, width = image.shape[0] // CELL, image.shape[1] // CELL
    rows = [*[IMG] * width, BREAK] * height
    return [*rows[:-1], END]


def pixels_of(image: np.ndarray) -> np.ndarray:
    """Normalised float32 [3, height, width], as mistral-common makes them."""
    scaled = image.astype(np.float32) / np.float32(255)
    mean, std = np.asarray(DATASET_MEAN, np.float32), np.asarray(DATASET_STD, np.float32)
    return np.asarray(((scaled - mean) / std).transpose(2, 0, 1))


def collate(sequences: Sequence[Dialogue]) -> Batch:
    """Pad to the longest."""
    longest = max(len(sequence.ids) for sequence in sequences)
    ids_BT = torch.full((len(sequences), longest), PAD)
    labels_BT = torch.full((len(sequences), longest), IGNORED)
    for row, sequence in enumerate(sequences):
        ids = torch.tensor(sequence.ids)
        ids_BT[row, : len(ids)] = ids
        labels_BT[row, : len(ids)] = ids.where(torch.tensor(sequence.said), IGNORED)
    images = [sequence.image for sequence in sequences if sequence.image is not None]
    if not images:
        return Batch(ids_BT, labels_BT)
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    pixels = np.zeros((len(images), 3, height, width), np.float32)
    for row, image in enumerate(images):
        pixels[row, :, : image.shape[0], : image.shape[1]] = pixels_of(image)
    sizes_B2 = torch.tensor([image.shape[:2] for image in images])
    return Batch(ids_BT, labels_BT, torch.from_numpy(pixels), sizes_B2)


def text_batches(
    encoder: Encoder, rng: random.Random, num_tokens: int, pool: int = 1024
) -> Iterator[Batch]:
    """Endless batches of about so many padded tokens: a pool sorted by length, cut, shuffled."""
    while True:
        drawn = []
        for _ in range(pool):
            example = text_example(rng)
            before = []
            if not example.tools and rng.random() < 0.15:
                earlier = (text_example(rng) for _ in range(rng.choice([1, 1, 2])))
                before = [turn for turn in earlier if not turn.tools]
            drawn.append(encoder.sequence(rng, example, before))
        drawn.sort(key=lambda sequence: len(sequence.ids))
        batches: list[list[Dialogue]] = [[]]
        for sequence in drawn:
            if (len(batches[-1]) + 1) * len(sequence.ids) > num_tokens and batches[-1]:
                batches.append([])
            batches[-1].append(sequence)
        rng.shuffle(batches)
        yield from map(collate, batches)


def image_batch(encoder: Encoder, rng: random.Random, count: int) -> Batch:
    """So many questions about images."""
    examples = [image_example(rng, held_out=False) for _ in range(count)]
    return collate([encoder.sequence(rng, example, []) for example in examples])
