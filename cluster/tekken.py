"""Small tokenizers in Tekken's form: v15, the usual control tokens at their usual ids.

For benchmarks, tests and the embedded model; a real checkpoint brings its own `tekken.json`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

NUM_SPECIAL = 64  # the real tokenizer has 1000
_SPECIAL_TOKENS = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    3: "[INST]",
    4: "[/INST]",
    5: "[AVAILABLE_TOOLS]",
    6: "[/AVAILABLE_TOOLS]",
    7: "[TOOL_RESULTS]",
    8: "[/TOOL_RESULTS]",
    9: "[TOOL_CALLS]",
    10: "[IMG]",
    11: "<pad>",
    12: "[IMG_BREAK]",
    13: "[IMG_END]",
    14: "[PREFIX]",
    15: "[MIDDLE]",
    16: "[SUFFIX]",
    17: "[SYSTEM_PROMPT]",
    18: "[/SYSTEM_PROMPT]",
    19: "[TOOL_CONTENT]",
    32: "[ARGS]",
    33: "[CALL_ID]",
    34: "[THINK]",
    35: "[/THINK]",
    36: "[MODEL_SETTINGS]",
    37: "[/MODEL_SETTINGS]",
}
_EFFORT_SETTING = {
    "type": "enum",
    "accepts_none": True,
    "default": "none",
    "values": ["none", "high"],
}


def write_tekken(
    path: Path,
    vocab_size: int,
    *,
    pattern: str | None = None,
    pieces: Sequence[bytes] | None = None,
    max_image_size: int = 224,
) -> None:
    """Write a `tekken.json`.

    Args:
        path: The file.
        vocab_size: Special slots, 256 bytes and merges together; 131072 at most.
        pattern: What splits text before merging; None takes mistral-common's own.
        pieces: The bytes of every token in the order of merging, single bytes first; None takes
            the first of mistral-common's own.
        max_image_size: Pixels of the longer side that images are brought down to.
    """
    num_tokens = vocab_size - NUM_SPECIAL
    shipped = json.loads((files("mistral_common") / "data" / "tekken_240911.json").read_bytes())
    vocab = shipped["vocab"] if pieces is None else [_piece(*it) for it in enumerate(pieces)]
    if not 256 <= num_tokens <= len(vocab):
        raise ValueError(f"no tokenizer has {vocab_size} tokens, {NUM_SPECIAL} of them special")
    tekken = {
        "config": {
            "pattern": pattern or shipped["config"]["pattern"],
            "num_vocab_tokens": num_tokens,
            "default_vocab_size": vocab_size,
            "default_num_special_tokens": NUM_SPECIAL,
            "version": "v15",
        },
        "vocab": vocab[:num_tokens],
        "special_tokens": [_special_token(rank) for rank in range(NUM_SPECIAL)],
        "image": {
            "image_patch_size": 14,
            "max_image_size": max_image_size,
            "spatial_merge_size": 2,
        },
        "model_settings_builder": {"reasoning_effort": _EFFORT_SETTING},
    }
    path.write_text(json.dumps(tekken), encoding="ascii")


def _special_token(rank: int) -> dict[str, Any]:
    text = _SPECIAL_TOKENS.get(rank, f"<SPECIAL_{rank}>")
    return {"rank": rank, "token_str": text, "is_control": True}


def _piece(rank: int, piece: bytes) -> dict[str, Any]:
    try:
        text: str | None = piece.decode()
    except UnicodeDecodeError:
        text = None
    return {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": text}
