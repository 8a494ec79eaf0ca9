"""Which nodes the ranks of a cell go to: by role label and NVLink domain. Pure functions.

A node says its role with the label `ostro.role` ("attention" or "expert") and then takes ranks of
that role alone; a role that no node claims goes to the nodes without the label. A node says its
NVLink domain with Ray's `ray.io/gpu-domain`; a cell stays in one domain if one is large enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ostro.configs.deployment import LayoutConfig
from ostro.configs.errors import ConfigError

ROLE_LABEL = "ostro.role"
DOMAIN_LABEL = "ray.io/gpu-domain"
HEAD_RESOURCE = "node:__internal_head__"  # which Ray gives to the head node alone
_ATTENTION, _EXPERT = "attention", "expert"


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

    def is_head(self) -> bool:
        """Whether Ray's own control plane runs here."""
        return HEAD_RESOURCE in self.resources

    def room(self, bundle: Mapping[str, float]) -> int:
        """How many ranks fit, each with the resources of `bundle`."""
        return min(int(self.resources.get(name, 0) // much) for name, much in bundle.items())


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """Arguments of the cell's placement group; one bundle for each rank, in rank order."""

    bundles: list[dict[str, float]]
    label_selectors: list[dict[str, str]]
    topology: dict[str, str] | None


@dataclass(frozen=True, slots=True)
class _Claim:
    """Ranks that go to the same nodes.

    Attributes:
        nodes: Those that say one of `roles`, or no role if it is empty.
        selector: The same in Ray's words; empty where no node has the label.
    """

    ranks: list[int]
    roles: tuple[str, ...]
    nodes: list[Node]
    selector: dict[str, str]


def request_group(layout: LayoutConfig, device: str, nodes: Sequence[Node]) -> GroupRequest:
    """The placement group that a cell needs on these nodes.

    Raises:
        ConfigError: The nodes together have too little; the message says what is missing.
    """
    bundle = {"CPU": 1.0, "GPU": 1.0} if device == "cuda" else {"CPU": 1.0}
    claims = _claims(layout, nodes)
    for claim in claims:
        _check_room(claim, bundle)
    selector_of = {rank: claim.selector for claim in claims for rank in claim.ranks}
    return GroupRequest(
        bundles=[dict(bundle) for _ in selector_of],
        label_selectors=[selector_of[rank] for rank in range(layout.world_size())],
        topology={DOMAIN_LABEL: "STRICT_PACK"} if _fits_a_domain(claims, bundle) else None,
    )


def resolve_device(requested: str, nodes: Sequence[Node]) -> str:
    """What "auto" means on these nodes: cuda where there is a GPU."""
    if requested != "auto":
        return requested
    return "cuda" if any(node.resources.get("GPU", 0) >= 1 for node in nodes) else "cpu"


def _claims(layout: LayoutConfig, nodes: Sequence[Node]) -> list[_Claim]:
    """All ranks by where they go; no node is in two claims."""
    labelled = {node.labels[ROLE_LABEL] for node in nodes if ROLE_LABEL in node.labels}
    ranks_of: dict[tuple[str, ...], list[int]] = {}
    for rank in range(layout.world_size()):
        wanted = tuple(role for role in _roles(rank, layout) if role in labelled)
        ranks_of.setdefault(wanted, []).append(rank)
    return [
        _Claim(
            ranks=ranks,
            roles=wanted,
            nodes=[node for node in nodes if _takes(node, wanted)],
            selector={ROLE_LABEL: _selector(wanted, labelled)} if labelled else {},
        )
        for wanted, ranks in ranks_of.items()
    ]


def _roles(rank: int, layout: LayoutConfig) -> list[str]:
    roles = {_ATTENTION: layout.attention_ranks(), _EXPERT: layout.expert_ranks()}
    return [role for role, ranks in roles.items() if rank in ranks]


def _takes(node: Node, wanted: Sequence[str]) -> bool:
    return node.labels[ROLE_LABEL] in wanted if ROLE_LABEL in node.labels else not wanted


def _selector(wanted: Sequence[str], labelled: set[str]) -> str:
    if len(wanted) == 1:
        return wanted[0]
    # Ray's `!in` takes nodes without the label too.
    return f"in({','.join(wanted)})" if wanted else f"!in({','.join(sorted(labelled))})"


def _check_room(claim: _Claim, bundle: Mapping[str, float]) -> None:
    room = sum(node.room(bundle) for node in claim.nodes)
    if room >= len(claim.ranks):
        return
    each = " and ".join(f"{much:g} {name}" for name, much in bundle.items())
    found = " and ".join(
        f"{sum(node.resources.get(name, 0) for node in claim.nodes):g} {name}" for name in bundle
    )
    raise ConfigError(
        f"not enough nodes{_which(claim)}: the layout wants {len(claim.ranks)} x ({each}), and "
        f"there is room for {room} on {len(claim.nodes)} with {found}; "
        f"add nodes or choose a smaller layout"
    )


def _which(claim: _Claim) -> str:
    if not claim.selector:
        return ""
    roles = " or ".join(claim.roles)
    return f" labelled {ROLE_LABEL}={roles}" if roles else f" without a label {ROLE_LABEL}"


def _fits_a_domain(claims: Sequence[_Claim], bundle: Mapping[str, float]) -> bool:
    """Whether one NVLink domain has room for every rank; else the cell spans domains."""
    domains = {node.labels.get(DOMAIN_LABEL) for claim in claims for node in claim.nodes} - {None}
    return any(
        all(
            sum(node.room(bundle) for node in claim.nodes if node.labels.get(DOMAIN_LABEL) == name)
            >= len(claim.ranks)
            for claim in claims
        )
        for name in domains
    )
