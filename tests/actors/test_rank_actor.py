"""A rank by itself, without a router."""

from __future__ import annotations

import pytest

from ostro.actors.expert_shard import ExpertShard
from ostro.actors.fabric.channel import ChannelError
from ostro.actors.fabric.placement import initial_placement
from ostro.actors.rank import EpochSpec, RankSpec
from ostro.configs.load import load_deployment


def test_a_rank_knows_the_latest_epoch_though_it_never_formed(tmp_path) -> None:
    """A router that takes over asks for it, and gives no number twice."""
    shard = ExpertShard(host="127.0.0.1", node_id="n")
    assert shard.health().epoch is None
    shard._spec = RankSpec(
        rank=0,
        model_dir="",
        deployment=load_deployment("laptop_single"),
        placement=initial_placement(4, [0], 0),
        device="cpu",
        dtype="float32",
    )
    nobody = EpochSpec(
        epoch=7,
        store_host="127.0.0.1",
        store_port=1,
        router_address=f"unix:{tmp_path}/nobody",
        secret=b"secret",
    )
    with pytest.raises(ChannelError):
        shard.join(nobody)
    shard.leave()
    assert shard.health().epoch == 7
