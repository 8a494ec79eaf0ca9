"""`ostro serve` in a process of its own, for tests that talk to it as users do."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Self

import httpx
from free_port import free_port

START_TIMEOUT_S = 240
FEWEST_PROCESSES = 6  # Ray's own, Serve's, and at least one of each actor


class Served:
    """A running `ostro serve`; as a context it is ready inside, and all of it is gone after.

    Args:
        log: Where it writes.
        arguments: Of the command, ports excepted.
        trust: Whom to trust if it speaks TLS.
    """

    def __init__(self, log: Path, *arguments: str, trust: ssl.SSLContext | None = None) -> None:
        self.http_port, self.grpc_port = free_port(), free_port()
        self.url = f"{'http' if trust is None else 'https'}://127.0.0.1:{self.http_port}"
        self.trust = trust
        self.grpc_address = f"127.0.0.1:{self.grpc_port}"
        self.log = log
        with log.open("wb") as output:
            self.process = self._start(arguments, output)

    def _start(self, arguments: Sequence[str], output: BinaryIO) -> subprocess.Popen:
        return subprocess.Popen(
            [
                Path(sys.executable).with_name("ostro"),
                "serve",
                *arguments,
                "--http-port",
                str(self.http_port),
                "--grpc-port",
                str(self.grpc_port),
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        try:
            self.wait_ready()
            self.wait_announced()  # an interrupt before it has said so is none of a ready server
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_ready(self) -> None:
        """Return once it takes requests."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                ready = httpx.get(f"{self.url}/ready", timeout=2, verify=self.trust or True)
                if ready.status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.2)
        raise AssertionError(self.log.read_text())

    def wait_announced(self) -> str:
        """Everything it said, once it has said where it answers."""
        deadline = time.monotonic() + 60
        while "curl" not in (text := self.log.read_text()):
            assert time.monotonic() < deadline, text
            time.sleep(0.1)
        return text

    def stop(self) -> None:
        """Interrupt it, unless it has ended; it must end well and leave no process behind."""
        family = self.children()
        if self.process.poll() is None:
            assert len(family) >= FEWEST_PROCESSES, self.log.read_text()
            self.process.send_signal(signal.SIGINT)
        try:
            assert self.process.wait(120) == 0, self.log.read_text()
        finally:
            self.process.kill()
        deadline = time.monotonic() + 30
        while left := {pid for pid in family if Path(f"/proc/{pid}").exists()}:
            assert time.monotonic() < deadline, f"still running: {left}"
            time.sleep(0.2)

    def children(self) -> set[int]:
        """Every process of its session."""
        found = set()
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self._started(entry):
                    found.add(int(entry.name))
            except (OSError, ValueError, IndexError):
                continue
        return found

    def _started(self, entry: Path) -> bool:
        mark = f"{self.http_port}".encode()
        environment = (entry / "environ").read_bytes()
        return (
            b"RAY_AUTH_TOKEN=" in environment
            and int(entry.name) != os.getpid()
            and (mark in (entry / "cmdline").read_bytes() or self._descends(entry))
        )

    def _descends(self, entry: Path) -> bool:
        pid = int(entry.name)
        while pid > 1:
            if pid == self.process.pid:
                return True
            pid = int((Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[1])
        return False
