"""Model card and plot from what training and evaluation wrote: `python report.py --run DIR`."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluate_eagle import MOST_DRAFTS, PLACES
from export import BUDGETS, NAME
from plot import effort_plot
from problems import EFFORTS
from tool_tasks import KINDS

_PLOTTED = ("multiply", "sums", "cups", "image multiply")
_DIGITS = "image read"

_TEMPLATE = Path(__file__).with_name("card_template.md")
_EAGLE_TEMPLATE = Path(__file__).with_name("eagle_card_template.md")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _accuracy(families: dict[str, Any]) -> str:
    rows = []
    for name, family in families.items():
        cells = [family["efforts"][effort] for effort in EFFORTS]
        memorised = " (memorised)" if family["memorised"] else ""
        rows.append(
            [
                f"**{name}**: {family['note']}{memorised}",
                *(
                    f"{_percent(cell['HTTP']['accuracy'])} / {_percent(cell['gRPC']['accuracy'])}"
                    for cell in cells
                ),
                " / ".join(f"{cell['HTTP']['tokens']:.0f}" for cell in cells),
            ]
        )
    return _table(["family", *EFFORTS, "tokens"], rows)


def _levels(families: dict[str, Any]) -> str:
    rows = []
    for name in [*_PLOTTED, _DIGITS, "image read, free"]:
        efforts = families[name]["efforts"]
        for level in efforts["none"]["HTTP"]["levels"]:
            cells = [efforts[effort]["HTTP"]["levels"][level] for effort in EFFORTS]
            shares = " / ".join(f"{100 * right / count:.0f}" for right, count in cells)
            rows.append([f"{name}, {level}", str(cells[0][1]), shares])
    return _table(["family, level", "problems", "% right"], rows)


def _sweep(budgets: dict[str, dict[str, float]]) -> str:
    names = list(budgets)
    steps = list(next(iter(budgets.values())))
    rows = [[step, *(_percent(budgets[name][step]) for name in names)] for step in steps]
    return _table(["budget", *names], rows)


def _experts(layers: list[dict[str, Any]]) -> str:
    edges = layers[0]["edges"]
    spans = [f"{a:g}-{b:g}" for a, b in itertools.pairwise(edges)]
    spans[-1] = f"over {edges[-2]:g}"
    rows = [
        [
            str(index),
            *map(str, layer["experts"]),
            str(layer["dead"]),
            str(layer["min"]),
            str(layer["max"]),
        ]
        for index, layer in enumerate(layers)
    ]
    return _table(["layer", *spans, "dead (below 5 %)", "min", "max"], rows)


def _digits(families: dict[str, Any]) -> str:
    shares = [
        f"{name}: "
        + " / ".join(_percent(families[name]["efforts"][e]["HTTP"]["digits"]) for e in EFFORTS)
        for name in (_DIGITS, "image read, free")
    ]
    return "Single digits read right, none / low / high, HTTP: " + "; ".join(shares) + "."


def _tool_calls(families: dict[str, Any]) -> str:
    shares = [
        f"{name}: "
        + " / ".join(_percent(family["efforts"][e]["HTTP"]["valid_calls"]) for e in EFFORTS)
        for name, family in families.items()
        if "valid_calls" in family["efforts"]["none"]["HTTP"]
    ]
    return (
        "Valid calls (an offered tool, its parameters, JSON), in percent, none / low / high, HTTP: "
        + "; ".join(shares)
        + "."
    )


def _intervals(families: dict[str, Any]) -> str:
    texts = []
    for name in _PLOTTED:
        efforts = families[name]["efforts"]
        spans = [efforts[effort]["HTTP"]["interval"] for effort in EFFORTS]
        texts.append(f"{name} " + " / ".join(f"{100 * a:.0f}-{100 * b:.0f}" for a, b in spans))
    return "; ".join(texts)


def _drafted(cell: dict[str, Any]) -> str:
    if not cell["tokens"]:
        return "-"
    shares = " ".join("-" if share is None else f"{100 * share:.0f}" for share in cell["accepted"])
    return f"{cell['tokens_per_step'][PLACES - 1]:.2f} ({shares})"


def _drafts(eagle: dict[str, Any]) -> str:
    rows = [
        [f"**{name}**", *(_drafted(cells[effort]) for effort in EFFORTS)]
        for name, cells in eagle["families"].items()
    ]
    together = ["all together", *(_drafted(eagle["all"][effort]) for effort in EFFORTS)]
    return _table(["family", *EFFORTS], [*rows, together])


def _draft_lengths(eagle: dict[str, Any]) -> str:
    steps = {effort: eagle["all"][effort]["tokens_per_step"] for effort in EFFORTS}
    rows = [
        [str(k), *(f"{steps[effort][k - 1]:.2f}" for effort in EFFORTS)]
        for k in range(1, MOST_DRAFTS + 1)
    ]
    return _table(["drafts per step", *EFFORTS], rows)


def speculation(training: dict[str, Any], eagle: dict[str, Any]) -> str:
    """The section on the head, from what its training and evaluation wrote."""
    return _EAGLE_TEMPLATE.read_text().format(
        layers=eagle["layers"],
        inner=eagle["inner"],
        total=eagle["parameters"] / 1e6,
        steps=training["steps"],
        conversations=training["conversations"],
        positions=training["positions"] / 1e3,
        cpu_minutes=training["cpu_minutes"],
        note="\n" + training["note"] if training["note"] else "",
        count=eagle["count"],
        seed=eagle["seed"],
        drafts=_drafts(eagle),
        lengths=_draft_lengths(eagle),
        places=PLACES,
        most=PLACES + 1,
    )


def card(training: dict[str, Any], evaluation: dict[str, Any], drafting: str) -> str:
    """The whole card in Markdown."""
    families = evaluation["families"]
    counts = training["parameters"]
    same = [f["efforts"][e]["same"] for f in families.values() for e in EFFORTS]
    return _TEMPLATE.read_text().format(
        name=NAME,
        total=sum(counts.values()) / 1e6,
        parts="\n".join(f"| {part} | {count:,} |" for part, count in counts.items()),
        commit=training["commit"],
        note=training["note"] + " " if training["note"] else "",
        seed=training["seed"],
        steps=training["steps"],
        mtok=training["tokens"] / 1e6,
        minutes=training["minutes"],
        hardware=training["hardware"],
        torch=training["torch"],
        budgets=", ".join(f"{effort} {tokens} tokens" for effort, tokens in BUDGETS.items()),
        curve="\n".join(
            f"| {row['step']} | {row['text_loss']:.3f} | {row['image_loss']:.3f} |"
            for row in training["curve"]
        ),
        num_digits=1437,
        tools=", ".join(f"`{kind.name}`" for kind in KINDS),
        count=evaluation["count"],
        eval_seed=evaluation["seed"],
        same=100 * sum(same) / len(same),
        accuracy=_accuracy(families),
        intervals=_intervals(families),
        digits=_digits(families),
        tool_calls=_tool_calls(families),
        levels=_levels(families),
        sweep=_sweep(evaluation["budgets"]),
        experts=_experts(training["experts"]),
        speculation=drafting,
    )


def main() -> None:
    """Write MODEL_CARD.md and effort.svg."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="what the other steps wrote")
    parser.add_argument("--to", type=Path, required=True, help="the checkpoint's directory")
    args = parser.parse_args()
    training, evaluation, head_training, drafted = (
        json.loads((args.run / f"{name}.json").read_text())
        for name in ("training", "evaluation", "eagle_training", "eagle")
    )
    drafting = speculation(head_training, drafted)
    (args.to / "MODEL_CARD.md").write_text(card(training, evaluation, drafting))
    efforts = {name: evaluation["families"][name]["efforts"] for name in _PLOTTED}

    def line(name: str, key: str) -> list[float]:
        return [efforts[name][effort]["HTTP"][key] for effort in EFFORTS]

    plot = effort_plot(
        EFFORTS,
        {name: line(name, "accuracy") for name in _PLOTTED},
        {name: line(name, "tokens") for name in _PLOTTED},
    )
    (args.to / "effort.svg").write_text(plot)


if __name__ == "__main__":
    main()
