"""What the planes say: small typed messages, msgpack on the wire.

Everything about a step carries its epoch; a reader drops what belongs to another one. Rows never
travel here (see `transport`).

Shape letters: A attention ranks, M micro-batches, E experts, L layers.
"""

from __future__ import annotations

import msgspec

from ostro.actors import errors
from ostro.actors.engine.request import GenerationRequest, TokenEvent
from ostro.actors.engine.step import ShardLoad
from ostro.actors.errors import OstroError
from ostro.configs.key_table import KeyTable


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages; the tag is the class name."""


# ---- a shard to the router


class RankHello(_Message, frozen=True):
    """First message of a rank on its step connection.

    Attributes:
        token_address: Where an attention shard offers its token stream; None from an expert shard.
    """

    epoch: int
    rank: int
    token_address: str | None


class Proposal(_Message, frozen=True):
    """An attention shard wants to run `num_tokens` tokens in its next step."""

    epoch: int
    rank: int
    num_tokens: int


class StepDone(_Message, frozen=True):
    """An attention shard finished a step, or ended requests between steps.

    Attributes:
        step: The step, or None if nothing ran.
        outputs: New output tokens by request id.
        finished: Requests that ended in this step.
        cached_pages: Hashes of pages that became reusable, for placement by longest cached prefix.
        dropped_pages: Hashes of pages that were evicted.
        seconds: Where this epoch's time went so far, by stage name.
    """

    epoch: int
    rank: int
    step: int | None
    outputs: list[tuple[str, list[int]]]
    finished: list[str]
    load: ShardLoad
    cached_pages: list[int]
    dropped_pages: list[int]
    seconds: dict[str, float]


class ExpertCounts(_Message, frozen=True):
    """Rows that a rank's physical experts computed since its last report, layer by layer."""

    epoch: int
    rank: int
    rows_LE: list[list[int]]
    seconds: dict[str, float]


class RankFailed(_Message, frozen=True):
    """A rank could not finish a step; `suspect` is the peer that it waited for, if known."""

    epoch: int
    rank: int
    suspect: int | None
    reason: str


# ---- the router to a shard


class StepPlan(_Message, frozen=True):
    """One step of the whole cell, the same text for every rank.

    Attributes:
        step: Counts up from 0 within an epoch.
        sparse: Dispatch by exact counts instead of fixed shapes.
        tokens_AM: Rows of each attention rank's micro-batches; all ranks have the same M.
        placement_version: The placement that physical expert ids refer to.
    """

    epoch: int
    step: int
    sparse: bool
    tokens_AM: list[list[int]]
    placement_version: int


class Assign(_Message, frozen=True):
    """Serve this request and send its tokens to that ingress.

    Attributes:
        output_token_ids: As in `Submit`.
    """

    epoch: int
    request: GenerationRequest
    ingress_id: str
    output_token_ids: list[int] | None = None


class Cancel(_Message, frozen=True):
    """Stop a request and free its pages; unknown ids are ignored.

    Told to its ingress too, as `EndThinking` is: the shard may be lost before it acts on it.
    """

    epoch: int
    request_id: str


class EndThinking(_Message, frozen=True):
    """Close a request's thinking at its next step."""

    epoch: int
    request_id: str


class AbortEpoch(_Message, frozen=True):
    """Leave the epoch: stop waiting for peers, drop its process group."""

    epoch: int
    reason: str


# ---- an ingress to the router


class IngressHello(_Message, frozen=True):
    """First message of an ingress replica."""

    ingress_id: str


class Submit(_Message, frozen=True):
    """Serve this request, all of its choices on one rank.

    Attributes:
        output_token_ids: What a choice that was lost had brought: it goes on from there. None
            begins anew.
    """

    request: GenerationRequest
    output_token_ids: list[int] | None = None


class CancelGeneration(_Message, frozen=True):
    """Stop a choice, a submission, or the latest one of a caller's id, whoever submitted it.

    Of `tenant` only, unless that is None.
    """

    tag: int
    request_id: str
    tenant: str | None = None


class EndThinkingGeneration(_Message, frozen=True):
    """Close the thinking of what `CancelGeneration` would stop."""

    tag: int
    request_id: str
    tenant: str | None = None


