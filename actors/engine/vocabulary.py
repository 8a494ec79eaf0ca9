"""The bytes of every token, read from a checkpoint's `tekken.json`, as far as grammars need them.

Prompts are mistral-common's matter (`cluster.prompt`); a shard has no use for its tokenizer.
"""

from __future__ import annotations

import binascii
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ostro.configs.errors import ConfigError

FILE_NAME = "tekken.json"
_EOS = "</s>"
_BRACKETS = re.compile(r"\[(.*)\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Tokens by id, and how a text is cut before they are merged.

    Attributes:
        pieces: Bytes of every token, in the order of merging; of a control token its name in angle
            brackets, which is how grammars name it: `<THINK>` for `[THINK]`.
        num_special: Ids 0 .. num_special - 1 are control tokens.
        eos_token_id: `</s>`.
        pattern: The regular expression whose matches are tokenized on their own.
    """

    pieces: list[bytes]
    num_special: int
    eos_token_id: int
    pattern: str


class _Piece(msgspec.Struct):
    token_bytes: str


class _SpecialToken(msgspec.Struct):
    rank: int
    token_str: str


class _Config(msgspec.Struct):
    pattern: str
    default_vocab_size: int
    default_num_special_tokens: int


class _Tekken(msgspec.Struct):
    config: _Config
    vocab: list[_Piece]
    special_tokens: list[_SpecialToken] | None = None


def read_vocabulary(path: Path) -> Vocabulary:
    """Read a `tekken.json`.

    Raises:
        ConfigError: It is missing, or no such file.
    """
    try:
        tekken = msgspec.json.decode(path.read_bytes(), type=_Tekken)
        num_special = tekken.config.default_num_special_tokens
        vocab = tekken.vocab[: tekken.config.default_vocab_size - num_special]
        pieces = [binascii.a2b_base64(piece.token_bytes) for piece in vocab]
        names = {token.rank: token.token_str for token in tekken.special_tokens or ()}
        eos_token_id = next(rank for rank, name in names.items() if name == _EOS)
    except (OSError, ValueError, StopIteration) as error:
        raise ConfigError(
            f"{path}: no tokenizer can be read from it ({type(error).__name__})"
        ) from error
    special = [_special_name(rank, names.get(rank)) for rank in range(num_special)]
    return Vocabulary(
        pieces=special + pieces,
        num_special=num_special,
        eos_token_id=eos_token_id,
        pattern=tekken.config.pattern,
    )


def _special_name(rank: int, name: str | None) -> bytes:
    if name is None:
        return f"<SPECIAL_{rank}>".encode()
    return _BRACKETS.sub(r"<\1>", name).encode()
