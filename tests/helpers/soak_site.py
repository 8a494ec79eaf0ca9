"""Where a soak's clients call, as whom, and what they say there."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import grpc
import httpx

from ostro.protos import cluster_pb2_grpc, generation_pb2_grpc

# In every prompt, tool, schema and stop string: no log may have it.
CANARY = "quuxzanzibar"
REQUEST_TIMEOUT_S = 240.0  # of the slowest request on the slowest machine; more is a hang
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_SHARED = "Every keeper counts the lamps twice before the night begins. " * 12
_QUESTIONS = (
    "What is 38 + 45 + 61?",
    "What is 847 * 26?",
    "The ball is under cup 2. Swap cups 2 and 4. Swap cups 1 and 3. Where is the ball?",
    "What is the weather in Paris?",
    "Hello",
    "What is the capital of France?",
)
SCHEMA = {
    "type": "object",
    "properties": {
        "right": {"type": "boolean"},
        CANARY: {"enum": [1, 2, 3]},
    },
    "required": ["right", CANARY],
    "additionalProperties": False,
}
TOOL = {
    "name": f"get_{CANARY}",
    "description": f"Tells the {CANARY} of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


@dataclass
class Site:
    """One deployment and one caller's dice.

    Attributes:
        keys: Of callers who may ask anything.
        poor_key: Of a tenant whose quota is soon spent.
        pictures: Files that the model can read.
    """

    http_port: int
    grpc_port: int
    http: httpx.AsyncClient
    channel: grpc.aio.Channel
    keys: tuple[str, ...]
    poor_key: str
    pictures: tuple[bytes, ...]
    dice: random.Random
    generation: generation_pb2_grpc.GenerationServiceStub = field(init=False)
    cluster: cluster_pb2_grpc.ClusterServiceStub = field(init=False)

    def __post_init__(self) -> None:
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.cluster = cluster_pb2_grpc.ClusterServiceStub(self.channel)

    def key(self) -> str:
        return self.dice.choice(self.keys)

    def headers(self, key: str | None = None) -> dict[str, str]:
        return {"authorization": f"Bearer {key or self.key()}"}

    def metadata(self, key: str | None = None) -> list[tuple[str, str]]:
        return list(self.headers(key).items())

    def question(self) -> str:
        """A question with the canary in it; every third shares a long prefix with others."""
        text = f"{self.dice.choice(_QUESTIONS)} {CANARY} {self.dice.randrange(10_000)}"
        return _SHARED + text if self.dice.random() < 0.3 else text

    def name(self) -> str:
        return f"soak-{self.dice.getrandbits(48):x}"

    def chance(self, probability: float) -> bool:
        return self.dice.random() < probability
