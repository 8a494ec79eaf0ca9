"""`ostro check`: a report about small checkpoints on this machine; nothing is started."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import checkpoint_variants
import pytest
from certificates import Authority
from checkpoints import make_tiny_checkpoint
from typer.testing import CliRunner

from ostro.actors.model.random_checkpoint import TINY, write_random_head
from ostro.cluster.cli import app
from ostro.configs.model import load_model_config


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("model"), with_tokenizer=True)


@pytest.fixture(autouse=True)
def without_ray_address(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def ports(free_port) -> list[str]:
    return ["--http-port", str(free_port()), "--grpc-port", str(free_port())]


def check(model_dir: Path, *options: str):
    return CliRunner().invoke(app, ["check", "--model", str(model_dir), *options])


def test_check_tells_checkpoint_ranks_and_that_it_fits(model_dir, ports):
    result = check(model_dir, *ports)
    assert result.exit_code == 0, result.output
    assert "Mistral4ForCausalLM, 3 layers, 4 of 16 experts per token" in result.stdout
    assert "tensors in f32" in result.stdout
    assert "complete" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if " expert " in line]
    assert [row[:3] for row in rows if row[0] in "12"] == [
        ["1", "expert", "8"],
        ["2", "expert", "8"],
    ]
    assert result.stdout.rstrip().endswith("It fits.")


def test_check_obeys_set(model_dir, ports):
    result = check(model_dir, *ports, "--set", "layout.num_expert_shards=3")
    assert "split, 1 attention + 3 expert shards" in result.stdout


def test_check_tells_what_an_fp8_cache_takes(model_dir, ports):
    result = check(model_dir, *ports, "--set", "engine.latent_cache_dtype=fp8")
    assert result.exit_code == 0, result.output
    assert "192 B per token in FP8" in result.stdout
    wrong = check(model_dir, *ports, "--set", "engine.latent_cache_dtype=int8")
    assert wrong.exit_code == 2
    assert "latent_cache_dtype='int8': must be 'auto' or 'fp8'" in wrong.output


def drafting_with(head: Path) -> list[str]:
    return ["--set", f"engine.speculation={{method: eagle, draft_model: {head}}}"]


def test_check_counts_a_draft_head(model_dir, ports, tmp_path):
    write_random_head(tmp_path / "head", TINY, load_model_config(model_dir))
    result = check(model_dir, *ports, *drafting_with(tmp_path / "head"))
    assert result.exit_code == 0, result.output
    told = " ".join(result.stdout.split())
    assert "drafts up to 3 tokens a step by a trained head, as many as pay" in told
    assert "2 layers, 506 KiB on every attention shard and 384 B of its cache" in told
    assert "960 B per token" in result.stdout  # 576 without


def test_check_takes_the_head_that_a_model_brings_and_misses_none(ports, tmp_path):
    model_dir = make_tiny_checkpoint(tmp_path, with_tokenizer=True)
    told = " ".join(check(model_dir, *ports).stdout.split())
    assert "drafts none: the model brings no head; engine.speculation.method=ngram" in told
    write_random_head(tmp_path / "eagle", TINY, load_model_config(model_dir))
    result = check(model_dir, *ports)
    assert result.exit_code == 0, result.output
    told = " ".join(result.stdout.split())
    assert "drafts up to 3 tokens a step by a trained head" in told
    assert "/eagle: 2 layers, 506 KiB on every attention shard" in told
    result = check(model_dir, *ports, "--set", "engine.speculation=null")
    assert "drafts none; engine.speculation.method=auto takes" in " ".join(result.stdout.split())


def test_check_tells_why_a_draft_head_does_not_fit(model_dir, ports, tmp_path):
    other = replace(load_model_config(model_dir), hidden_size=128)
    write_random_head(tmp_path / "head", TINY, other)
    result = check(model_dir, *ports, *drafting_with(tmp_path / "head"))
    assert result.exit_code == 1
    told = " ".join(result.output.split())
    assert "dim: is 128, and the model's hidden_size is 64" in told


def test_check_fails_where_a_port_is_taken(model_dir, free_port):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        taken = server.getsockname()[1]
        options = ["--http-port", str(taken), "--grpc-port", str(free_port())]
        result = check(model_dir, *options)
    assert result.exit_code == 1
    assert f"port {taken} on 127.0.0.1 is taken" in result.stdout


def test_check_names_the_tensor_that_a_checkpoint_lacks(tmp_path, ports):
    directory = make_tiny_checkpoint(tmp_path)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    result = check(directory, *ports)
    assert result.exit_code == 1
    assert "truncated" in result.stdout


def test_check_fails_where_the_memory_does_not_suffice(model_dir, ports):
    result = check(model_dir, *ports, "--set", "engine.num_pages=100000000")
    assert result.exit_code == 1
    assert "lower engine.num_pages" in " ".join(result.stdout.split())


def test_check_fails_for_a_preset_of_gpus_that_are_not_here(model_dir):
    result = CliRunner().invoke(app, ["check", "multinode", "--model", str(model_dir)])
    assert result.exit_code == 1
    assert "16 ranks with a GPU each" in result.stdout


def test_check_tells_that_a_gpu_serves_fp8_as_it_is_stored(tmp_path, ports):
    plain = make_tiny_checkpoint(tmp_path / "plain", num_layers=1, dtype="bfloat16")
    fp8 = checkpoint_variants.write_variant(plain, tmp_path / "fp8", "hf", "fp8")
    on_gpu = check(fp8, *ports, "--set", "layout.device=cuda").stdout
    assert "cuda, bfloat16 with fp8 weights" in " ".join(on_gpu.split())
    on_cpu = check(fp8, *ports, "--set", "layout.device=cpu").stdout
    assert "fp8 weights" not in on_cpu


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["labtop"], "did you mean laptop"),
        (["--model", "/nowhere"], "no such checkpoint directory"),
        (["--set", "layout.shards=3"], "layout.shards: unknown key"),
        (["--http-port", "70000"], "must be in 1..65535"),
    ],
)
def test_check_tells_bad_options_in_one_line(arguments, told):
    result = CliRunner().invoke(app, ["check", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert told in result.stderr
    assert result.stderr.count("\n") == 1


def test_check_tells_where_images_may_be_fetched_from(model_dir, ports):
    def told(*options):
        result = check(model_dir, *ports, *options)
        assert result.exit_code == 0, result.output
        return " ".join(result.stdout.split())

    hosts = "--set=serving.image_fetch.allowed_hosts"
    assert "fetched over https" not in told()
    assert "fetched over https from any public host" in told(f"{hosts}=['*']")
    named = told(f"{hosts}=[a.com, '*.b.org']")
    assert "images fetched over https from a.com, any under b.org" in named


@pytest.fixture
def tls_options(tmp_path):
    pair = Authority(tmp_path).issue("server", "llm.example.com")
    files = {"cert_file": pair.cert, "key_file": pair.key}
    return [f"--set=serving.tls.{name}={file}" for name, file in files.items()]


def test_check_tells_whom_the_certificate_is_for_and_whom_not(model_dir, ports, tls_options):
    result = check(model_dir, *ports, *tls_options)
    assert result.exit_code == 0, result.output
    told = " ".join(result.stdout.split())
    assert "certificate for llm.example.com, valid until" in told
    assert "clients that call 127.0.0.1 refuse it" in told


def test_check_fails_for_a_certificate_that_cannot_be_read(model_dir, ports, tls_options):
    result = check(model_dir, *ports, *tls_options, "--set=serving.tls.key_file=/no/such.key")
    assert result.exit_code == 1
    assert "serving.tls.key_file=/no/such.key: cannot be read" in " ".join(result.stdout.split())
