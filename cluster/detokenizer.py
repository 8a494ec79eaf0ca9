"""Token ids back to text, one token at a time and whole characters only.

A token is a run of bytes, and a character may be cut between tokens: the bytes that do not yet make
a character are held back. Knows nothing of thinking or tools (see `output_parser`).
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TokenTable:
    """The bytes of every token of a tokenizer.

    Ids 0 .. num_special - 1 are control tokens: they have a name but no text. Ids beyond the table
    (a model's vocabulary may be padded) have neither.

    Args:
        pieces: Bytes by token id; names for control tokens.
        num_special: How many ids are control tokens.
    """

    def __init__(self, pieces: Sequence[bytes], num_special: int) -> None:
        self._pieces = tuple(pieces)
        self._num_special = num_special

    def __len__(self) -> int:
        return len(self._pieces)

    def is_special(self, token_id: int) -> bool:
        """Whether a token is a control token."""
        return token_id < self._num_special

    def text(self, token_id: int) -> bytes:
        """What a token adds to a text; nothing if it is a control token."""
        return b"" if token_id < self._num_special else self.name(token_id)

    def name(self, token_id: int) -> bytes:
        """What a token looks like, control tokens included; may be a part of a UTF-8 character."""
        return self._pieces[token_id] if token_id < len(self._pieces) else b""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of many tokens with control tokens shown; U+FFFD for what is not UTF-8."""
        return b"".join(map(self.name, token_ids)).decode("utf-8", errors="replace")


class Detokenizer:
    """One growing text. Constant work per token.

    Bytes that can no longer become a character turn into U+FFFD at once; a character that is merely
    unfinished waits for the next token or for `flush`. All parts joined equal the tokens' bytes
    decoded in one piece with errors="replace".
    """

    def __init__(self, table: TokenTable) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        return self._decoder.decode(self._table.text(token_id))

    def flush(self) -> str:
        """What is held back, as U+FFFD; the next token begins a new text."""
        held = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return held
