"""CheckpointReader: only the bytes asked for, and every kind of damage named at open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ostro.actors.errors import CheckpointError
from ostro.actors.model import checkpoint
from ostro.actors.model.checkpoint import CheckpointReader

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "experts": torch.randn(8, 3, 5, generator=generator),
        "half": torch.randn(6, 4, generator=generator).to(torch.bfloat16),
        "norm": torch.randn(4, generator=generator).to(torch.float16),
        "scalar": torch.tensor(3.5),
    }


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return _tensors()


@pytest.fixture
def directory(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, tmp_path / _FILE)
    return tmp_path


def _write_raw(file: Path, header: Any, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def test_read_gives_what_was_saved(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    reader = CheckpointReader(directory)
    assert set(reader.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == tensor.dtype
        assert torch.equal(reader.read(name), tensor)


@pytest.mark.parametrize("rows", [[2], [0, 1, 2], [5, 6, 1], [7, 3, 3, 4], list(range(8)), []])
def test_read_rows_gives_them_in_the_order_asked(
    directory: Path, tensors: dict[str, torch.Tensor], rows: list[int]
) -> None:
    read = CheckpointReader(directory).read("experts", rows=rows)
    assert torch.equal(read, tensors["experts"][rows])


def test_read_touches_only_the_rows_asked_for(directory: Path) -> None:
    reader = CheckpointReader(directory)
    told: list[int] = []
    reader.read("experts", rows=[1, 2, 6], progress=told.append)
    row_bytes = 3 * 5 * 4
    assert reader.bytes_read == 3 * row_bytes
    assert told == [2 * row_bytes, row_bytes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_read_converts(
    directory: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    read = CheckpointReader(directory).read("half", rows=[4, 0], dtype=dtype)
    assert torch.equal(read, tensors["half"][[4, 0]].to(dtype))


def test_read_in_many_chunks_gives_the_same(
    directory: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", 100)  # less than two rows of `experts`
    read = CheckpointReader(directory).read("experts", dtype=torch.float64)
    assert torch.equal(read, tensors["experts"].double())


@pytest.mark.parametrize("rows", [[8], [-1]])
def test_read_names_the_tensor_of_a_row_that_is_not_there(directory: Path, rows: list[int]) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor experts has no such"):
        CheckpointReader(directory).read("experts", rows=rows)


def test_read_names_a_tensor_that_is_not_there(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="tensor nothing is missing"):
        CheckpointReader(directory).read("nothing")


def test_read_tells_when_the_file_shrank_meanwhile(directory: Path) -> None:
    reader = CheckpointReader(directory)
    data = (directory / _FILE).read_bytes()
    (directory / _FILE).write_bytes(data[:-300])
    with pytest.raises(CheckpointError, match="ended early"):
        [reader.read(name) for name in reader.names()]


def test_file_that_the_system_refuses_is_named(directory: Path) -> None:
    reader = CheckpointReader(directory)
    (directory / _FILE).unlink()
    (directory / _FILE).mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: Is a dir"):
        reader.read(reader.names()[0])


def test_native_shard_that_is_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "consolidated-00001-of-00001.safetensors").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"-of-00001\.safetensors: cannot be read: No such"):
        CheckpointReader(tmp_path)


def test_shards_are_read_through_the_index(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    _save_sharded(tmp_path, tensors)
    reader = CheckpointReader(tmp_path)
    assert reader.file("half").name == "model-00002-of-00002.safetensors"
    for name, tensor in tensors.items():
        assert torch.equal(reader.read(name), tensor)


def _save_sharded(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({"experts": tensors["experts"]}, directory / first)
    rest = {name: tensor for name, tensor in tensors.items() if name != "experts"}
    save_file(rest, directory / second)
    placed = {"experts": first} | dict.fromkeys(rest, second)
    (directory / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def test_missing_shard_is_named_with_a_tensor_of_it(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    _save_sharded(tmp_path, tensors)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: missing.* half"):
        CheckpointReader(tmp_path)


def test_tensor_that_the_index_misplaces_is_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    _save_sharded(tmp_path, tensors)
    index = json.loads((tmp_path / _INDEX).read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (tmp_path / _INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00001-of.*: tensor ghost is missing"):
        CheckpointReader(tmp_path)


def test_tensor_in_two_shards_is_named(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    _save_sharded(tmp_path, tensors)
    save_file(tensors, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor \w+ stands in model-00001-of-00002"):
        CheckpointReader(tmp_path)


def test_shard_outside_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / _INDEX).write_text('{"weight_map": {"x": "../model.safetensors"}}')
    with pytest.raises(CheckpointError, match="tensor x is placed outside the directory"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_broken_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / _INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: no readable weight_map"):
        CheckpointReader(tmp_path)


def test_truncated_file_names_the_first_tensor_beyond_its_end(tmp_path: Path) -> None:
    header = {
        name: {"dtype": "F32", "shape": [4], "data_offsets": [start, start + 16]}
        for name, start in (("a", 0), ("b", 16), ("c", 32))
    }
    _write_raw(tmp_path / _FILE, header, bytes(20))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated: .* tensor b ends"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 8, 40])
def test_file_cut_within_its_header_is_named(directory: Path, kept: int) -> None:
    (directory / _FILE).write_bytes((directory / _FILE).read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: corrupt or truncated header"):
        CheckpointReader(directory)


_GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (b"{nonsense", "corrupt header"),
        (b"[]", "corrupt header"),
        (b"\xff\xff", "corrupt header"),
        (b"[" * 100_000, "corrupt header"),
        ({"a": 3}, "corrupt header"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "data_offsets"),
        ({"a": {**_GOOD, "data_offsets": [0]}}, "corrupt header"),
        ({"a": {**_GOOD, "shape": [-2]}}, "negative shape"),
        ({"a": {**_GOOD, "shape": [3]}}, r"tensor a is F32 \[3\] but 8 bytes long"),
        ({"a": {**_GOOD, "data_offsets": [4, 12]}}, "tensor a overlaps or leaves a gap"),
        ({"a": _GOOD, "b": {**_GOOD, "data_offsets": [4, 12]}}, "tensor b overlaps"),
        ({"a": {**_GOOD, "data_offsets": [0, -8]}}, "tensor a overlaps"),
        ({}, "8 bytes follow the last tensor"),
        (
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
            b' "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
            "tensor a stands twice",
        ),
    ],
)
def test_corrupt_header_is_named(tmp_path: Path, header: Any, told: str) -> None:
    _write_raw(tmp_path / _FILE, header, bytes(8))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{told}"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("dtype", ["F8_E5M2", "I8", "F4"])
def test_unserved_dtype_is_named_when_it_is_asked_for(tmp_path: Path, dtype: str) -> None:
    header = {"w": {"dtype": dtype, "shape": [8], "data_offsets": [0, 8]}}
    _write_raw(tmp_path / _FILE, header, bytes(8))
    reader = CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError, match=f"tensor w is {dtype}; served are BF16"):
        reader.read("w")


def test_directory_without_a_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither"):
        CheckpointReader(tmp_path)


def test_native_shards_are_read_without_an_index(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    for part, name in enumerate(tensors, 1):
        save_file({name: tensors[name]}, tmp_path / f"consolidated-0000{part}-of-00004.safetensors")
    reader = CheckpointReader(tmp_path)
    assert reader.file("half").name == "consolidated-00002-of-00004.safetensors"
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("stray", [None, "consolidated-00003-of-00003.safetensors"])
def test_native_shards_that_are_no_whole_set_are_told(
    tmp_path: Path, tensors: dict[str, torch.Tensor], stray: str | None
) -> None:
    save_file(tensors, tmp_path / "consolidated-00002-of-00002.safetensors")
    missing = "consolidated-00001-of-00002.safetensors"
    if stray is not None:
        save_file(tensors, tmp_path / missing)
        save_file(tensors, tmp_path / stray)
    with pytest.raises(CheckpointError, match=rf"shards .*{stray or missing}.* are missing or of"):
        CheckpointReader(tmp_path)


def test_native_index_is_obeyed(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "consolidated-a.safetensors")
    placed = dict.fromkeys(tensors, "consolidated-a.safetensors")
    index = tmp_path / "consolidated.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    assert set(CheckpointReader(tmp_path).names()) == set(tensors)


def test_broken_native_layout_tells_of_the_other_one(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    save_file(tensors, tmp_path / _FILE)
    save_file(tensors, tmp_path / "consolidated-00001-of-00002.safetensors")
    for name in ("config.json", "params.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json and .* move params\.json away"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8], ids=str)
def test_quantised_values_are_read_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(24, dtype=torch.uint8).view(4, 6).view(dtype)
    save_file({"w": values}, tmp_path / _FILE)
    read = CheckpointReader(tmp_path).read("w", rows=[3, 1])
    assert read.dtype == dtype
    assert torch.equal(read.view(torch.uint8), values.view(torch.uint8)[[3, 1]])


def test_shards_without_an_index_are_told(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"index\.json: missing, but there are shards"):
        CheckpointReader(tmp_path)


@pytest.mark.gpu
def test_read_uploads(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    read = CheckpointReader(directory).read("half", rows=[1, 3], dtype=torch.float32, device="cuda")
    assert torch.equal(read.cpu(), tensors["half"][[1, 3]].float())
