"""The whole model on prompts with images: equal to transformers however the prompt is cut."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import checkpoints
import pictures
import pytest
import torch
from model_rig import (
    ModelRig,
    load_image_oracle,
    make_progress,
    oracle_image_logits,
    relative_error,
)

from ostro.actors.model.random_checkpoint import TINY_VISION

TOLERANCE = 2e-5
# Two images with text before, between and behind them; 12 is text that looks like a line's end.
TOKENS, IMAGES = pictures.prompt_of(
    [
        *(1, 100, 101, 102, 12),
        pictures.make_image(84, 56, seed=1),
        *(103, 104),
        pictures.make_image(28, 112, seed=2),
        pictures.make_image(28, 28, seed=3),
        *(105, 106, 107, 108),
    ]
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    return checkpoints.make_tiny_checkpoint(directory, num_layers=2, vision=TINY_VISION)


@pytest.fixture(scope="module")
def oracle(directory: Path) -> Any:
    return load_image_oracle(directory)


@pytest.fixture(scope="module")
def expected(oracle: Any) -> torch.Tensor:
    return oracle_image_logits(oracle, TOKENS, IMAGES)


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("chunk", [*range(1, 13), len(TOKENS)])
def test_logits_equal_those_of_transformers_for_every_chunking(
    directory: Path, expected: torch.Tensor, chunk: int, num_micro_batches: int
) -> None:
    rig = ModelRig(directory, page_size=4, num_micro_batches=num_micro_batches)
    found = rig.logits_in_chunks(TOKENS, chunk, IMAGES)
    assert relative_error(found, expected) < TOLERANCE


def test_an_image_changes_what_the_model_says(directory: Path, expected: torch.Tensor) -> None:
    other = pictures.make_image(84, 56, seed=9)
    changed = (pictures.prompt_of([0] * IMAGES[0].start + [other])[1][0], *IMAGES[1:])
    found = ModelRig(directory).logits_in_chunks(TOKENS, 7, changed)
    before = IMAGES[0].start
    assert relative_error(found[:before], expected[:before]) < TOLERANCE
    assert relative_error(found[before:], expected[before:]) > 100 * TOLERANCE


def test_requests_with_and_without_images_share_a_step(
    directory: Path, expected: torch.Tensor
) -> None:
    rig = ModelRig(directory, num_micro_batches=2)
    text = [1, 200, 201, 202, 203]
    alone = ModelRig(directory).logits_in_chunks(text, 5)
    steps = [rig.entry(make_progress("text", text), 5)]
    steps += [
        rig.entry(make_progress(name, TOKENS, images=IMAGES), len(TOKENS)) for name in ("a", "b")
    ]
    found = rig.step_all_rows(steps)
    assert relative_error(found[:5], alone) < TOLERANCE
    assert relative_error(found[5 : 5 + len(TOKENS)], expected) < TOLERANCE
    assert relative_error(found[5 + len(TOKENS) :], expected) < TOLERANCE


def test_each_image_is_encoded_once(directory: Path) -> None:
    rig = ModelRig(directory)
    for _ in range(2):
        rig.logits_in_chunks(TOKENS, 3, IMAGES)
    assert rig.decoder.images is not None
    assert rig.decoder.images.num_encoded == len(IMAGES)


def test_a_cache_too_small_for_any_image_changes_no_answer(
    directory: Path, expected: torch.Tensor
) -> None:
    rig = ModelRig(directory, image_cache_bytes=0, num_micro_batches=2)
    assert relative_error(rig.logits_in_chunks(TOKENS, 9, IMAGES), expected) < TOLERANCE


def test_recompute_after_preemption_gives_the_same_logits(
    directory: Path, expected: torch.Tensor
) -> None:
    rig = ModelRig(directory)
    progress = make_progress("r", TOKENS, images=IMAGES)
    rig.step([rig.entry(progress, 9)])
    progress.pages, progress.num_computed_tokens = array("i"), 0
    found = rig.step_all_rows([rig.entry(progress, len(TOKENS))])
    assert relative_error(found, expected) < TOLERANCE


def test_computing_goes_on_within_an_image_whose_first_tokens_are_cached(
    directory: Path, expected: torch.Tensor
) -> None:
    rig = ModelRig(directory, page_size=4)
    first = make_progress("first", TOKENS, images=IMAGES)
    rig.step([rig.entry(first, len(TOKENS))])
    second = make_progress("second", TOKENS, images=IMAGES)
    second.pages = first.pages[:2]  # 8 tokens, the last three of which are the first image's
    second.num_computed_tokens = 8
    found = rig.step_all_rows([rig.entry(second, len(TOKENS) - 8)])
    assert relative_error(found, expected[8:]) < TOLERANCE


def test_steps_without_images_encode_nothing(directory: Path) -> None:
    rig = ModelRig(directory)
    progress = make_progress("r", TOKENS, images=IMAGES, output=[300, 301])
    for count in (5, len(TOKENS) - 5, 1, 1):
        rig.step([rig.entry(progress, count)])
    assert rig.decoder.images is not None
    spent_s, encoded = rig.decoder.seconds["vision"], rig.decoder.images.num_encoded
    assert (spent_s > 0.0, encoded) == (True, 3)
    progress.output_token_ids.append(302)
    rig.step([rig.entry(progress, 1)])
    assert rig.decoder.seconds["vision"] == spent_s


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_logits_on_cuda_equal_those_on_cpu(directory: Path, chunk: int) -> None:
    expected = ModelRig(directory).logits_in_chunks(TOKENS, len(TOKENS), IMAGES)
    rig = ModelRig(directory, device="cuda", num_micro_batches=2)
    found = rig.logits_in_chunks(TOKENS, chunk, IMAGES)
    assert relative_error(found.cpu(), expected) < TOLERANCE
