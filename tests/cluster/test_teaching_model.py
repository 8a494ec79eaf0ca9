"""The checkpoint that ships here: whole, honest about itself, the same as in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_rig import (
    ModelRig,
    load_image_oracle,
    make_progress,
    oracle_image_logits,
    oracle_logits,
    relative_error,
)
from pictures import digit_picture

from ostro.actors.model.draft_head import find_draft_head
from ostro.actors.model.weights import check_checkpoint
from ostro.cluster.cli_deployment import read_deployment
from ostro.cluster.generation import ChatMessage, ImageFile
from ostro.cluster.model_card import make_card
from ostro.cluster.model_paths import resolve_model
from ostro.cluster.prompt import PromptBuilder
from ostro.configs.model import load_model_config
from ostro.kernels.latent_cache import FP8_ROWS

MODEL = resolve_model("embedded")


def test_it_is_a_checkpoint_like_any_other_and_small() -> None:
    config = check_checkpoint(MODEL)
    assert (config.num_experts, config.num_experts_per_token, config.num_shared_experts) == (
        128,
        4,
        1,
    )
    assert config.vision is not None
    assert (MODEL / "model.safetensors").stat().st_size <= 15_000_000


def test_it_goes_by_its_own_name_and_says_what_it_is() -> None:
    deployment = read_deployment("laptop", (), model=None)
    card = make_card(MODEL, check_checkpoint(MODEL), deployment, weight_dtype="bfloat16")
    assert card.name == "ostro-teaching-7m"
    assert "teaching model" in card.description
    assert "not Mistral Small 4" in card.description


def test_its_thinking_budgets_are_its_own_and_rise_with_effort() -> None:
    efforts = read_deployment("laptop", (), model=None).reasoning.efforts
    budgets = [efforts[name].budget_tokens for name in ("none", "minimal", "low", "medium")]
    assert budgets == sorted(budgets)
    assert efforts["high"].budget_tokens is None
    with_other_weights = read_deployment("laptop", (), model="/nowhere").reasoning.efforts
    assert with_other_weights["low"].budget_tokens == 2048


def test_its_tokenizer_declares_the_efforts_of_the_real_one() -> None:
    declared = json.loads((MODEL / "tekken.json").read_bytes())["model_settings_builder"]
    assert declared["reasoning_effort"]["values"] == ["none", "high"]


def test_transformers_loads_it_with_nothing_missing_or_left() -> None:
    from transformers import Mistral3ForConditionalGeneration

    _, info = Mistral3ForConditionalGeneration.from_pretrained(MODEL, output_loading_info=True)
    assert not any(info.values()), info


@pytest.fixture(scope="module")
def oracle() -> Any:
    return load_image_oracle(MODEL)


@pytest.fixture(scope="module")
def prompts() -> PromptBuilder:
    return PromptBuilder(MODEL, read_deployment("laptop", (), model=None).reasoning)


def test_its_logits_are_those_of_transformers(oracle: Any, prompts: PromptBuilder) -> None:
    question = ChatMessage(role="user", text="What is 47 * 26?")
    tokens = prompts.chat([question], [], "high").token_ids
    working = prompts.text("47*26: 6*7=42", add_bos=False)
    tokens += [prompts.special.begin_think or 0, *working]
    found = ModelRig(MODEL, num_expert_shards=2).logits_in_chunks(tokens, 7)
    assert relative_error(found, oracle_logits(oracle, tokens)) < 1e-4


def test_its_logits_are_those_of_transformers_on_a_picture(
    oracle: Any, prompts: PromptBuilder
) -> None:
    shown = ImageFile(data=digit_picture("4207"), where="")
    question = ChatMessage(role="user", text="Read the digits.", images=(shown,))
    prompt = prompts.chat([question], [], "none")
    found = ModelRig(MODEL, num_expert_shards=2).logits_in_chunks(
        prompt.token_ids, 7, tuple(prompt.images)
    )
    expected = oracle_image_logits(oracle, prompt.token_ids, prompt.images)
    assert relative_error(found, expected) < 1e-4


def _greedy(rig: ModelRig, prompt: list[int], most: int) -> list[int]:
    progress = make_progress("r", prompt)
    while len(progress.output_token_ids) < most:
        new = progress.num_tokens - progress.num_computed_tokens
        token_id = int(rig.step([rig.entry(progress, new)])[0].argmax())
        progress.output_token_ids.append(token_id)
        if token_id in rig.config.eos_token_ids:
            break
    return progress.output_token_ids


@torch.inference_mode()
def test_an_fp8_cache_changes_few_of_its_tokens(prompts: PromptBuilder) -> None:
    """Answers over float32 rows, judged token by token over FP8 rows: all stay the likeliest."""
    plain, fp8 = ModelRig(MODEL), ModelRig(MODEL, cache_dtype=FP8_ROWS)
    kept, errors = [], []
    for text in ("What is 47 * 26?", "Add 45, 67 and 89.", "Say hello."):
        question = ChatMessage(role="user", text=text)
        prompt = prompts.chat([question], [], "high").token_ids
        answer = _greedy(plain, prompt, 60)
        tokens, said = [*prompt, *answer[:-1]], torch.tensor(answer)[:, None]
        plain_TV, fp8_TV = (
            rig.logits_in_chunks(tokens, 64)[-len(answer) :].log_softmax(-1) for rig in (plain, fp8)
        )
        kept.append(fp8_TV.argmax(-1) == plain_TV.argmax(-1))
        errors.append((fp8_TV - plain_TV).gather(1, said).abs())
    assert torch.cat(kept).float().mean() > 0.95
    assert 1e-5 < torch.cat(errors).mean() < 0.02


@pytest.mark.parametrize(
    ("named", "path"),
    [
        ("embedded", MODEL / "eagle"),
        ("heads/mine", Path.cwd() / "heads/mine"),
        ("~/mine", Path.home() / "mine"),
    ],
)
def test_a_deployment_names_its_draft_head_as_it_names_its_model(named: str, path: Path) -> None:
    drafting = f"engine.speculation={{method: eagle, draft_model: {named}}}"
    speculation = read_deployment("laptop", [drafting], model=None).engine.speculation
    assert speculation is not None
    assert speculation.draft_model == str(path)


def test_the_embedded_models_head_fits_it() -> None:
    assert find_draft_head(MODEL / "eagle", load_model_config(MODEL)).config.num_layers >= 1
