"""The audit log: one JSON line a request, who asked for what and what came of it; never any text.

Lines go to the logger `ostro.audit` at INFO, and to a file where the deployment names one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import logging.handlers
import os
from collections.abc import Mapping
from io import TextIOWrapper
from pathlib import Path

from ostro.configs.errors import ConfigError
from ostro.configs.security import SecurityConfig

_logger = logging.getLogger("ostro.audit")
_MODE = 0o640


class AuditLog:
    """Writes lines if anybody reads them."""

    def __init__(self, security: SecurityConfig) -> None:
        """Open the file, if one is configured.

        Raises:
            ConfigError: It cannot be opened.
        """
        if security.audit_file is None:
            return
        path = Path(security.audit_file)
        try:
            handler = _SharedRotatingFile(path, security.audit_file_bytes, security.num_audit_files)
        except OSError as error:
            raise ConfigError(f"security.audit_file={path}: {error.strerror}") from None
        for before in list(_logger.handlers):
            if isinstance(before, _SharedRotatingFile):
                _logger.removeHandler(before)
                before.close()
        _logger.addHandler(handler)
        _logger.setLevel(logging.INFO)

    @property
    def is_read(self) -> bool:
        """Whether a line would go anywhere."""
        return _logger.isEnabledFor(logging.INFO)

    def write(self, fields: Mapping[str, object]) -> None:
        """Write a line."""
        _logger.info("%s", json.dumps(fields))


class _SharedRotatingFile(logging.handlers.WatchedFileHandler):
    """A log file that several processes append to and put aside when it is full.

    A line is one write to the end of the file. Who finds the file full takes a lock and looks
    again; the others see that it is another file, and open that.
    """

    def __init__(self, path: Path, max_bytes: int, num_kept: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._max_bytes = max_bytes
        self._num_kept = num_kept
        super().__init__(path, encoding="utf-8")

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line; a failure to write is told on stderr and ends nothing."""
        try:
            if self._is_full():
                self._rotate()
            super().emit(record)
        except OSError:
            self.handleError(record)

    def _open(self) -> TextIOWrapper:
        """Called by the base class, again whenever the file was put aside."""
        file = super()._open()
        os.fchmod(file.fileno(), _MODE)
        return file

    def _is_full(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return self._path.stat().st_size >= self._max_bytes
        return False

    def _rotate(self) -> None:
        with self._path.with_name(self._path.name + ".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # another process is at it, and requests do not wait for one
            if not self._is_full():
                return
            for number in range(self._num_kept - 1, 0, -1):
                with contextlib.suppress(FileNotFoundError):
                    self._aside(number).replace(self._aside(number + 1))
            self._path.replace(self._aside(1))

    def _aside(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")
