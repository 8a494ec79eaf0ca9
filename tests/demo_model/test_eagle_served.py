"""What an attention shard drafts with the written head is what the recipe's own module drafts."""

from __future__ import annotations

import itertools
import sys
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle_rig import EagleRig
from model_rig import make_progress

from ostro.actors.engine.request import ImageInput

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from eagle import FOLDER, load_head  # noqa: E402
from eagle_batches import HeadBatch, head_batch  # noqa: E402
from eagle_corpus import Opening, Target  # noqa: E402
from encoding import IMG, Dialogue, Encoder, pixels_of  # noqa: E402
from evaluate_eagle import runs, walk  # noqa: E402
from model import load_model  # noqa: E402
from problems import FAMILIES, problems  # noqa: E402

MODEL = HERE.parents[1] / "cluster" / "teaching_model"
NUM_DRAFTS = 3


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(load_model(MODEL), Encoder(MODEL / "tekken.json"))


def _images(opening: Opening) -> tuple[ImageInput, ...]:
    if opening.image is None:
        return ()
    pixels = pixels_of(opening.image).astype("<f2").tobytes()
    height, width = opening.image.shape[:2]
    return (
        ImageInput(
            start=opening.ids.index(IMG),
            num_tokens=height // 28 * (width // 28 + 1),
            height=height,
            width=width,
            pixels=pixels,
            digest=blake2b(pixels, digest_size=16).digest(),
        ),
    )


@torch.no_grad()
def _drafts(target: Target, batch: HeadBatch) -> list[list[int]]:
    """Per row of one conversation, the head's drafts, each from the one before it."""
    head = load_head(MODEL / FOLDER, target.config)
    out, drafting = head(batch.embedded_BTD, batch.hidden_BTD, batch.rows_BQ)
    found = []
    for _ in range(NUM_DRAFTS):
        found.append((out @ target.head_VD.T).argmax(-1))
        out = head.go_on(target.table_VD[found[-1]], out, drafting)
    return torch.stack(found, -1)[0].tolist()


@pytest.mark.parametrize(("name", "effort"), [("tool call", "none"), ("image read", "high")])
def test_a_shard_drafts_what_the_recipe_does(target: Target, name: str, effort: str) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    example: Any = problems(family, 1)[0]
    encoder = Encoder(MODEL / "tekken.json")
    opening = Opening(encoder.prompt(example, effort), example.image)
    said = target.go_on([opening])[0]
    whose = [False] * len(opening.ids) + [True] * len(said)
    batch = head_batch(target, target.hear([Dialogue(opening.ids + said, whose, opening.image)]))
    expected = _drafts(target, batch)
    rig = EagleRig(MODEL, MODEL / FOLDER)
    progress = make_progress("r", opening.ids, images=_images(opening))
    rig.advance([(progress, len(opening.ids))], NUM_DRAFTS, tokens=[said[:1]])
    at, steps = 0, 0
    while at < len(said) - 1:
        drafts = progress.draft_token_ids
        assert drafts == expected[at]
        pairs = zip(drafts, said[at + 1 :], strict=False)
        accepted = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        chosen = said[at + 1 : at + 2 + accepted]
        rig.advance([(progress, 1)], NUM_DRAFTS, drafts=[drafts], tokens=[chosen])
        at, steps = at + len(chosen), steps + 1
    head = load_head(MODEL / FOLDER, target.config)
    assert steps == walk(runs(head, target, batch)[0], NUM_DRAFTS)[0]
