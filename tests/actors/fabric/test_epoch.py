"""Forming and leaving epochs, on real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from ostro.actors.errors import TransportError
from ostro.actors.fabric.epoch import Membership, host_store, join


def test_epochs_follow_each_other_without_leaking(ranks):
    num_ranks = 3

    def form() -> None:
        ranks.run_in_epoch(num_ranks, "join_only", world_size=num_ranks, timeout_s=20.0)

    def count() -> list[tuple[int, int]]:
        for rank in range(num_ranks):
            ranks.tell(rank, "count_descriptors")
        return [ranks.answer(rank) for rank in range(num_ranks)]

    form()  # the first may open what stays
    before = count()
    for _ in range(10):
        form()
    for (files_before, threads_before), (files, threads) in zip(before, count(), strict=True):
        assert files <= files_before + 1
        assert threads <= threads_before + 1


def test_epoch_of_any_size_follows_another(ranks):
    for num_ranks in (2, 4, 3):
        ranks.run_in_epoch(num_ranks, "join_only", world_size=num_ranks, timeout_s=20.0)


def test_join_names_the_ranks_that_did_not_come(ranks):
    ranks.ensure(2)
    epoch = ranks.next_epoch()
    for place, rank in enumerate((0, 2)):
        ranks.tell(
            place,
            "join_only",
            rank=rank,
            world_size=4,
            epoch=epoch,
            store_port=ranks.store_port,
            timeout_s=0.5,
        )
    for error in ranks.errors([0, 1]).values():
        assert str(error) == f"ranks 1, 3 did not come to epoch {epoch} within 0.5 s"
        assert error.peer == 1


def test_join_says_when_the_store_is_gone(free_port):
    membership = Membership(
        epoch=1,
        rank=0,
        world_size=2,
        store_host="127.0.0.1",
        store_port=free_port(),
        timeout_s=0.5,
    )
    with pytest.raises(TransportError, match="rank 0 cannot reach the store of epoch 1"):
        join(membership, "cpu", host="127.0.0.1")


def test_store_listens_on_its_own_interface_only():
    store = host_store("127.0.0.1")
    listening = [
        line.split()[1]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{store.port:04X}")
    ]
    assert listening == [f"0100007F:{store.port:04X}"]
