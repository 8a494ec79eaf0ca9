"""The key file: read whole or refused whole, and edited by one at a time.

YAML, of which JSON is a part. It is replaced in one step, readable by its owner alone; a reader
finds the old table or the new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from secrets import token_urlsafe
from typing import Any

import msgspec
import yaml

from ostro.configs.deployment import DeploymentConfig
from ostro.configs.errors import ConfigError
from ostro.configs.key_table import KeyTable
from ostro.configs.load import read_yaml

_PREFIX = "ostro-"
_KEY_BYTES = 32
_MODE = 0o600
_MAX_FILE_BYTES = 4 * 2**20
_LOCK_TIMEOUT_S = 10.0
_LOCK_POLL_S = 0.05
_HEADING = "# Written by `ostro keys`, which may edit it while it is in use. Hashes, not keys.\n"


def make_key() -> tuple[str, str]:
    """A new key, and its SHA-256 as the file holds it."""
    key = _PREFIX + token_urlsafe(_KEY_BYTES)
    return key, sha256(key.encode()).hexdigest()


def check_access(deployment: DeploymentConfig) -> None:
    """Refuse, before anything starts, faces that are open to strangers and a bad key file.

    Raises:
        ConfigError: The text names the way out.
    """
    serving = deployment.serving
    knows_clients = serving.tls is not None and serving.tls.client_ca_file is not None
    deployment.security.check_exposure(serving.host, knows_clients=knows_clients)
    if deployment.security.key_file is not None:
        read_keys(Path(deployment.security.key_file).expanduser())


def read_keys(path: Path) -> KeyTable:
    """The table in a key file.

    Raises:
        ConfigError: There is no such file, or it is no key file, or anybody may write it; the text
            names the place within.
    """
    try:
        about = path.stat()
    except OSError as error:
        raise ConfigError(
            f"{path}: no key file there ({error.strerror}); make one with "
            f"`ostro keys add --file {path} TENANT`"
        ) from None
    if not stat.S_ISREG(about.st_mode):  # to read a pipe may last for ever
        raise ConfigError(f"{path}: is no regular file, which a key file must be")
    if about.st_mode & 0o002:
        raise ConfigError(f"{path}: anybody may write it, and make keys; chmod 600 it")
    if about.st_size > _MAX_FILE_BYTES:
        raise ConfigError(f"{path}: a key file holds at most {_MAX_FILE_BYTES} bytes")
    try:
        return msgspec.convert(read_yaml(path), KeyTable)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from None


def write_keys(path: Path, table: KeyTable) -> None:
    """Replace a key file in one step; with the suffix `.json` it becomes JSON.

    Raises:
        ConfigError: It cannot be written.
    """
    target = path.resolve()  # a link stays one
    try:
        with _replacing(target) as file:
            file.write(_text(target, table))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def edited_keys(path: Path) -> Iterator[list[KeyTable]]:
    """Edit a key file alone: give the table in a list of one, write what is there at the end.

    A file that is not there yet holds no keys.

    Raises:
        ConfigError: As `read_keys`, or somebody else has been editing it for ten seconds.
    """
    with _lock(path.resolve()):  # one lock, by whatever link they come
        tables = [read_keys(path) if path.exists() else KeyTable()]
        yield tables
        write_keys(path, tables[0])


def _text(path: Path, table: KeyTable) -> str:
    values: dict[str, Any] = msgspec.to_builtins(table)
    if path.suffix == ".json":
        return json.dumps(values, indent=2) + "\n"
    return _HEADING + yaml.safe_dump(values, sort_keys=False, default_flow_style=None)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Any]:
    """A new file that takes the place of `path` once it is whole and on the disk."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, _MODE)
            yield file
            file.flush()
            os.fsync(descriptor)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file's editors; a process that dies lets go of it."""
    give_up_s = time.monotonic() + _LOCK_TIMEOUT_S
    try:
        lock = path.with_name(f".{path.name}.lock").open("a")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be edited: {error.strerror}") from None
    with lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up_s:
                    raise ConfigError(f"{path}: somebody else is editing it; try again") from None
                time.sleep(_LOCK_POLL_S)
        yield
