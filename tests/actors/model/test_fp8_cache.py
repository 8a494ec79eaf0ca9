"""The whole model over a cache of FP8 rows: near the plain one, and the same however it is cut."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import torch
from model_rig import ModelRig, make_progress, relative_error
from safetensors.torch import load_file, save_file

from ostro.actors.model import attention
from ostro.actors.model.attention import Attention
from ostro.kernels.latent_cache import FP8_ROWS

TOKENS = torch.randint(3, 1000, (90,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=3)


def _logits(directory: Path, chunk: int = 45, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rig = ModelRig(directory, dtype=dtype, cache_dtype=FP8_ROWS)
    return rig.logits_in_chunks(TOKENS, chunk)


def _mean_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_fp8_rows_change_the_logits_a_little(directory: Path) -> None:
    plain = ModelRig(directory).logits_in_chunks(TOKENS, 45)
    assert 1e-3 < _mean_error(_logits(directory), plain) < 0.08


@pytest.mark.parametrize("chunk", [1, 7, 90])
def test_every_chunking_reads_the_same_rows(directory: Path, chunk: int) -> None:
    assert relative_error(_logits(directory, chunk), _logits(directory)) < 1e-4


@pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "expanded"])
def test_either_attention_form_gives_the_logits(
    directory: Path, absorbed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _logits(directory)
    monkeypatch.setattr(attention, "absorbed_is_cheaper", lambda *_, **__: absorbed)
    assert relative_error(_logits(directory), expected) < 1e-4


def test_a_model_in_bfloat16_takes_fp8_rows_beside_its_cpu_operators(directory: Path) -> None:
    rig = ModelRig(directory, dtype=torch.bfloat16)
    plain = rig.logits_in_chunks(TOKENS, 45)
    assert 1e-3 < _mean_error(_logits(directory, dtype=torch.bfloat16), plain) < 0.08


def test_small_norm_weights_cost_no_precision(directory: Path, tmp_path: Path) -> None:
    """What e4m3 would lose of small values: here they are of unit size, in every checkpoint."""
    smaller = tmp_path / "smaller"
    smaller.mkdir()
    for file in directory.iterdir():
        if file.suffix != ".safetensors":
            (smaller / file.name).write_bytes(file.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    for name, values in tensors.items():
        if "kv_a_layernorm" in name:
            values.mul_(2.0**-10)
        elif "kv_b_proj" in name:
            values.mul_(2.0**10)
    save_file(tensors, smaller / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(_logits(smaller), _logits(directory))


def test_weights_serve_a_second_cache(directory: Path) -> None:
    """The norm's weight moves to the heads once, and a plain cache may come after it."""
    rig = ModelRig(directory, cache_dtype=FP8_ROWS)
    weights = rig.decoder._weights
    again = Attention(rig.config, weights.layers, rig.cache)
    first = rig.logits_in_chunks(TOKENS, 45)
    rig.decoder._attention = again
    assert torch.equal(rig.logits_in_chunks(TOKENS, 45), first)


def test_a_page_is_used_again_without_a_trace_of_its_last_owner(directory: Path) -> None:
    rig = ModelRig(directory, cache_dtype=FP8_ROWS, num_pages=8)
    first = rig.logits_in_chunks(TOKENS[:60], 60)
    pages = make_progress("next", TOKENS[:9])
    pages.pages.extend(range(8))
    second = rig.step_all_rows([rig.entry(pages, 9)])
    torch.testing.assert_close(second, first[:9], rtol=1e-4, atol=1e-4)
