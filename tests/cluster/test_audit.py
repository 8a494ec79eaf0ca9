"""The audit log's file: whole lines from several processes, put aside when it is full."""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ostro.cluster.audit import AuditLog, _SharedRotatingFile
from ostro.configs.errors import ConfigError
from ostro.configs.security import SecurityConfig

NUM_LINES, NUM_WRITERS = 3000, 3
_WRITER = """
import sys
from ostro.cluster.audit import AuditLog
from ostro.configs.security import SecurityConfig
path, writer, num_lines = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
log = AuditLog(SecurityConfig(audit_file=path, audit_file_bytes=65536, num_audit_files=50))
for number in range(num_lines):
    log.write({"writer": writer, "number": number, "padding": "x" * 50})
"""


@pytest.fixture(autouse=True)
def _logger_as_it_was():
    logger = logging.getLogger("ostro.audit")
    yield
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.NOTSET)


def config(path: Path, **fields) -> SecurityConfig:
    return SecurityConfig(audit_file=str(path), **fields)


def test_nobody_reads_the_log_unless_asked_to():
    assert not AuditLog(SecurityConfig()).is_read


def test_lines_go_to_the_file(tmp_path):
    path = tmp_path / "logs" / "audit.jsonl"
    log = AuditLog(config(path))
    assert log.is_read
    log.write({"tenant": "acme", "route": "a\nb\ud800"})
    log.write({"tenant": "other"})
    assert [json.loads(line)["tenant"] for line in path.read_text().splitlines()] == [
        "acme",
        "other",
    ]
    assert path.stat().st_mode & 0o007 == 0


def test_a_file_that_cannot_be_opened_is_named():
    with pytest.raises(ConfigError, match=r"security\.audit_file=/dev/null/audit\.jsonl: "):
        AuditLog(config(Path("/dev/null/audit.jsonl")))


def test_a_second_log_takes_the_place_of_the_first(tmp_path):
    AuditLog(config(tmp_path / "first"))
    AuditLog(config(tmp_path / "second")).write({"a": 1})
    assert (tmp_path / "first").read_text() == ""
    assert (tmp_path / "second").read_text().count("\n") == 1


def test_old_files_are_kept_up_to_a_number(tmp_path):
    path = tmp_path / "audit.jsonl"
    log = AuditLog(config(path, audit_file_bytes=4096, num_audit_files=2))
    for number in range(500):
        log.write({"number": number, "padding": "x" * 50})
    kept = {file.name: file for file in tmp_path.iterdir() if not file.name.endswith(".lock")}
    assert set(kept) == {"audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"}
    assert all(file.stat().st_size < 4096 + 100 for file in kept.values())
    assert all(file.stat().st_mode & 0o007 == 0 for file in kept.values())
    lines = "".join(kept[name].read_text() for name in sorted(kept, reverse=True)).splitlines()
    numbers = [json.loads(line)["number"] for line in lines]
    assert numbers == list(range(numbers[0], 500))


def test_a_folder_that_is_gone_is_told_and_ends_nothing(tmp_path, capsys):
    path = tmp_path / "logs" / "audit.jsonl"
    log = AuditLog(config(path))
    shutil.rmtree(path.parent)
    log.write({"number": 0})
    assert "FileNotFoundError" in capsys.readouterr().err
    path.parent.mkdir()
    log.write({"number": 1})
    assert path.read_text() == '{"number": 1}\n'


def test_who_puts_files_aside_is_not_waited_for(tmp_path):
    path = tmp_path / "audit.jsonl"
    log = AuditLog(config(path, audit_file_bytes=4096, num_audit_files=1))
    with path.with_name("audit.jsonl.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for number in range(100):
            log.write({"number": number, "padding": "x" * 50})
        assert path.read_text().count("\n") == 100
    log.write({"number": 100})
    assert path.read_text() == '{"number": 100}\n'


def test_who_comes_late_does_not_put_the_new_file_aside(tmp_path):
    path = tmp_path / "audit.jsonl"
    first, late = (_SharedRotatingFile(path, max_bytes=10, num_kept=2) for _ in range(2))
    path.write_text("a file that is full\n")
    first._rotate()
    path.write_text("new\n")
    late._rotate()  # had found it full before
    first.close()
    late.close()
    assert path.read_text() == "new\n"
    assert path.with_name("audit.jsonl.1").read_text() == "a file that is full\n"
    assert not path.with_name("audit.jsonl.2").exists()


def test_several_processes_lose_no_line(tmp_path):
    path = tmp_path / "audit.jsonl"
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, path, str(writer), str(NUM_LINES)])
        for writer in range(NUM_WRITERS)
    ]
    assert [writer.wait(60) for writer in writers] == [0] * NUM_WRITERS
    files = [file for file in tmp_path.iterdir() if not file.name.endswith(".lock")]
    assert len(files) > 3
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    found = sorted((line["writer"], line["number"]) for line in lines)
    assert found == [(writer, n) for writer in range(NUM_WRITERS) for n in range(NUM_LINES)]
