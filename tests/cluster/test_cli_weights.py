"""`ostro weights`: a checkpoint told and turned, in words that a user can act on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import checkpoint_variants
import pytest
from checkpoints import make_tiny_checkpoint
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ostro.actors.model.random_checkpoint import TINY, TINY_VISION, write_random_head
from ostro.cluster.cli import app
from ostro.configs.model import load_model_config


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return make_tiny_checkpoint(
        tmp_path_factory.mktemp("plain"),
        with_tokenizer=True,
        num_layers=1,
        num_experts=4,
        vision=TINY_VISION,
        dtype="bfloat16",
    )


@pytest.fixture
def fp8(plain: Path, tmp_path: Path) -> Path:
    return checkpoint_variants.write_variant(plain, tmp_path / "fp8", "mistral", "fp8")


def weights(*arguments: str | Path):
    return CliRunner().invoke(app, ["weights", *map(str, arguments)])


def rows(output: str) -> dict[str, list[str]]:
    """The table's cells by the title of their row."""
    titles = ("routed experts", "shared experts", "attention", "embedding and head", "together")
    lines = [line.strip() for line in output.splitlines()]
    return {
        title: line.removeprefix(title).split()
        for title in titles
        for line in lines
        if line.startswith(title)
    }


def test_inspect_tells_what_a_draft_head_is(plain, tmp_path):
    head = tmp_path / "head"
    write_random_head(head, TINY, load_model_config(plain))
    result = weights("inspect", head)
    assert result.exit_code == 0, result.output
    assert "a draft head of 2 layers without experts, for a model of hidden size 64 and" in (
        result.stdout
    )
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["feed-forward", "f32", "6", "73.7", "K", "288", "KiB"] in lines
    assert "experts per token" not in result.stdout


def test_inspect_tells_why_a_draft_head_would_not_load(plain, tmp_path):
    head = tmp_path / "head"
    write_random_head(head, TINY, load_model_config(plain))
    file = head / "consolidated.safetensors"
    tensors = load_file(file)
    tensors["layers.2.ffn_norm.weight"] = tensors.pop("layers.1.ffn_norm.weight")
    save_file(tensors, file)
    result = weights("inspect", head)
    assert result.exit_code == 1
    assert "1 missing:" in result.stdout
    assert "1 unknown:" in result.stdout
    assert "layers.2.ffn_norm.weight" in result.stdout


def test_inspect_tells_layout_precision_and_sizes(fp8):
    result = weights("inspect", fp8)
    assert result.exit_code == 0, result.output
    assert "Mistral's own layout, Mistral3ForConditionalGeneration" in result.stdout
    assert "1 layers, 4 of 4 experts per token, images and text" in result.stdout
    assert "params.json declares fp8 with scales for inputs; 1 files" in result.stdout
    cells = rows(result.stdout)
    # 4 experts of 3 matrices of 32 x 64, each with two scales of two bytes
    assert cells["routed experts"] == ["fp8", "36", "24.6", "K", "24", "KiB"]
    assert cells["embedding and head"][:2] == ["bf16", "2"]
    assert result.stdout.rstrip().endswith("It would load.")


def test_inspect_lists_what_is_missing_unknown_and_amiss(fp8):
    file = fp8 / "consolidated.safetensors"
    tensors = load_file(file)
    del tensors["norm.weight"]
    tensors["surprise"] = tensors["layers.0.attention.wo.qscale_act"].clone()
    tensors["layers.0.gate.weight"] = tensors["layers.0.gate.weight"][:3].contiguous()
    save_file(tensors, file)
    result = weights("inspect", fp8)
    assert result.exit_code == 1
    for told in (
        "1 missing:\n  norm.weight\n",
        "1 unknown:\n  consolidated.safetensors: surprise\n",
        "1 not as the config says:\n  consolidated.safetensors: layers.0.gate.weight is [3, 64]",
        "It would not load.",
    ):
        assert told in result.stdout


def test_inspect_shortens_long_lists_unless_told_otherwise(fp8):
    params = fp8 / "params.json"
    params.write_text(json.dumps({**json.loads(params.read_text()), "n_layers": 2}))
    short, long = weights("inspect", fp8), weights("inspect", fp8, "--all")
    assert "and 15 more; --all lists them" in short.stdout
    assert "  layers.1.experts.3.w3.weight\n" in long.stdout
    assert "more" not in long.stdout


def test_inspect_tells_of_the_other_layout(fp8, plain):
    for name in ("config.json", "model.safetensors"):
        (fp8 / name).write_bytes((plain / name).read_bytes())
    result = weights("inspect", fp8)
    assert "Hugging Face's layout is here too and is not read; move params.json" in result.stdout


def test_inspect_tells_of_a_truncated_file(fp8):
    file = fp8 / "consolidated.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    result = weights("inspect", fp8)
    assert result.exit_code == 1
    assert "truncated" in result.stdout


def test_convert_writes_a_checkpoint_that_loads(fp8, plain, tmp_path):
    (fp8 / "tekken.json").write_bytes((plain / "tekken.json").read_bytes())
    target = tmp_path / "bf16"
    result = weights("convert", fp8, target, "--layout", "hf", "--precision", "bf16")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{target}: bf16, Hugging Face's layout, ")
    assert (target / "tekken.json").is_file()
    told = weights("inspect", target)
    assert told.exit_code == 0
    assert "config.json declares bf16; 1 files" in told.stdout


def test_convert_keeps_what_it_is_not_told_to_change(fp8, tmp_path):
    result = weights("convert", fp8, tmp_path / "same")
    assert result.exit_code == 0, result.output
    found = load_file(tmp_path / "same" / "consolidated.safetensors")
    assert found.keys() == load_file(fp8 / "consolidated.safetensors").keys()


def test_convert_cuts_at_the_size_asked_for(plain, tmp_path):
    options = ("--precision", "fp8", "--max-shard-gb", "0.001")
    big = make_tiny_checkpoint(tmp_path / "big", hidden=256, dtype="bfloat16")
    assert weights("convert", big, tmp_path / "out", *options).exit_code == 0
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["inspect", "/nowhere"], 2, "no such checkpoint directory"),
        (["convert", "/nowhere", "/tmp/there"], 2, "no such checkpoint directory"),
        (["convert", "SRC", "SRC"], 1, "exists and is not empty; name a new directory"),
        (["convert", "SRC", "SRC/config.json/out"], 1, "out: cannot be written: "),
    ],
)
def test_weights_tells_mistakes_in_one_line(plain, arguments, code, told):
    result = weights(*[argument.replace("SRC", str(plain)) for argument in arguments])
    assert result.exit_code == code
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert told in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_convert_leaves_nothing_when_interrupted(plain, tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    result = weights("convert", plain, tmp_path / "out")
    assert result.exit_code == 130
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) is before


def test_weights_refuses_a_precision_that_it_does_not_know(plain, tmp_path):
    result = weights("convert", plain, tmp_path / "out", "--precision", "int4")
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()
