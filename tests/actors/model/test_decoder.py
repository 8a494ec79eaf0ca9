"""The decoder against transformers: chunkings, batch mixes, attention forms, far positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from model_rig import ModelRig, load_oracle, make_progress, oracle_logits, relative_error

from ostro.actors.engine.request import SamplingParams
from ostro.actors.model import attention
from ostro.actors.model.sampler import Sampler, SamplingRow

TOLERANCE = 1e-4
NEAR_8192 = 8192 - 40
BEYOND_65536 = 65536 + 5000


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=3)


@pytest.fixture(scope="module")
def oracle(directory: Path) -> Any:
    torch.set_num_threads(1)
    return load_oracle(directory)


def some_tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 1000, (count,), generator=generator).tolist()


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_logits_equal_transformers_for_every_chunking(
    directory: Path, oracle: Any, chunk: int, num_micro_batches: int
) -> None:
    tokens = some_tokens(130)
    rig = ModelRig(directory, num_micro_batches=num_micro_batches, num_expert_shards=3)
    found = rig.logits_in_chunks(tokens, chunk)
    assert relative_error(found, oracle_logits(oracle, tokens)) < TOLERANCE


@pytest.mark.parametrize("offset", [NEAR_8192, BEYOND_65536])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_logits_equal_transformers_at_far_positions(
    directory: Path, oracle: Any, chunk: int, offset: int
) -> None:
    tokens = some_tokens(90, seed=1)
    rig = ModelRig(directory, position_offset=offset)
    found = rig.logits_in_chunks(tokens, chunk)
    assert relative_error(found, oracle_logits(oracle, tokens, offset)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, NEAR_8192, BEYOND_65536])
@pytest.mark.parametrize("chunk", [1, 7, 64, 600, 4000])
def test_logits_equal_transformers_up_to_position_2000(
    directory: Path, oracle: Any, chunk: int, offset: int
) -> None:
    tokens = some_tokens(2001, seed=2)
    rig = ModelRig(directory, position_offset=offset)
    found = rig.logits_in_chunks(tokens, chunk)
    assert relative_error(found, oracle_logits(oracle, tokens, offset)) < TOLERANCE


@pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "expanded"])
def test_either_attention_form_gives_the_logits(
    directory: Path, oracle: Any, absorbed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "absorbed_is_cheaper", lambda *_, **__: absorbed)
    tokens = some_tokens(100, seed=3)
    found = ModelRig(directory).logits_in_chunks(tokens, 45)
    assert relative_error(found, oracle_logits(oracle, tokens)) < TOLERANCE


def test_both_attention_forms_are_chosen_by_the_rule(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []
    rule = attention.absorbed_is_cheaper

    def recording(*args: int, **sizes: int) -> bool:
        chosen.append(rule(*args, **sizes))
        return chosen[-1]

    monkeypatch.setattr(attention, "absorbed_is_cheaper", recording)
    ModelRig(directory).logits_in_chunks(some_tokens(100), 20)
    assert set(chosen) == {False, True}


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_mixed_batches_give_each_request_its_own_logits(
    directory: Path, oracle: Any, num_micro_batches: int
) -> None:
    rig = ModelRig(directory, num_micro_batches=num_micro_batches, num_expert_shards=2)
    lengths, chunks = (60, 37, 90, 5), (1, 9, 40, 2)
    prompts = [some_tokens(length, seed=length) for length in lengths]
    requests = [make_progress(str(i), prompt) for i, prompt in enumerate(prompts)]
    rows: list[list[torch.Tensor]] = [[] for _ in requests]
    while waiting := [i for i, r in enumerate(requests) if r.num_computed_tokens < lengths[i]]:
        counts = [min(chunks[i], lengths[i] - requests[i].num_computed_tokens) for i in waiting]
        entries = [rig.entry(requests[i], n) for i, n in zip(waiting, counts, strict=True)]
        for i, part in zip(waiting, rig.step_all_rows(entries).split(counts), strict=True):
            rows[i].append(part)
    for prompt, parts in zip(prompts, rows, strict=True):
        assert relative_error(torch.cat(parts), oracle_logits(oracle, prompt)) < TOLERANCE


def test_greedy_tokens_equal_generate(directory: Path, oracle: Any) -> None:
    prompts = [some_tokens(12, seed=8), some_tokens(30, seed=9)]
    expected = [
        oracle.generate(
            torch.tensor([prompt]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=11,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    rig = ModelRig(directory, num_micro_batches=2)
    requests = [make_progress(str(i), prompt) for i, prompt in enumerate(prompts)]
    for _ in range(24):
        entries = [rig.entry(r, r.num_tokens - r.num_computed_tokens) for r in requests]
        for request, token in zip(requests, rig.step(entries).argmax(-1).tolist(), strict=True):
            request.output_token_ids.append(token)
    assert [request.output_token_ids for request in requests] == expected


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_sampled_tokens_do_not_depend_on_the_rest_of_the_batch(
    directory: Path, num_micro_batches: int
) -> None:
    def sampled(companions: list[int]) -> list[int]:
        rig = ModelRig(directory, num_micro_batches=num_micro_batches, num_expert_shards=2)
        sampler = Sampler(rig.config.vocab_size)
        params = SamplingParams(temperature=1.0, top_p=0.95, seed=11)
        requests = [
            make_progress(str(i), some_tokens(length, seed=i), sampling=params)
            for i, length in enumerate(companions)
        ]
        mine = make_progress("mine", some_tokens(9, seed=99), sampling=params)
        requests.insert(len(requests) // 2, mine)
        for _ in range(12):
            counts = [min(r.num_tokens - r.num_computed_tokens, 16) for r in requests]
            entries = [rig.entry(r, n) for r, n in zip(requests, counts, strict=True)]
            drawing = [entry.progress for entry in entries if entry.samples]
            rows = [SamplingRow(progress=r, position=r.num_tokens) for r in drawing]
            for r, token in zip(drawing, sampler.sample(rig.step(entries), rows), strict=True):
                r.output_token_ids.append(token.token_id)
        return mine.output_token_ids

    alone = sampled([])
    assert len(set(alone)) > 6
    assert sampled([3, 40, 17, 80]) == alone
    assert sampled([1, 1, 1, 1, 1, 1, 1]) == alone


def test_only_the_last_token_of_a_finished_chunk_is_sampled(directory: Path) -> None:
    rig = ModelRig(directory, num_micro_batches=2)
    first, second = make_progress("a", some_tokens(10)), make_progress("b", some_tokens(20))
    logits = rig.step([rig.entry(first, 10), rig.entry(second, 15)])
    assert logits.shape == (1, rig.config.vocab_size)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_empty_micro_batches_are_exchanged_too(directory: Path, num_tokens: int) -> None:
    rig = ModelRig(directory, num_micro_batches=2)
    progress = make_progress("a", some_tokens(1))
    entries = [rig.entry(progress, 1)] if num_tokens else []
    assert rig.step(entries).shape == (num_tokens, rig.config.vocab_size)
    assert rig.exchange.num_dispatches == 2 * rig.config.num_layers


def test_bfloat16_stays_near_float32(directory: Path) -> None:
    tokens = some_tokens(40)
    exact = ModelRig(directory).logits_in_chunks(tokens, 16)
    found = ModelRig(directory, dtype=torch.bfloat16).logits_in_chunks(tokens, 16)
    # Rounding moves the gate's near-ties now and then, so single rows may differ more.
    error_T = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error_T.median() < 0.1


def test_seconds_cover_every_stage(directory: Path) -> None:
    rig = ModelRig(directory)
    rig.logits_in_chunks(some_tokens(4), 4)
    assert set(rig.decoder.seconds) == {
        "attention",
        "gate",
        "dispatch",
        "shared",
        "combine",
        "head",
    }
    assert min(rig.decoder.seconds.values()) > 0.0


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_logits_on_cuda_equal_those_on_cpu(directory: Path, chunk: int) -> None:
    tokens = some_tokens(90)
    expected = ModelRig(directory).logits_in_chunks(tokens, 30)
    found = ModelRig(directory, device="cuda", num_micro_batches=2).logits_in_chunks(tokens, chunk)
    assert relative_error(found.cpu(), expected) < TOLERANCE
