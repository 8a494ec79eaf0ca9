"""The model that answers when no checkpoint is given: made once, from a seed, in the user's cache.

Small and random, in exactly the architecture of Mistral Small 4, with a tokenizer cut from the one
that mistral-common ships. To everything else it is a checkpoint directory like any other.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from ostro.actors.errors import CheckpointError
from ostro.actors.model.random_checkpoint import EMBEDDED, write_random_checkpoint
from ostro.actors.model.weights import check_checkpoint
from ostro.cluster.tekken import write_tekken
from ostro.configs.errors import ConfigError

_NAME = "ostro-embedded"  # a model is served under its directory's name
_SEED = 0
_FORMAT = 1  # raise when the files change while dimensions and seed do not


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


def _version() -> str:
    content = f"{_FORMAT}/{_SEED}/{EMBEDDED}"
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
