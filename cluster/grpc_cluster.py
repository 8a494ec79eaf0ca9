"""The cell's state and the model's card to the messages of `protos/cluster.proto`."""

from __future__ import annotations

import time
from collections.abc import Collection

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from ostro.actors.fabric.messages import ActorStatus, State
from ostro.cluster.cell_metrics import expert_imbalance, kv_usage
from ostro.cluster.grpc_answer import EFFORT_NUMBERS
from ostro.cluster.model_card import ModelCard
from ostro.protos import cluster_pb2 as pb

_ROLES = {
    "router": pb.ACTOR_ROLE_ROUTER,
    "attention": pb.ACTOR_ROLE_ATTENTION,
    "expert": pb.ACTOR_ROLE_EXPERT,
}
_STATES = {
    "starting": pb.ACTOR_STATE_STARTING,
    "loading": pb.ACTOR_STATE_LOADING,
    "ready": pb.ACTOR_STATE_READY,
    "draining": pb.ACTOR_STATE_DRAINING,
    "lost": pb.ACTOR_STATE_LOST,
}


class TokenRate:
    """Output tokens per second between two pictures of the cell."""

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None

    def update(self, num_tokens: int, now_s: float) -> float:
        """Tokens per second since the last call; 0 at the first one."""
        last, self._last = self._last, (now_s, num_tokens)
        if last is None or now_s <= last[0]:
            return 0.0
        return max(0.0, (num_tokens - last[1]) / (now_s - last[0]))


def model_response(card: ModelCard) -> pb.GetModelResponse:
    """What there is to know of the served model."""
    return pb.GetModelResponse(
        id=card.name,
        aliases=card.aliases,
        max_context=card.max_context,
        vocabulary=card.vocab_size,
        vision=card.has_vision,
        efforts=[EFFORT_NUMBERS[name] for name in card.efforts],
        default_effort=EFFORT_NUMBERS[card.default_effort],
        layers=card.num_layers,
        experts=card.num_experts,
        experts_per_token=card.num_experts_per_token,
        weight_dtype=card.weight_dtype,
        kv_dtype=card.kv_dtype,
    )


def cluster_message(state: State, rate: TokenRate) -> pb.Cluster:
    """One picture of the cell."""
    return pb.Cluster(
        actors=[_actor(actor) for actor in state.actors],
        load=_load(state, rate),
        ready=state.ready,
        at=_timestamp(time.time()),
        epoch=state.epoch,
    )


def experts_response(state: State, layers: Collection[int]) -> pb.GetExpertsResponse:
    """Where experts live and how many rows they had since the cell started.

    Args:
        state: The cell.
        layers: Those wanted; empty for all.
    """
    names = {actor.rank: actor.actor_id for actor in state.actors}
    homes: dict[int, list[str]] = {}
    for expert, rank in zip(state.physical_to_logical, state.rank_of_physical, strict=True):
        home = names.get(rank, f"rank {rank}")
        if home not in homes.setdefault(expert, []):
            homes[expert].append(home)
    response = pb.GetExpertsResponse()
    for layer, rows_E in enumerate(state.rows_LE):
        if layers and layer not in layers:
            continue
        for expert, rows in enumerate(rows_E):
            response.placements.add(
                layer=layer, expert=expert, actor_ids=homes.get(expert, []), tokens=rows
            )
    started_s = min((actor.started_at_s for actor in state.actors), default=0.0)
    if started_s:
        response.window.CopyFrom(Duration(seconds=max(0, int(time.time() - started_s))))
    return response


def _actor(actor: ActorStatus) -> pb.Actor:
    role = actor.role.split("+")[0]  # a rank with both roles is shown under its first
    return pb.Actor(
        id=actor.actor_id,
        role=_ROLES.get(role, pb.ACTOR_ROLE_UNSPECIFIED),
        state=_STATES.get(actor.state, pb.ACTOR_STATE_UNSPECIFIED),
        node_id=actor.node_id,
        device="" if actor.device == "cpu" else actor.device,
        rank=actor.rank,
        load_progress=actor.load_progress,
        memory_used_bytes=actor.memory_used_bytes,
        memory_total_bytes=actor.memory_total_bytes,
        started_at=_timestamp(actor.started_at_s),
    )


def _load(state: State, rate: TokenRate) -> pb.Load:
    loads = list(state.loads.values())
    queries = sum(load.prefix_queries_tokens for load in loads)
    hits = sum(load.prefix_hits_tokens for load in loads)
    num_output_tokens = sum(load.num_output_tokens for load in loads)
    num_drafted = sum(sum(load.num_drafted) for load in loads)
    num_accepted = sum(sum(load.num_accepted) for load in loads)
    return pb.Load(
        running=sum(load.num_running for load in loads),
        waiting=sum(load.num_waiting for load in loads),
        kv_usage=sum(kv_usage(load) for load in loads) / len(loads) if loads else 0.0,
        prefix_hit_rate=hits / queries if queries else 0.0,
        tokens_per_second=rate.update(num_output_tokens, time.monotonic()),
        expert_imbalance=expert_imbalance(state),
        draft_acceptance=num_accepted / num_drafted if num_drafted else None,
        # Each step of a request brings one token, and the drafts that were right.
        tokens_per_step=num_output_tokens / max(num_output_tokens - num_accepted, 1),
    )


def _timestamp(seconds: float) -> Timestamp:
    return Timestamp(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