class CountRequest(_Message, frozen=True):
    """Count a request that generates nothing against its tenant's requests per minute."""

    tag: int
    tenant: str


class AskState(_Message, frozen=True):
    """Ask for the cell's state."""

    tag: int


# Counts of an ingress replica by series: the name of its sample, then the values of its labels.
Counts = dict[tuple[str, ...], float]


class ReplicaCounts(_Message, frozen=True):
    """All that an ingress replica has counted since it began."""

    counts: Counts


class AskCounts(_Message, frozen=True):
    """Ask for what all replicas have counted."""

    tag: int


# ---- the router to an ingress


class Keys(_Message, frozen=True):
    """Who may call; sent at hello, before `Members`, and on change. Never sent without keys."""

    table: KeyTable


class Members(_Message, frozen=True):
    """Where attention shards offer their token streams, by rank; sent at hello and on change."""

    epoch: int
    ready: bool
    token_addresses: dict[int, str]


class Accepted(_Message, frozen=True):
    """A request was placed with all its choices."""

    request_id: str
    rank: int


class Rejected(_Message, frozen=True):
    """A request was refused, or failed after it was accepted; `error` names an OstroError class."""

    request_id: str
    error: str
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def by(cls, request_id: str, error: OstroError) -> Rejected:
        """The message that tells of an error."""
        return cls(
            request_id=request_id,
            error=type(error).__name__,
            code=error.code,
            message=error.message,
            param=error.param,
            retry_after_s=error.retry_after_s,
        )

    def as_error(self) -> OstroError:
        """The error that the message tells of."""
        kind: type[OstroError] = getattr(errors, self.error, OstroError)
        return kind(
            self.message, code=self.code, param=self.param, retry_after_s=self.retry_after_s
        )


class RequestCounted(_Message, frozen=True):
    """Answer to CountRequest; `refusal` says why it was too much, and names no request."""

    tag: int
    refusal: Rejected | None


class ControlDone(_Message, frozen=True):
    """Answer to CancelGeneration and EndThinkingGeneration."""

    tag: int
    applied: bool


class PooledCounts(_Message, frozen=True):
    """What all replicas have counted, those that are gone included."""

    tag: int
    counts: Counts


class ActorStatus(msgspec.Struct, frozen=True, array_like=True):
    """One actor of the cell, as the router sees it.

    Attributes:
        num_restarts: New processes since the cell started, as far as its state was asked for.
    """

    actor_id: str
    role: str
    state: str
    node_id: str
    device: str
    rank: int
    load_progress: float
    memory_used_bytes: int
    memory_total_bytes: int
    started_at_s: float
    num_restarts: int = 0


class State(_Message, frozen=True):
    """The cell at this moment; what is counted is counted since it started.

    Attributes:
        loads: By attention rank.
        rows_LE: Rows per layer and logical expert.
        physical_to_logical: Logical expert of every physical slot, in rank order.
        seconds: By stage, over all ranks.
        num_resumed: Choices that went on after a loss.
    """

    tag: int
    epoch: int
    ready: bool
    actors: list[ActorStatus]
    loads: dict[int, ShardLoad]
    rows_LE: list[list[int]]
    physical_to_logical: list[int]
    rank_of_physical: list[int]
    seconds: dict[str, float]
    num_steps: int
    num_resumed: int = 0


# ---- an attention shard to an ingress


class StepEvents(_Message, frozen=True):
    """All that one step brought to one ingress's requests."""

    epoch: int
    rank: int
    events: list[TokenEvent]


Message = (
    RankHello
    | Proposal
    | StepDone
    | ExpertCounts
    | RankFailed
    | StepPlan
    | Assign
    | Cancel
    | EndThinking
    | AbortEpoch
    | IngressHello
    | Submit
    | CancelGeneration
    | EndThinkingGeneration
    | CountRequest
    | AskState
    | ReplicaCounts
    | AskCounts
    | Keys
    | Members
    | Accepted
    | Rejected
    | RequestCounted
    | ControlDone
    | PooledCounts
    | State
    | StepEvents
)

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Message to msgpack bytes."""
    return _ENCODER.encode(message)


def decode(data: bytes | memoryview) -> Message:
    """A message from msgpack bytes.

    Raises:
        msgspec.DecodeError: The bytes are no message of this version.
    """
    return _DECODER.decode(data)
