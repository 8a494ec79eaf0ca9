"""Read safetensors checkpoints slice by slice: headers at open, then only the bytes asked for.

Every file is checked against its own header when the reader is made, so that a truncated or corrupt
checkpoint is named before any memory is taken. Knows no model: tensors are names, shapes, bytes.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ostro.actors.errors import CheckpointError
from ostro.configs.checkpoint_layout import CheckpointLayout, find_layout, other_layout

# The number of bytes of memory just filled, in the dtype asked for.
ReadProgress = Callable[[int], None]

_MAX_HEADER_BYTES = 100_000_000  # the format's own bound
_CHUNK_BYTES = 64 * 2**20  # staging buffer of a read that also converts or uploads

_DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}
_ITEM_BYTES = {
    name: size
    for size, names in (
        (1, "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0"),
        (2, "U16 I16 F16 BF16"),
        (4, "U32 I32 F32"),
        (8, "U64 I64 F64"),
    )
    for name in names.split()
}


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where one tensor lies; `offset` counts from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class CheckpointReader:
    """The tensors of one checkpoint directory, by name.

    Holds no file open and no tensor data; safe to share between threads except for `bytes_read`.

    Args:
        directory: Holds `model.safetensors`, or an index with its shards; or, in Mistral's layout,
            the same under `consolidated`, where shards need no index.

    Raises:
        CheckpointError: A file is missing, truncated or corrupt, or a tensor stands twice; the
            text names file and tensor.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bytes_read = 0
        self._entries: dict[str, _Entry] = {}
        self.layout = find_layout(directory)
        for file, promised in _checkpoint_files(directory, self.layout).items():
            entries = _read_header(file)
            for name in promised:
                if name not in entries:
                    index = self.layout.index_name
                    raise CheckpointError(
                        f"{file}: tensor {name} is missing, though {index} places it here"
                    )
            for name, entry in entries.items():
                if name in self._entries:
                    raise CheckpointError(
                        f"{file}: tensor {name} stands in {self._entries[name].file.name} too"
                    )
                self._entries[name] = entry

    def names(self) -> Sequence[str]:
        """All tensor names, in file order."""
        return list(self._entries)

    def file(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self._entry(name).file

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._entry(name).shape

    def num_bytes(self, name: str) -> int:
        """The tensor's size in the file."""
        return self._entry(name).num_bytes

    def dtype_name(self, name: str) -> str:
        """The tensor's dtype as the file spells it, for example "BF16"; served or not."""
        return self._entry(name).dtype

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype in the file.

        Raises:
            CheckpointError: No such tensor, or a dtype that is not served.
        """
        entry = self._entry(name)
        if entry.dtype not in _DTYPES:
            raise CheckpointError(
                f"{entry.file}: tensor {name} is {entry.dtype}; served are {', '.join(_DTYPES)}"
            )
        return _DTYPES[entry.dtype]

    def read(
        self,
        name: str,
        *,
        rows: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        progress: ReadProgress | None = None,
    ) -> torch.Tensor:
        """Read a tensor, or some rows (indices on axis 0) of it; no other byte is touched.

        Args:
            name: The tensor.
            rows: Which rows, in the order wanted; repeats are allowed. None reads all.
            dtype: Converted to this; None keeps the file's.
            device: Uploaded in chunks, so that at most 64 MiB is staged on the host.
            progress: Called after each chunk.

        Returns:
            A new contiguous tensor of the caller's.

        Raises:
            CheckpointError: No such tensor or row, an unserved dtype, or the file shrank.
        """
        shape = self.shape(name) if rows is None else (len(rows), *self.shape(name)[1:])
        out = torch.empty(shape, dtype=dtype or self.dtype(name), device=device)
        self.read_into(out, name, rows=rows, progress=progress)
        return out

    def read_into(
        self,
        out: torch.Tensor,
        name: str,
        *,
        rows: Sequence[int] | None = None,
        progress: ReadProgress | None = None,
    ) -> None:
        """As `read`, into memory that is there: contiguous, of the shape that `read` would give."""
        entry = self._entry(name)
        stored = self.dtype(name)
        row_bytes = entry.num_bytes // max(entry.shape[0], 1) if entry.shape else entry.num_bytes
        if entry.num_bytes == 0 or out.numel() == 0:
            return
        out_rows = out if entry.shape else out.view(1)
        direct = out.dtype == stored and out.device.type == "cpu"
        with _open(entry.file) as file:
            done = 0
            for start, count in _chunks(self._runs(name, rows), row_bytes):
                target = out_rows[done : done + count]
                stage = target if direct else torch.empty(target.shape, dtype=stored)
                _read_exactly(file, entry, start * row_bytes, stage)
                if not direct:
                    target.copy_(stage)
                done += count
                self.bytes_read += count * row_bytes
                if progress is not None:
                    progress(target.nbytes)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self.directory}: tensor {name} is missing")
        return self._entries[name]

    def _runs(self, name: str, rows: Sequence[int] | None) -> Iterator[tuple[int, int]]:
        """(first row, number of rows) of each run of rows that lie side by side."""
        shape = self._entry(name).shape
        num_rows = shape[0] if shape else 1
        if rows is None:
            yield 0, num_rows
            return
        if not shape or any(not 0 <= row < num_rows for row in rows):
            raise CheckpointError(f"{self.file(name)}: tensor {name} has no such rows: {rows}")
        start = 0
        for i in range(1, len(rows) + 1):
            if i == len(rows) or rows[i] != rows[i - 1] + 1:
                yield rows[start], i - start
                start = i


def _chunks(runs: Iterator[tuple[int, int]], row_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut runs into pieces of at most `_CHUNK_BYTES`, but of one row at least."""
    step = max(1, _CHUNK_BYTES // max(row_bytes, 1))
    for start, count in runs:
        for first in range(start, start + count, step):
            yield first, min(step, start + count - first)


@contextmanager
def _open(file: Path) -> Iterator[io.FileIO]:
    """Open unbuffered; what the system refuses, then or at any read, is told with the file."""
    try:
        with file.open("rb", buffering=0) as stream:
            yield stream
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error


def _read_exactly(file: io.FileIO, entry: _Entry, offset: int, out: torch.Tensor) -> None:
    view = out.view(-1).view(torch.uint8).numpy().data
    file.seek(entry.offset + offset)
    while len(view):
        count = file.readinto(view)  # unbuffered, so it may be short
        if not count:
            raise CheckpointError(f"{entry.file}: ended early; did it change while it was read?")
        view = view[count:]


def _checkpoint_files(directory: Path, layout: CheckpointLayout) -> dict[Path, list[str]]:
    """Each file with the tensors that the index promises in it (none without an index)."""
    single = directory / f"{layout.weights_stem}.safetensors"
    if single.is_file():
        return {single: []}
    index = directory / layout.index_name
    if not index.is_file():
        return _files_without_index(directory, layout)
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        placed = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: no readable weight_map: {error!r}") from error
    files: dict[Path, list[str]] = {}
    for name, file in placed.items():
        if Path(file).name != file:
            raise CheckpointError(f"{index}: tensor {name} is placed outside the directory: {file}")
        files.setdefault(directory / file, []).append(name)
    for path, names in files.items():
        if not path.is_file():
            raise CheckpointError(
                f"{path}: missing; {index.name} places {names[0]} in it{_way_out(directory)}"
            )
    return files


def _files_without_index(directory: Path, layout: CheckpointLayout) -> dict[Path, list[str]]:
    """Mistral's shards say in their names how many they are, so no index is needed."""
    stem = layout.weights_stem
    shards = {path.name: path for path in sorted(directory.glob(f"{stem}-*-of-*.safetensors"))}
    if shards and layout is CheckpointLayout.HUGGING_FACE:
        raise CheckpointError(f"{directory / layout.index_name}: missing, but there are shards")
    if not shards:
        raise CheckpointError(
            f"{directory}: neither {stem}.safetensors nor {layout.index_name} is here"
        )
    total = next(iter(shards)).removesuffix(".safetensors").rpartition("-of-")[2]
    wanted = [
        f"{stem}-{part:05}-of-{total}.safetensors"
        for part in range(1, int(total) + 1 if total.isdecimal() else 1)
    ]
    if wanted != list(shards):
        raise CheckpointError(
            f"{directory}: shards {sorted(set(wanted) ^ set(shards))} are missing or of another "
            f"set; without {layout.index_name} all {total} must be here and no other"
            f"{_way_out(directory)}"
        )
    return {path: [] for path in shards.values()}


def _way_out(directory: Path) -> str:
    """What to do about a broken layout where the other one stands beside it."""
    other = other_layout(directory)
    if other is None:
        return ""
    taken = find_layout(directory).config_name
    return f"; {other.config_name} and its weights are here too: move {taken} away to use them"


def _read_header(file: Path) -> dict[str, _Entry]:
    """Parse a safetensors header and hold the file's length against it."""
    with _open(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8) or b""
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes > min(_MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{file}: corrupt or truncated header ({size} bytes in all)")
        raw = stream.read(header_bytes) or b""
    try:
        header = json.loads(raw, object_pairs_hook=_unique_pairs)
        header.pop("__metadata__", None)
        start = 8 + header_bytes
        entries = {name: _parse_entry(file, start, value) for name, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: corrupt header: {error}") from error
    _check_extents(file, size, start, entries)
    return entries


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"tensor {key} stands twice")
        values[key] = value
    return values


def _parse_entry(file: Path, start: int, value: dict[str, Any]) -> _Entry:
    begin, end = (int(offset) for offset in value["data_offsets"])
    shape = tuple(int(n) for n in value["shape"])
    if any(n < 0 for n in shape):
        raise ValueError(f"negative shape {shape}")
    return _Entry(file, str(value["dtype"]), shape, start + begin, end - begin)


def _check_extents(file: Path, size: int, start: int, entries: dict[str, _Entry]) -> None:
    """Tensors must lie side by side, each as long as its shape says, up to the file's end."""
    expected = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        item_bytes = _ITEM_BYTES.get(entry.dtype)
        if entry.offset != expected or entry.num_bytes < 0:
            raise CheckpointError(f"{file}: corrupt header: tensor {name} overlaps or leaves a gap")
        if item_bytes is not None and entry.num_bytes != math.prod(entry.shape) * item_bytes:
            raise CheckpointError(
                f"{file}: corrupt header: tensor {name} is {entry.dtype} {list(entry.shape)} "
                f"but {entry.num_bytes} bytes long"
            )
        expected += entry.num_bytes
        if expected > size:
            raise CheckpointError(
                f"{file}: truncated: {size} bytes, but tensor {name} ends at byte {expected}"
            )
    if expected != size:
        raise CheckpointError(f"{file}: {size - expected} bytes follow the last tensor")
