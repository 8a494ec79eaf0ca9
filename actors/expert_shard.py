"""The routed experts of one rank."""

from __future__ import annotations

from pathlib import Path

from ostro.actors.expert_engine import ExpertEngine, ExpertParts
from ostro.actors.fabric.channel import SyncConnection
from ostro.actors.fabric.transport import ExpertServer
from ostro.actors.model.checkpoint import CheckpointReader
from ostro.actors.model.device import check_fp8, choose_precision, torch_dtype
from ostro.actors.model.experts import LocalExperts
from ostro.actors.model.stored_weights import match_tensors, stored_plain
from ostro.actors.model.weight_bytes import expert_bytes
from ostro.actors.model.weights import load_expert_weights
from ostro.actors.rank import EpochSpec, RankSpec
from ostro.actors.rank_actor import RankActor
from ostro.actors.rank_loop import Engine
from ostro.configs.model import ModelConfig


class ExpertShard(RankActor):
    """Serves rows with the experts of one GPU, or of one process on CPU.

    Remote surface: `start`, `join`, `leave`, `health` (see `RankActor`).
    """

    def __init__(self, *, host: str, node_id: str) -> None:
        super().__init__("expert", host=host, node_id=node_id)

    def _load(self, spec: RankSpec, config: ModelConfig) -> None:
        dtype, local = torch_dtype(spec.dtype), spec.placement.local_to_logical(spec.rank)
        precision = choose_precision(spec.device, config)
        check_fp8(spec.device, spec.deployment.engine, precision)
        reader = CheckpointReader(Path(spec.model_dir))
        self._status.bytes_to_load = expert_bytes(
            config,
            len(local),
            dtype,
            precision,
            plain=stored_plain(match_tensors(reader, config)),
        )
        weights = load_expert_weights(
            reader,
            config,
            local,
            device=spec.device,
            dtype=dtype,
            precision=precision,
            progress=self._status.count_bytes,
        )
        self._config = config
        self._experts = LocalExperts(config, weights)

    def _make_engine(
        self, spec: RankSpec, epoch: EpochSpec, connection: SyncConnection
    ) -> tuple[Engine, str | None]:
        server = ExpertServer(self._wiring(spec, self._config), self._experts.forward)
        parts = ExpertParts(
            rank=spec.rank,
            epoch=epoch.epoch,
            server=server,
            connection=connection,
            num_layers=self._config.num_layers,
            take_counts=self._experts.take_counts,
            counters=server.counters,
        )
        return ExpertEngine(parts), None
