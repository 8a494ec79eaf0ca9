"""The teaching model's tokenizer: Tekken's form, with merges learnt on the generated text.

The pattern keeps words apart from the blanks before them, so that a word is the same tokens after
a blank, a quote or a line's start: copying a word into JSON copies its tokens. Digits stay single.
A run of 3,800 steps with blanks as the ends of words, and fewer tool calls, copied words badly.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from mixture import text_example
from tasks import COLOURS, NAMES, THINGS, WORDS
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from tool_tasks import CITIES, ROOMS

from ostro.cluster.tekken import NUM_SPECIAL, write_tekken

VOCAB_SIZE = 1024
PATTERN = r"\p{L}+|\p{N}|[^\p{L}\p{N}]+"
CLOSING_PHRASE = "..."
_NUM_EXAMPLES = 20_000


def _texts(seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(_NUM_EXAMPLES):
        example = text_example(rng)
        yield example.question
        yield example.working
        yield example.answer + CLOSING_PHRASE
        yield example.final
        yield from example.results
        yield from (json.dumps(arguments) for _, arguments in example.calls)
        yield json.dumps(list(example.tools)) if example.tools else ""
        yield json.dumps({"reasoning_effort": rng.choice(["none", "high"])})
    closed_sets = " ".join([*CITIES, *NAMES, *ROOMS, *COLOURS, *THINGS, *WORDS])
    yield from [closed_sets] * (_NUM_EXAMPLES // 20)


def _byte_of() -> dict[str, int]:
    """The byte that each character of the byte-level alphabet stands for."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in shown}
    hidden = (byte for byte in range(256) if byte not in shown)
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(hidden)}


def make_tokenizer(path: Path, seed: int = 7) -> None:
    """Learn the merges and write `tekken.json`; the same seed gives the same file."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    num_tokens = VOCAB_SIZE - NUM_SPECIAL
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    byte_of = _byte_of()
    learnt = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = [bytes(byte_of[char] for char in piece) for piece, _ in learnt if len(piece) > 1]
    pieces = [bytes([byte]) for byte in range(256)] + merges
    write_tekken(path, VOCAB_SIZE, pattern=PATTERN, pieces=pieces)
