"""Inline SVG plots: bars with intervals, and curves. Pure functions to markup; colours come from the page's CSS.

All text is escaped here, as the page inserts the result unescaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _LEFT, _RIGHT = 640, 150, 64
_ROW, _GAP, _TOP, _AXIS = 18, 14, 8, 26
_COLORS = 6  # .c0 to .c5 of the style sheet


@dataclass(frozen=True)
class Bar:
    """value with its interval, on the plot's scale. color: index of the series."""

    label: str
    value: float
    low: float
    high: float
    color: int = 0


def bars(title: str, groups: Mapping[str, Sequence[Bar]], top: float = 100.0, unit: str = "%") -> str:
    """Horizontal bars from 0 to `top` with their intervals, in named groups."""
    rows: list[str] = []
    y = _TOP
    for name, group in groups.items():
        if name:
            rows.append(f'<text x="0" y="{y + 12}" class="group">{escape(name)}</text>')
            y += _ROW
        for bar in group:
            rows.append(_bar(bar, y, top, unit))
            y += _ROW
        y += _GAP
    height = y + _AXIS
    ticks = "".join(_tick(top * i / 4, top, y, unit) for i in range(5))
    return _svg(title, height, ticks + "".join(rows))


def _x(value: float, top: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * min(max(value / top, 0.0), 1.0)


def _bar(bar: Bar, y: int, top: float, unit: str) -> str:
    middle = y + _ROW / 2 - 2
    low, high, end = (_x(v, top) for v in (bar.low, bar.high, bar.value))
    said = f"{bar.label}: {bar.value:.1f} {unit} ({bar.low:.1f} to {bar.high:.1f})"
    return (
        f"<g><title>{escape(said)}</title>"
        f'<text x="{_LEFT - 8}" y="{middle + 4:.1f}" class="label">{escape(_short(bar.label))}</text>'
        f'<rect x="{_LEFT}" y="{y}" width="{end - _LEFT:.1f}" height="{_ROW - 5}" class="c{bar.color % _COLORS}"/>'
        f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {middle - 4:.1f}v8M{high:.1f} {middle - 4:.1f}v8" '
        'class="interval"/>'
        f'<text x="{high + 6:.1f}" y="{middle + 4:.1f}" class="value">{bar.value:.1f}</text></g>'
    )


def _short(text: str, most: int = 24) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _tick(value: float, top: float, bottom: int, unit: str) -> str:
    x = _x(value, top)
    return (
        f'<path d="M{x:.1f} {_TOP}V{bottom}" class="grid"/>'
        f'<text x="{x:.1f}" y="{bottom + 14}" class="tick">{value:g}{escape(unit)}</text>'
    )


def curves(title: str, series: Mapping[str, Sequence[tuple[float, float]]], x_label: str = "step") -> str:
    """Lines over a shared x axis from 0 up; the y axis is logarithmic where the values span more than a factor 50."""
    points = [(x, y) for line in series.values() for x, y in line if math.isfinite(y)]
    if not points:
        return ""
    x_top = max(x for x, _ in points) or 1.0
    values = [y for _, y in points]
    logarithmic = min(values) > 0 and max(values) / min(values) > 50
    scale = math.log10 if logarithmic else float
    low, high = scale(min(values)) if logarithmic else min(0.0, *values), scale(max(values))
    span = (high - low) or 1.0
    left, bottom, height, width = 52, 190, 216, 420

    def place(x: float, y: float) -> str:
        return f"{left + (width - left - 10) * x / x_top:.1f} {bottom - (bottom - 12) * (scale(y) - low) / span:.1f}"

    marks = ""
    for i in range(5):
        y = bottom - (bottom - 12) * i / 4
        value = low + span * i / 4
        text = f"{10**value:.2g}" if logarithmic else f"{value:.2g}"
        marks += f'<path d="M{left} {y:.1f}H{width - 10}" class="grid"/>'
        marks += f'<text x="{left - 6}" y="{y + 4:.1f}" class="label">{text}</text>'
    marks += f'<text x="{(left + width) / 2}" y="{bottom + 20}" class="tick">{escape(x_label)} (to {x_top:g})</text>'
    for i, (name, line) in enumerate(series.items()):
        path = "L".join(place(x, y) for x, y in line if math.isfinite(y))
        marks += f'<path d="M{path}" class="line s{i % _COLORS}"><title>{escape(name)}</title></path>'
    return _svg(title, height, marks, width)


def _svg(title: str, height: float, inner: str, width: int = _WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(title)}" '
        f'style="max-width:{width}px">{inner}</svg>'
    )
