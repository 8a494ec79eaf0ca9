"""Contexts cut into chunks of keys, each by its own length alone."""

from __future__ import annotations

import pytest
import torch

from ostro.kernels.gpu.decode_chunks import chunk_keys, cut_chunks, most_chunks


def test_cut_chunks_worked_example() -> None:
    chunks = cut_chunks([[7, 5], [9]], [300, 3], 256)
    assert chunks.pages_G.tolist() == [7, 5, 9]
    assert chunks.chunk_X4.tolist() == [[0, 0, 256, 0], [0, 256, 300, 1], [1, 0, 3, 2]]
    assert chunks.first_T1.tolist() == [0, 2, 3]


def test_cut_chunks_depend_on_no_other_request() -> None:
    table = list(range(70_000 // 64 + 1))
    alone = cut_chunks([table], [70_000], 64).chunk_X4
    beside = cut_chunks([[0], table, table], [5, 70_000, 600], 64).chunk_X4
    assert torch.equal(beside[beside[:, 0] == 1][:, 1:3], alone[:, 1:3])


@pytest.mark.parametrize("length", [0, 1, 256, 2_048, 2_049, 16_384, 16_385, 262_144])
def test_chunks_cover_a_context_and_are_no_more_than_the_most(length: int) -> None:
    table = list(range(length // 64 + 1))
    chunks = cut_chunks([table, table], [length, 1], 64)
    start, stop = chunks.chunk_X4[:-1, 1].tolist(), chunks.chunk_X4[:-1, 2].tolist()
    assert [*start, length] == [0, *stop]
    assert len(start) <= most_chunks(max(length, 1))
    assert all(end - begin <= chunk_keys(length) for begin, end in zip(start, stop, strict=True))


def test_most_chunks_worked_example() -> None:
    assert most_chunks(2_048) == 8
    assert most_chunks(2_500) == 8
    assert most_chunks(262_144) == 256


def test_cut_chunks_refuses_chunks_whose_pages_a_program_does_not_hold() -> None:
    with pytest.raises(ValueError, match="keys_at_once=2048"):
        cut_chunks([[0]], [5], 64, 2048)
