"""Accuracy and tokens by effort as one small SVG, drawn by hand: no plotting library needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_COLOURS = ("#0b6e99", "#d9730d", "#0f7b6c", "#ad1a72", "#6940a5")
_WIDTH, _HEIGHT = 300, 210
_LEFT, _TOP, _RIGHT, _BOTTOM = 44, 30, 12, 30
_LEGEND_COLUMNS = 4


def effort_plot(
    efforts: Sequence[str],
    accuracy: Mapping[str, Sequence[float]],
    tokens: Mapping[str, Sequence[float]],
) -> str:
    """Two panels side by side, a line per family.

    Args:
        efforts: The x axis.
        accuracy: Family -> share of right answers, one per effort.
        tokens: Family -> mean tokens of an answer, one per effort.
    """
    most = max(value for values in tokens.values() for value in values)
    top = -(-int(most) // 20) * 20
    legend_height = 16 * -(-len(accuracy) // _LEGEND_COLUMNS) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * _WIDTH} '
        f'{_HEIGHT + legend_height}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        *_panel(0, "right answers, %", efforts, accuracy, 1.0, [0, 25, 50, 75, 100]),
        *_panel(
            _WIDTH,
            "tokens per answer",
            efforts,
            tokens,
            top,
            [round(top * quarter / 4) for quarter in range(5)],
        ),
        *_legend(list(accuracy)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _panel(
    x0: int,
    title: str,
    efforts: Sequence[str],
    lines: Mapping[str, Sequence[float]],
    top: float,
    marks: Sequence[int],
) -> list[str]:
    inner_w, inner_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(index: int) -> float:
        return x0 + _LEFT + inner_w * (index + 0.5) / len(efforts)

    def y(share: float) -> float:
        return _TOP + inner_h * (1 - share)

    parts = [f'<text x="{x0 + _LEFT}" y="18" font-weight="bold">{escape(title)}</text>']
    for place, mark in enumerate(marks):
        at = y(place / (len(marks) - 1))
        parts.append(
            f'<line x1="{x0 + _LEFT}" x2="{x0 + _WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" '
            f'stroke="#ddd"/><text x="{x0 + _LEFT - 6}" y="{at + 4:.1f}" fill="#555" '
            f'text-anchor="end">{mark}</text>'
        )
    for index, effort in enumerate(efforts):
        parts.append(
            f'<text x="{x(index):.1f}" y="{_HEIGHT - 12}" text-anchor="middle">{effort}</text>'
        )
    for colour, values in zip(_COLOURS, lines.values(), strict=False):
        points = [(x(index), y(value / top)) for index, value in enumerate(values)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in points
        ]
    return parts


def _legend(names: Sequence[str]) -> list[str]:
    parts = []
    for index, (name, colour) in enumerate(zip(names, _COLOURS, strict=False)):
        row, column = divmod(index, _LEGEND_COLUMNS)
        x, y = _LEFT + 140 * column, _HEIGHT + 10 + 16 * row
        parts.append(
            f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{colour}"/>'
            f'<text x="{x + 9}" y="{y}">{escape(name)}</text>'
        )
    return parts
