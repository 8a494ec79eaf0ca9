"""What a batch brought: one JSON object a line, as OpenAI's Batch API writes them.

    {"id": "batch_req_...", "custom_id": "1", "error": null,
     "response": {"status_code": 200, "request_id": "...", "body": {...}}}

`error` is set where no HTTP answer was had: {"code", "message"}, and "line" where it was the line's
own fault. A run can go on after an interruption: what is written is not asked again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec

from ostro.cluster.batch_lines import BatchLine, LineFault
from ostro.configs.errors import ConfigError


class Response(msgspec.Struct):
    """What a server answered; `body` is JSON as it came."""

    status_code: int
    request_id: str | None
    body: msgspec.Raw = msgspec.Raw(b"null")


class Record(msgspec.Struct, kw_only=True):
    """One line of output."""

    id: str = msgspec.field(default_factory=lambda: f"batch_req_{uuid.uuid4().hex}")
    custom_id: str | None
    response: Response | None = None
    error: dict[str, Any] | None = None

    @property
    def has_failed(self) -> bool:
        """Whether it holds anything but an answer."""
        return self.error is not None or self.response is None or self.response.status_code != 200


class BatchIndex:
    """Which lines of a batch were read and which have been written, however many there are.

    In a database of SQLite's without a name, which spills to a file of its own and goes with it.

    Attributes:
        num_failed: Lines of output that hold no answer.
    """

    def __init__(self) -> None:
        self.num_failed = 0
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute(
            "CREATE TABLE ids (id TEXT PRIMARY KEY, is_written INT, is_read INT) WITHOUT ROWID"
        )
        self._database.execute("CREATE TABLE faults (line INTEGER PRIMARY KEY)")

    def close(self) -> None:
        """Forget everything."""
        self._database.close()

    def note_written(self, record: Record) -> None:
        """Take note of a line of output."""
        self.num_failed += record.has_failed
        line = (record.error or {}).get("line")
        if isinstance(line, int):
            self._database.execute("INSERT OR IGNORE INTO faults VALUES (?)", (line,))
        elif record.custom_id is not None:
            self._database.execute(
                "INSERT OR REPLACE INTO ids VALUES (?, 1, 0)", (record.custom_id,)
            )

    def to_do(self, line: BatchLine | LineFault) -> BatchLine | LineFault | None:
        """What is to be done of a line that was read: its like, a fault of it, or nothing."""
        if isinstance(line, BatchLine):
            find = "SELECT is_written, is_read FROM ids WHERE id = ?"
            found = self._database.execute(find, (line.custom_id,)).fetchone()
            is_written, is_read = found or (0, 0)
            if not is_read:
                self._database.execute(
                    "INSERT OR REPLACE INTO ids VALUES (?, ?, 1)", (line.custom_id, is_written)
                )
                return None if is_written else line
            line = LineFault(
                number=line.number,
                end=line.end,
                custom_id=line.custom_id,
                code="duplicate_custom_id",
                message=f"line {line.number}: an earlier line has this custom_id",
            )
        find = "SELECT 1 FROM faults WHERE line = ?"
        return None if self._database.execute(find, (line.number,)).fetchone() else line


@contextmanager
def open_output(
    path: Path, index: BatchIndex, *, goes_on: bool, drops_failed: bool = False
) -> Iterator[IO[bytes]]:
    """Open a file of output for this run alone, to append to it.

    Args:
        path: The file; it need not be there.
        index: Told of every line that is there.
        goes_on: Keep what is there, but for a last line that was torn; otherwise begin anew.
        drops_failed: Keep the answers only, so that the other lines are asked again.

    Raises:
        ConfigError: It cannot be opened, another run writes to it, or it holds something else.
    """
    if drops_failed:
        _drop_failed(path)
    with _locked(path) as file:
        with _named(path):
            file.truncate(_take_up(path, index) if goes_on else 0)
        yield file


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    with _named(path):
        file = path.open("ab")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{path}: another run writes to it") from None
        yield file


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None


def _take_up(path: Path, index: BatchIndex) -> int:
    """Note what is there; gives its bytes up to the end of the last whole line."""
    end = 0
    for data, record in _records(path):
        index.note_written(record)
        end += len(data)
    return end


def _drop_failed(path: Path) -> None:
    """Cut the lines without an answer out; all of them or, if that goes wrong, none."""
    if not path.exists():
        return
    path = path.resolve()  # a link stays one
    kept = path.with_name(f"{path.name}.kept")
    with _locked(path), _named(kept):
        try:
            with kept.open("wb") as file:
                shutil.copymode(path, kept)
                file.writelines(data for data, record in _records(path) if not record.has_failed)
                file.flush()
                os.fsync(file.fileno())
            kept.replace(path)
        finally:
            kept.unlink(missing_ok=True)


def _records(path: Path) -> Iterator[tuple[bytes, Record]]:
    """The whole lines of a file; the last one may be torn."""
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            if not data.endswith(b"\n"):
                return
            try:
                yield data, msgspec.json.decode(data, type=Record)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                raise ConfigError(
                    f"{path}: line {number} is none that run-batch wrote; take another file, or "
                    f"--overwrite"
                ) from None
