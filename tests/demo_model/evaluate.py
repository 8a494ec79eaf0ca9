"""Ask a running cluster the held-out problems: `python evaluate.py --serve MODEL --out FILE`.

Every family, at every effort, over both faces, greedily; the same problems each time. Writes
`evaluation.json`, from which `report.py` makes the card's tables and the plot.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faces import Face, GrpcFace, HttpFace, ask_all
from problems import (
    EFFORTS,
    FAMILIES,
    SEED,
    Family,
    Reply,
    digits_right,
    is_right,
    is_valid_call,
    problems,
)
from rich.progress import Progress
from tasks import Example

_SWEPT = ("multiply", "sums", "cups", "image multiply")
_BUDGETS = (0, 16, 32, 48, 64, 96, 128, 192)
_SWEPT_COUNT = 100  # problems per budget, at most


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927)."""
    z, share = 1.96, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = z / (1 + z * z / count)
    spread *= math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - spread), min(1.0, middle + spread)


def _cell(examples: Sequence[Example], replies: Sequence[Reply]) -> dict[str, Any]:
    right = [is_right(*pair) for pair in zip(examples, replies, strict=True)]
    by_level: dict[str, list[bool]] = {}
    for example, is_one_right in zip(examples, right, strict=True):
        by_level.setdefault(example.level, []).append(is_one_right)
    count = len(examples)
    cell: dict[str, Any] = {
        "accuracy": sum(right) / count,
        "interval": wilson(sum(right), count),
        "count": count,
        "tokens": sum(reply.tokens for reply in replies) / count,
        "thinking_tokens": sum(reply.thinking_tokens for reply in replies) / count,
        "cut": sum(reply.ended_by == "budget" for reply in replies) / count,
        "levels": {level: [sum(rights), len(rights)] for level, rights in sorted(by_level.items())},
    }
    if examples[0].task == "image_read":
        cell["digits"] = digits_right(examples, replies)
    if any(example.calls for example in examples):
        pairs = zip(examples, replies, strict=True)
        cell["valid_calls"] = sum(is_valid_call(*pair) for pair in pairs) / count
    return cell


async def _evaluate(faces: Sequence[Face], count: int, families: Sequence[Family]) -> Any:
    cells: dict[str, Any] = {}
    sweep: dict[str, Any] = {}
    with Progress() as progress:
        bar = progress.add_task("families", total=len(families))
        for family in families:
            examples = problems(family, count)
            cells[family.name] = {
                "note": family.note,
                "memorised": family.memorised,
                "efforts": {
                    effort: await _both(faces, examples, effort, progress) for effort in EFFORTS
                },
            }
            if family.name in _SWEPT:
                sweep[family.name] = await _sweep(faces[0], examples[:_SWEPT_COUNT], progress)
            progress.advance(bar)
    return {"seed": SEED, "count": count, "families": cells, "budgets": sweep}


async def _both(
    faces: Sequence[Face], examples: Sequence[Example], effort: str, progress: Progress
) -> dict[str, Any]:
    """One cell per face, and in how many the two gave the same answer."""
    replies = [await ask_all(face, examples, effort, progress) for face in faces]
    cells = {face.name: _cell(examples, given) for face, given in zip(faces, replies, strict=True)}
    same = [
        len({(reply.text, reply.calls) for reply in pair}) == 1
        for pair in zip(*replies, strict=True)
    ]
    return {**cells, "same": sum(same) / len(same)}


async def _sweep(face: Face, examples: Sequence[Example], progress: Progress) -> dict[str, float]:
    """Accuracy at effort high by thinking budget."""
    found = {}
    for budget in _BUDGETS:
        replies = await ask_all(face, examples, "high", progress, budget)
        right = [is_right(*pair) for pair in zip(examples, replies, strict=True)]
        found[str(budget)] = sum(right) / len(right)
    return found


def main() -> None:
    """Evaluate and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", type=Path, help="start `ostro serve` on this checkpoint first")
    parser.add_argument("--http", default="http://127.0.0.1:8000/v1", help="without --serve")
    parser.add_argument("--grpc", default="127.0.0.1:9000", help="without --serve")
    parser.add_argument("--count", type=int, default=200, help="problems per cell")
    parser.add_argument("--families", default="", help="only these, by commas")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    chosen = [f for f in FAMILIES if not args.families or f.name in args.families.split(",")]

    async def run(http: str, grpc_address: str) -> Any:
        return await _evaluate([HttpFace(http), GrpcFace(grpc_address)], args.count, chosen)

    with _served(args) as (http, grpc_address):
        found = asyncio.run(run(http, grpc_address))
    args.out.write_text(json.dumps(found, indent=1) + "\n")


@contextmanager
def _served(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The faces' addresses; of a cluster of its own if one is to be started."""
    if args.serve is None:
        yield args.http, args.grpc
        return
    sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
    from served import Served

    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "serve.log"
        with Served(log, "laptop", "--model", str(args.serve)) as served:
            yield f"{served.url}/v1", served.grpc_address


if __name__ == "__main__":
    main()
