"""Write safetensors checkpoints as a stream: one file, or shards with an index where it is large.

What will be written is known beforehand, name by name; the values are made when their turn comes,
so that a checkpoint may be larger than memory.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Told the number of bytes just written.
WriteProgress = Callable[[int], None]

DTYPE_NAMES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def num_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorBatch:
    """Tensors that are made together, and so stand in one file.

    Attributes:
        specs: The tensors, in order.
        make: Gives their values in that order; one tensor may come in several pieces.
    """

    specs: tuple[TensorSpec, ...]
    make: Callable[[], Iterator[torch.Tensor]]

    def num_bytes(self) -> int:
        """Bytes of all values."""
        return sum(spec.num_bytes() for spec in self.specs)


def write_shards(
    directory: Path,
    stem: str,
    batches: Sequence[TensorBatch],
    *,
    max_shard_bytes: int,
    progress: WriteProgress,
) -> None:
    """Write `<stem>.safetensors`, or numbered shards and `<stem>.safetensors.index.json`.

    Args:
        directory: Where to; nothing of that name is there.
        stem: "model" or "consolidated".
        batches: All tensors.
        max_shard_bytes: A file is closed before it passes this; a batch is never cut.
        progress: Told of every piece written.

    Raises:
        ValueError: A batch made other bytes than its specs say.
    """
    shards = _cut(batches, max_shard_bytes)
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = directory / f"{stem}{part}.safetensors"
        _write_file(file, shard, progress)
        placed |= {spec.name: file.name for batch in shard for spec in batch.specs}
    if len(shards) > 1:
        total = sum(batch.num_bytes() for batch in batches)
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        text = json.dumps(index, indent=2) + "\n"
        (directory / f"{stem}.safetensors.index.json").write_text(text, encoding="ascii")


def write_header(file: io.BufferedWriter, specs: Sequence[TensorSpec]) -> None:
    """Write the header of a safetensors file whose tensors follow in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + spec.num_bytes()
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": [start, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode("ascii")
    raw += b" " * (-len(raw) % 8)  # the format wants the data aligned
    file.write(len(raw).to_bytes(8, "little") + raw)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor's values in order."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return flat.numpy().data


def _cut(batches: Sequence[TensorBatch], max_shard_bytes: int) -> list[list[TensorBatch]]:
    shards: list[list[TensorBatch]] = [[]]
    filled = 0
    for batch in batches:
        if shards[-1] and filled + batch.num_bytes() > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(batch)
        filled += batch.num_bytes()
    return shards


def _write_file(file: Path, batches: Sequence[TensorBatch], progress: WriteProgress) -> None:
    with file.open("wb") as stream:
        write_header(stream, [spec for batch in batches for spec in batch.specs])
        for batch in batches:
            written = 0
            for piece in batch.make():
                written += stream.write(tensor_bytes(piece))
                progress(piece.nbytes)
            if written != batch.num_bytes():
                names = ", ".join(spec.name for spec in batch.specs)
                raise ValueError(f"{names}: {written} bytes made, {batch.num_bytes()} promised")
        stream.flush()
        os.fsync(stream.fileno())
