"""The model that answers when no checkpoint is given: made once, from a seed, in the user's cache.

Small and random, in exactly the architecture of Mistral Small 4, with a tokenizer cut from the one
that mistral-common ships. To everything else it is a checkpoint directory like any other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from ostro.actors.errors import CheckpointError
from ostro.actors.model.random_checkpoint import EMBEDDED, write_random_checkpoint
from ostro.actors.model.weights import check_checkpoint
from ostro.configs.errors import ConfigError

_NAME = "ostro-embedded"  # a model is served under its directory's name
_SEED = 0
_FORMAT = 1  # raise when the files change while dimensions and seed do not
_NUM_SPECIAL = 64

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


def ensure_embedded_model(cache_dir: Path | None = None) -> Path:
    """The embedded checkpoint's directory; made if it is not there or not whole.

    Safe to call from several processes at once: it is made aside and renamed into place.

    Args:
        cache_dir: Holds one directory per version; None is `ostro` under `XDG_CACHE_HOME`.
    """
    parent = default_cache_dir() if cache_dir is None else cache_dir
    target = parent / _version() / _NAME
    if _is_whole(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as scratch:
        made = Path(scratch) / "made"
        write_random_checkpoint(made, EMBEDDED, _SEED)
        write_tekken(made / "tekken.json", EMBEDDED.vocab_size)
        _move_into_place(made, target, Path(scratch) / "broken")
    return target


def default_cache_dir() -> Path:
    """Where Ostro keeps what it can make again."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ostro"


def write_tekken(path: Path, vocab_size: int, num_special: int = _NUM_SPECIAL) -> None:
    """Write a v15 `tekken.json` cut from mistral-common's own: its first merges, usual specials.

    Args:
        path: The file.
        vocab_size: Special slots, 256 bytes and merges together; 131072 at most.
        num_special: Special slots; the real tokenizer has 1000.
    """
    num_tokens = vocab_size - num_special
    shipped = json.loads((files("mistral_common") / "data" / "tekken_240911.json").read_bytes())
    if not 256 <= num_tokens <= len(shipped["vocab"]) or num_special <= max(_SPECIAL_TOKENS):
        raise ValueError(f"no tokenizer has {vocab_size} tokens, {num_special} of them special")
    tekken = {
        "config": {
            "pattern": shipped["config"]["pattern"],
            "num_vocab_tokens": num_tokens,
            "default_vocab_size": vocab_size,
            "default_num_special_tokens": num_special,
            "version": "v15",
        },
        "vocab": shipped["vocab"][:num_tokens],
        "special_tokens": [_special_token(rank) for rank in range(num_special)],
        "model_settings_builder": {"reasoning_effort": _EFFORT_SETTING},
    }
    path.write_text(json.dumps(tekken), encoding="ascii")


def _special_token(rank: int) -> dict[str, Any]:
    text = _SPECIAL_TOKENS.get(rank, f"<SPECIAL_{rank}>")
    return {"rank": rank, "token_str": text, "is_control": True}


def _version() -> str:
    content = f"{_FORMAT}/{_SEED}/{_NUM_SPECIAL}/{EMBEDDED}"
    return hashlib.blake2b(content.encode("ascii"), digest_size=6).hexdigest()


def _is_whole(directory: Path) -> bool:
    try:
        check_checkpoint(directory)
    except (CheckpointError, ConfigError):
        return False
    return (directory / "tekken.json").is_file()


def _move_into_place(made: Path, target: Path, aside: Path) -> None:
    """Rename onto the target, unless another process was faster."""
    if target.exists() and not _is_whole(target):
        with contextlib.suppress(FileNotFoundError):  # another process moved it
            target.rename(aside)
    try:
        made.rename(target)
    except OSError:
        if not _is_whole(target):
            raise
        shutil.rmtree(made)
