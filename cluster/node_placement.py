"""Which nodes the ranks of a cell go to: by role label and NVLink domain. Pure functions.

A node says its role with the label `ostro.role` ("attention" or "expert") and its NVLink domain
with Ray's `ray.io/gpu-domain`; where no node has a label, it is not asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ostro.configs.deployment import LayoutConfig
from ostro.configs.errors import ConfigError

ROLE_LABEL = "ostro.role"
DOMAIN_LABEL = "ray.io/gpu-domain"


@dataclass(frozen=True, slots=True)
class Node:
    """A node that is alive.

    Attributes:
        resources: All that it has, used or not, by Ray's names.
    """

    node_id: str
    address: str
    labels: Mapping[str, str]
    resources: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """Arguments of the cell's placement group; one bundle for each rank, in rank order."""

    bundles: list[dict[str, float]]
    label_selectors: list[dict[str, str]]
    topology: dict[str, str] | None


def request_group(layout: LayoutConfig, device: str, nodes: Sequence[Node]) -> GroupRequest:
    """The placement group that a cell needs on these nodes.

    Raises:
        ConfigError: The nodes together have too little; the message says what is missing.
    """
    bundle = {"CPU": 1.0, "GPU": 1.0} if device == "cuda" else {"CPU": 1.0}
    _check_enough(bundle, layout.world_size(), nodes)
    roles = {node.labels.get(ROLE_LABEL) for node in nodes}
    selectors = [_selector(rank, layout, roles) for rank in range(layout.world_size())]
    return GroupRequest(
        bundles=[dict(bundle) for _ in range(layout.world_size())],
        label_selectors=selectors,
        topology={DOMAIN_LABEL: "STRICT_PACK"} if _fits_a_domain(layout, nodes) else None,
    )


def resolve_device(requested: str, nodes: Sequence[Node]) -> str:
    """What "auto" means on these nodes: cuda where there is a GPU."""
    if requested != "auto":
        return requested
    return "cuda" if any(node.resources.get("GPU", 0) >= 1 for node in nodes) else "cpu"


def _fits_a_domain(layout: LayoutConfig, nodes: Sequence[Node]) -> bool:
    """Whether one NVLink domain has a GPU for every rank; else the cell spans domains."""
    gpus: dict[str, float] = {}
    for node in nodes:
        if DOMAIN_LABEL in node.labels:
            domain = node.labels[DOMAIN_LABEL]
            gpus[domain] = gpus.get(domain, 0.0) + node.resources.get("GPU", 0.0)
    return max(gpus.values(), default=0.0) >= layout.world_size()


def _selector(rank: int, layout: LayoutConfig, roles: set[str | None]) -> dict[str, str]:
    role = "attention" if rank in layout.attention_ranks() else "expert"
    return {ROLE_LABEL: role} if role in roles else {}


def _check_enough(bundle: Mapping[str, float], num_ranks: int, nodes: Sequence[Node]) -> None:
    for resource, amount in bundle.items():
        have = sum(node.resources.get(resource, 0.0) // amount for node in nodes)
        if have < num_ranks:
            raise ConfigError(
                f"the layout has {num_ranks} ranks with {amount:g} {resource} each, and the "
                f"{len(nodes)} nodes have {have:g}: add nodes or choose a smaller layout"
            )
