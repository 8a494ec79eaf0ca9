"""How many drafts of the head are right: `python evaluate_eagle.py --model DIR --out FILE`.

The held-out problems of `evaluate.py`, every family at every effort. The target answers greedily;
the head drafts at each of its positions from the target's own states, as a server has them; then
the answer is walked in steps of k drafts. No server runs: tokens do not depend on one.

Shape letters: B sequences, Q rows that draft, K drafts of a row.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from eagle import FOLDER, EagleHead, load_head
from eagle_batches import HeadBatch, drafts, head_batch
from eagle_corpus import Opening, Target
from encoding import Dialogue, Encoder
from export import BUDGETS
from model import load_model
from problems import EFFORTS, FAMILIES, SEED, problems
from rich.progress import track

MOST_DRAFTS, PLACES = 5, 3
_TOGETHER = 32  # answers


@torch.no_grad()
def runs(head: EagleHead, target: Target, batch: HeadBatch) -> list[list[int]]:
    """Per sequence and row, how many drafts in a row are what the target says."""
    run_BQ = torch.zeros_like(batch.rows_BQ)
    right_BQ = batch.is_row_BQ
    for draft in itertools.islice(drafts(head, batch), MOST_DRAFTS):
        token_BQ = (draft.out_BQD @ target.head_VD.T).argmax(-1)
        right_BQ = right_BQ & draft.made_BQ & (token_BQ == draft.token_BQ)
        run_BQ += right_BQ
    return [run[is_row].tolist() for run, is_row in zip(run_BQ, batch.is_row_BQ, strict=True)]


def walk(run: Sequence[int], num_drafts: int) -> tuple[int, list[tuple[int, int]]]:
    """Go through one answer in steps of so many drafts.

    Args:
        run: Per token of the answer but the last: how many of the drafts after it are right.
        num_drafts: Drafts per step.

    Returns:
        Steps, and per draft's place (right, made); a draft beyond the answer's end is not counted.

    Example:
        run [1, 0, 2, 1, 0], 1 draft: tokens 1 and 2 come at once, then 3 and 4, then 5: 3 steps.
    """
    at, steps, counts = 0, 0, [[0, 0] for _ in range(num_drafts)]
    while at < len(run):
        left = len(run) - at
        accepted = min(run[at], num_drafts)
        for place, count in enumerate(counts[:left]):
            count[0] += place < accepted
            count[1] += 1
        at += min(accepted + 1, left)
        steps += 1
    return steps, [(right, made) for right, made in counts]


def cell(answers: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Figures of some answers, each given as `walk`'s runs."""
    counts = [walk(run, PLACES)[1] for run in [[], *answers]]
    sums = [[sum(part) for part in zip(*place, strict=True)] for place in zip(*counts, strict=True)]
    num_tokens = sum(map(len, answers))
    return {
        "accepted": [round(right / made, 4) if made else None for right, made in sums],
        "tokens_per_step": [
            round(num_tokens / max(1, sum(walk(run, k)[0] for run in answers)), 3)
            for k in range(1, MOST_DRAFTS + 1)
        ],
        "tokens": num_tokens,
    }


def answered(
    head: EagleHead, target: Target, encoder: Encoder, asked: Sequence[Any], effort: str
) -> list[list[int]]:
    """Greedy answers at an effort, as `walk`'s runs; answers of one token are left out."""
    value = "none" if effort == "none" else "high"
    found: list[list[int]] = []
    for start in range(0, len(asked), _TOGETHER):
        openings = [
            Opening(encoder.prompt(example, value), example.image, BUDGETS.get(effort))
            for example in asked[start : start + _TOGETHER]
        ]
        dialogues = [
            Dialogue(
                opening.ids + said, [False] * len(opening.ids) + [True] * len(said), opening.image
            )
            for opening, said in zip(openings, target.go_on(openings), strict=True)
        ]
        found += runs(head, target, head_batch(target, target.hear(dialogues)))
    return [run for run in found if run]


def evaluate(model: Path, count: int) -> dict[str, Any]:
    """All families, efforts, and each effort over all families."""
    torch.set_num_threads(1)
    encoder = Encoder(model / "tekken.json")
    target = Target(load_model(model), encoder)
    head = load_head(model / FOLDER, target.config)
    every: dict[str, list[list[int]]] = {effort: [] for effort in EFFORTS}
    families: dict[str, Any] = {}
    for family in track(FAMILIES, "families"):
        asked = problems(family, count)
        by_effort = {effort: answered(head, target, encoder, asked, effort) for effort in EFFORTS}
        families[family.name] = {effort: cell(found) for effort, found in by_effort.items()}
        for effort, found in by_effort.items():
            every[effort] += found
    return {
        "seed": SEED,
        "count": count,
        "layers": len(head.layers),
        "inner": head.inner,
        "parameters": sum(parameter.numel() for parameter in head.parameters()),
        "families": families,
        "all": {effort: cell(found) for effort, found in every.items()},
    }


def main() -> None:
    """Evaluate and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint with its head")
    parser.add_argument("--count", type=int, default=40, help="problems per family and effort")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.write_text(json.dumps(evaluate(args.model, args.count), indent=1) + "\n")


if __name__ == "__main__":
    main()
