"""Tensors as one copy: each comes whole, wherever it stands, and the sender may go on at once."""

from __future__ import annotations

import torch

from ostro.actors.model.packed_copy import packed_bytes, packed_views, send_together

CPU = torch.device("cpu")
FORMS = [
    (torch.int64, (3,)),
    (torch.float32, (1,)),
    (torch.int32, (0,)),
    (torch.float64, (5, 5)),
    (torch.uint8, (65,)),
    (torch.bool, ()),
]


def test_packed_bytes_worked_example() -> None:
    assert packed_bytes(FORMS[:2]) == 128


def test_views_are_apart_and_aligned() -> None:
    memory_bytes = torch.zeros(packed_bytes(FORMS), dtype=torch.uint8)
    views = packed_views(memory_bytes, FORMS)
    assert [(view.dtype, tuple(view.shape)) for view in views] == FORMS
    assert all((view.data_ptr() - memory_bytes.data_ptr()) % 64 == 0 for view in views)
    for number, view in enumerate(views):
        view.fill_(number)
    for number, view in enumerate(views):
        assert torch.equal(view, torch.full_like(view, number))


def test_the_place_of_a_tensor_depends_on_those_before_it_alone() -> None:
    memory_bytes = torch.zeros(packed_bytes(FORMS), dtype=torch.uint8)
    some = packed_views(memory_bytes, [*FORMS[:3], (torch.float64, (2,))])
    views = packed_views(memory_bytes, FORMS)
    assert [view.data_ptr() for view in some[:2]] == [view.data_ptr() for view in views[:2]]
    assert some[3].data_ptr() == views[3].data_ptr()


def test_tensors_come_whole_and_are_copies() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randint(0, 2, shape, generator=generator).to(dtype) for dtype, shape in FORMS]
    tensors.append(torch.arange(12).view(3, 4).T)
    expected = [tensor.clone() for tensor in tensors]
    sent = send_together(tensors, CPU)
    for tensor in tensors:
        tensor.zero_()
    for found, wanted in zip(sent, expected, strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


def test_nothing_is_sent_as_nothing() -> None:
    assert send_together([], CPU) == []
