"""Bytes and counts as people write them."""

from __future__ import annotations

from datetime import timedelta


def format_bytes(num_bytes: float) -> str:
    """Bytes for people.

    Example:
        1536 -> "1.5 KiB"; 2**40 -> "1024 GiB"
    """
    for unit in ("B", "KiB", "MiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.3g} {unit}" if num_bytes < 999.5 else f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.0f} GiB" if num_bytes >= 999.5 else f"{num_bytes:.3g} GiB"


def format_count(count: int) -> str:
    """A large number for people.

    Example:
        118_972_826_624 -> "119 B"
    """
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def format_seconds(seconds: float) -> str:
    """A span of time for people.

    Example:
        45.4 -> "45 s"; 200 -> "3 min 20 s"; 7500 -> "2 h 5 min"
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def days_left(left: timedelta) -> str:
    """How soon something is, in whole days and never more than there are.

    Example:
        36 hours -> "in 1 day"
    """
    if left <= timedelta():
        return "now"
    if left < timedelta(days=1):
        return "in less than a day"
    return f"in {left.days} day{'s' if left.days > 1 else ''}"
