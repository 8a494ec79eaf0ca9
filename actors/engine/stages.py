"""The stages of a step: what shards count of their time, and the same as parts that share none.

Shards count nested spans, as they come about in code: "forward" holds "combine", which holds
"wait". On a GPU a span tells how long the host took, so a wait for the device lands in the stage
that first needs a result.
"""

from __future__ import annotations

from collections.abc import Mapping

STAGES = ("plan", "attention", "dispatch", "experts", "combine", "forward", "sample", "deliver")

# What an expert shard counts.
EXPERTS_WAIT = "experts: wait for rows"
EXPERTS_COMPUTE = "experts: compute"

_OF_FORWARD = ("attention", "gate", "dispatch", "shared", "combine", "head", "vision")


def step_stages(counted: Mapping[str, float]) -> dict[str, float]:
    """What attention shards have counted, as seconds by `STAGES`.

    attention takes in the gate, the shared expert and images. experts is waiting for other ranks'
    experts and computing own ones; combine is adding up. sample takes in the head. forward is the
    rest of the forward pass: making batches, launching graphs.

    Example:
        {"forward": 5., "attention": 1., "combine": 3., "wait": 2., "add": 1., "sample": 1.} gives
        attention 1, experts 2, combine 1, forward 1, sample 1, and 0 for the others.
    """

    def total(*names: str) -> float:
        return sum(counted.get(name, 0.0) for name in names)

    return {
        "plan": total("plan"),
        "attention": total("attention", "gate", "shared", "vision"),
        "dispatch": total("dispatch"),
        "experts": total("wait", "experts"),
        "combine": total("add"),
        "forward": max(total("forward") - total(*_OF_FORWARD), 0.0),
        "sample": total("head", "sample"),
        "deliver": total("deliver"),
    }
