"""How rows look on the wire: one message holds a header, expert ids, weights and rows.

    | header: 8 int32 | expert ids: int32 [R, K] | weights: float32 [R, K] | rows: [R, D] |

Rows come last, so that every part starts at a multiple of its own element size. Expert ids are
physical; -1 stands for none.

Shape letters: R rows, K experts per token, D hidden size.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

import torch

from ostro.actors.errors import TransportError

_HEADER = struct.Struct("=8i")
HEADER_BYTES = _HEADER.size
_ID_BYTES = 4
_WEIGHT_BYTES = 4
_SPARSE_FLAG = 1


@dataclass(frozen=True, slots=True)
class RowLayout:
    """What every rank of a cell knows about a row."""

    hidden_size: int
    num_experts_per_token: int
    dtype: torch.dtype

    def num_bytes(self, num_rows: int) -> int:
        """Size of a message."""
        ids_and_weights = self.num_experts_per_token * (_ID_BYTES + _WEIGHT_BYTES)
        return HEADER_BYTES + num_rows * (ids_and_weights + self.hidden_size * self.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class Header:
    """Which exchange a message belongs to, and how many rows it holds."""

    epoch: int
    step: int
    layer: int
    micro_batch: int
    num_rows: int
    sparse: bool

    def __str__(self) -> str:
        mode = "sparse" if self.sparse else "dense"
        return (
            f"epoch {self.epoch}, step {self.step}, layer {self.layer}, micro-batch "
            f"{self.micro_batch}, {self.num_rows} rows ({mode})"
        )

    def with_rows(self, num_rows: int) -> Header:
        """The same exchange with another number of rows."""
        return replace(self, num_rows=num_rows)

    def write(self, message: torch.Tensor) -> None:
        """Put the header at the start of a message's bytes."""
        values = (
            self.epoch,
            self.step,
            self.layer,
            self.micro_batch,
            self.num_rows,
            _SPARSE_FLAG if self.sparse else 0,
            0,
            0,
        )
        if message.is_cuda:
            message[:HEADER_BYTES].view(torch.int32).copy_(torch.tensor(values, dtype=torch.int32))
        else:
            _HEADER.pack_into(message.numpy().data, 0, *values)


def read_header(message: torch.Tensor) -> Header:
    """The header of a message's bytes; on CUDA this waits for the device."""
    raw = message[:HEADER_BYTES].cpu() if message.is_cuda else message
    epoch, step, layer, micro_batch, num_rows, flags, _, _ = _HEADER.unpack_from(raw.numpy().data)
    return Header(epoch, step, layer, micro_batch, num_rows, bool(flags & _SPARSE_FLAG))


def check_header(message: torch.Tensor, expected: Header, sender: int) -> None:
    """Refuse a message of another epoch, step, layer, micro-batch, mode or size.

    Raises:
        TransportError: Names the sender and both headers.
    """
    found = read_header(message)
    if found != expected:
        raise TransportError(
            f"rank {sender} sent rows of {found}; expected {expected}: stale rows are refused",
            peer=sender,
        )


@dataclass(frozen=True, slots=True)
class RowMessage:
    """A message's bytes and the tensors that lie in them."""

    raw: torch.Tensor
    expert_RK: torch.Tensor
    weight_RK: torch.Tensor
    rows_RD: torch.Tensor


class RowBuffer:
    """Memory for one message after another; grows, never shrinks.

    A message is valid until the next `rows()` of another size or with other contents.
    """

    def __init__(self, layout: RowLayout, device: torch.device) -> None:
        self._layout = layout
        self._bytes = torch.empty(0, dtype=torch.uint8, device=device)
        self._last: RowMessage | None = None

    def take(self, num_rows: int) -> RowMessage:
        """A message of so many rows, contents undefined; the same object while the size stays."""
        if self._last is not None and len(self._last.rows_RD) == num_rows:
            return self._last
        num_bytes = self._layout.num_bytes(num_rows)
        if self._bytes.numel() < num_bytes:
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8, device=self._bytes.device)
        self._last = self._cut(self._bytes[:num_bytes], num_rows)
        return self._last

    def _cut(self, message: torch.Tensor, num_rows: int) -> RowMessage:
        num_experts = self._layout.num_experts_per_token
        ids_end = HEADER_BYTES + num_rows * num_experts * _ID_BYTES
        weights_end = ids_end + num_rows * num_experts * _WEIGHT_BYTES
        return RowMessage(
            raw=message,
            expert_RK=message[HEADER_BYTES:ids_end].view(torch.int32).view(num_rows, num_experts),
            weight_RK=message[ids_end:weights_end].view(torch.float32).view(num_rows, num_experts),
            rows_RD=message[weights_end:]
            .view(self._layout.dtype)
            .view(num_rows, self._layout.hidden_size),
        )


class ReplyBuffer:
    """Memory for the rows that come back from one rank; grows, never shrinks."""

    def __init__(self, layout: RowLayout, device: torch.device) -> None:
        self._rows = torch.empty(0, layout.hidden_size, dtype=layout.dtype, device=device)

    def take(self, num_rows: int) -> torch.Tensor:
        """[R, D], contents undefined."""
        if len(self._rows) < num_rows:
            self._rows = self._rows.new_empty(num_rows, self._rows.shape[1])
        return self._rows[:num_rows]
