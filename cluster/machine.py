"""What this machine has: memory, cores, GPUs. Looks, and changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ostro.cluster.deployment_plan import Machine, Memory

_MEMINFO = Path("/proc/meminfo")


def this_machine() -> Machine:
    """Memory, cores and GPUs at this moment."""
    gpus = []
    for index in range(torch.cuda.device_count()):
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        gpus.append(Memory(total_bytes=total_bytes, free_bytes=free_bytes))
    return Machine(
        host=host_memory(_MEMINFO.read_text(encoding="ascii")),
        num_cores=len(os.sched_getaffinity(0)),
        gpus=tuple(gpus),
        gpu_name=torch.cuda.get_device_name(0) if gpus else "",
    )


def host_memory(meminfo: str) -> Memory:
    """Main memory from the text of /proc/meminfo."""
    values = {
        name: int(rest.split()[0]) * 1024
        for name, _, rest in (line.partition(":") for line in meminfo.splitlines())
        if rest
    }
    return Memory(total_bytes=values["MemTotal"], free_bytes=values["MemAvailable"])


def local_device(requested: str) -> str:
    """What "auto" means here: cuda where there is a GPU."""
    if requested != "auto":
        return requested
    return "cuda" if torch.cuda.is_available() else "cpu"
