"""Descriptors, threads and memory of the processes of a served cluster, by what they are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_ROLES = {
    "router": r"ray::PlacedRouter",
    "attention": r"ray::PlacedAttentionShard",
    "expert": r"ray::PlacedExpertShard",
    "ingress": r"ray::ServeReplica",
    "controller": r"ray::ServeController",
    "proxy": r"ray::HAProxyManager|ray::ProxyActor",
    "haproxy": r"haproxy",
    "gcs": r"gcs_server",
    "raylet": r"raylet/raylet",
    "serve": r"ostro\x00serve",
}
_OPTIONAL = ("ray::IDLE",)  # Ray's spare workers come and go


@dataclass(frozen=True, slots=True)
class Process:
    """One process at one moment."""

    pid: int
    role: str
    num_files: int
    num_threads: int
    rss_mib: float


def role_of(pid: int) -> str | None:
    """What a process is; None if it has ended or is one of Ray's spare ones."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return None
    if not command or any(name in command for name in _OPTIONAL):
        return None
    return next((role for role, mark in _ROLES.items() if re.search(mark, command)), "other")


def census(pids: Iterable[int]) -> list[Process]:
    """Those of the processes that are there."""
    found = []
    for pid in sorted(pids):
        role = role_of(pid)
        if role is None:
            continue
        try:
            num_files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        rss = re.search(r"VmRSS:\s+(\d+) kB", status)
        threads = re.search(r"Threads:\s+(\d+)", status)
        if rss is None or threads is None:  # a zombie
            continue
        found.append(Process(pid, role, num_files, int(threads[1]), int(rss[1]) / 1024))
    return found


def count_roles(processes: Iterable[Process]) -> Counter[str]:
    """How many there are of each."""
    return Counter(process.role for process in processes)


def table(before: Iterable[Process], after: Iterable[Process]) -> str:
    """Both, side by side, for a failure's text."""
    was = {process.pid: process for process in before}
    lines = [f"{'process':20} {'files':>12} {'threads':>12} {'MiB':>16}"]
    for now in after:
        then = was.pop(now.pid, None)
        files, threads, rss = (
            ("-", "-", "-")
            if then is None
            else (then.num_files, then.num_threads, round(then.rss_mib))
        )
        lines.append(
            f"{now.role + ' ' + str(now.pid):20} {files:>5} {now.num_files:>6} "
            f"{threads:>5} {now.num_threads:>6} {rss:>7} {now.rss_mib:>8.0f}"
        )
    lines += [f"{then.role} {then.pid} has ended" for then in was.values()]
    return "\n".join(lines)
