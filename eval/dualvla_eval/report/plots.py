"""Inline SVG plots: bars with intervals, radars, curves, shares. Pure functions to markup; colours come from the CSS.

All text is escaped here, as the page inserts the result unescaped. Every mark carries its figures as a <title>.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLORS = 12  # .c0 to .c11 of the style sheet

_WIDTH, _LEFT, _RIGHT = 640, 150, 56
_ROW, _GAP, _TOP, _AXIS = 20, 12, 6, 24
_RADAR_W, _RADAR_H, _RADIUS_PX = 254, 190, 64
_CURVE_W, _CURVE_H = 250, 130
_MEANS, _POINTS = 60, 300  # drawn of a curve: running means, and values behind them


@dataclass(frozen=True)
class Bar:
    """value with its interval, if it has one, on the plot's scale. color: index of the series."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    color: int = 0


def bars(title: str, groups: Mapping[str, Sequence[Bar]], top: float = 100.0, unit: str = "") -> str:
    """Horizontal bars from 0 to `top` with their intervals, in named groups."""
    rows: list[str] = []
    y = _TOP
    for name, group in groups.items():
        if name:
            rows.append(f'<text x="0" y="{y + 13}" class="group">{escape(name)}</text>')
            y += _ROW
        for bar in group:
            rows.append(_bar(bar, y, top, unit))
            y += _ROW
        y += _GAP
    bottom = y - _GAP + 4
    ticks = "".join(_tick(top * i / 4, top, bottom, unit) for i in range(5))
    return _svg(title, _WIDTH, bottom + _AXIS, ticks + "".join(rows))


def _x(value: float, top: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * min(max(value / top, 0.0), 1.0)


def _bar(bar: Bar, y: int, top: float, unit: str) -> str:
    middle, height = y + _ROW / 2, _ROW - 8
    end, after = _x(bar.value, top), _x(bar.value, top)
    said, whiskers = f"{bar.label}: {bar.value:.1f}{unit}", ""
    if bar.low is not None and bar.high is not None:
        low, after = _x(bar.low, top), max(after, _x(bar.high, top))
        said += f" ({bar.low:.1f} to {bar.high:.1f})"
        whiskers = f'<path d="M{low:.1f} {middle}H{after:.1f}M{low:.1f} {middle - 4}v8M{after:.1f} {middle - 4}v8"/>'
    return (
        f'<g class="bar"><title>{escape(said)}</title>'
        f'<text x="{_LEFT - 10}" y="{middle + 4}" class="label">{escape(_short(bar.label))}</text>'
        f'<rect x="{_LEFT}" y="{middle - height / 2}" width="{end - _LEFT:.1f}" height="{height}" '
        f'class="c{bar.color % COLORS}"/>'
        f'<g class="interval">{whiskers}</g>'
        f'<text x="{after + 7:.1f}" y="{middle + 4}" class="value">{bar.value:.1f}</text></g>'
    )


def _short(text: str, most: int = 23) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _tick(value: float, top: float, bottom: int, unit: str) -> str:
    x = _x(value, top)
    return (
        f'<path d="M{x:.1f} {_TOP}V{bottom}" class="grid"/>'
        f'<text x="{x:.1f}" y="{bottom + 16}" class="tick">{value:g}{escape(unit)}</text>'
    )


def radar(title: str, values: Mapping[str, float | None], color: int, top: float = 100.0) -> str:
    """One policy over named axes. An axis without a value is dashed, and the outline skips it."""
    centre_x, centre_y = _RADAR_W / 2, _RADAR_H / 2 + 4
    count = len(values)

    def at(i: int, share: float) -> tuple[float, float]:
        angle = 2 * math.pi * i / count - math.pi / 2
        return centre_x + share * _RADIUS_PX * math.cos(angle), centre_y + share * _RADIUS_PX * math.sin(angle)

    def polygon(shares: Sequence[tuple[int, float]]) -> str:
        return " ".join("{:.1f},{:.1f}".format(*at(i, share)) for i, share in shares)

    marks = [f'<polygon points="{polygon([(i, level / 4) for i in range(count)])}" class="grid"/>' for level in
             (1, 2, 3, 4)]  # fmt: skip
    for i, (name, value) in enumerate(values.items()):
        (x, y), (tx, ty) = at(i, 1), at(i, 1.15)
        side = "" if abs(tx - centre_x) < 9 else " left" if tx < centre_x else " right"
        shown = "no text" if value is None else f"{value:.0f}"
        shift = -8 if ty < centre_y - 9 and not side else 6
        marks.append(
            f'<path d="M{centre_x:g} {centre_y:g}L{x:.1f} {y:.1f}" class="grid{"" if value is not None else " none"}"/>'
            f'<text x="{tx:.1f}" y="{ty + shift:.1f}" class="axis{side}">{escape(name)} '
            f'<tspan class="tick">{shown}</tspan></text>'
        )
    known = [(i, min(max(v / top, 0.0), 1.0)) for i, v in enumerate(values.values()) if v is not None]
    marks.append(f'<polygon points="{polygon(known)}" class="area f{color % COLORS} s{color % COLORS}"/>')
    for i, share in known:
        x, y = at(i, share)
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="c{color % COLORS}"/>')
    said = ", ".join(f"{n} {'none' if v is None else f'{v:.1f}'}" for n, v in values.items())
    return _svg(f"{title}: {said}", _RADAR_W, _RADAR_H, "".join(marks))


def curve(title: str, points: Sequence[tuple[float, float]]) -> str:
    """A quantity over steps: every value faintly, their running means in front; logarithmic over a factor of 50."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if not finite:
        return ""
    means = _smoothed(finite)
    values = [y for _, y in finite]
    logarithmic = min(values) > 0 and max(values) / min(values) > 50
    scale = math.log10 if logarithmic else float
    low = scale(min(values)) if logarithmic else min(0.0, *values)
    high = scale(max(values))
    span = (high - low) or 1.0
    x_top = max(x for x, _ in finite) or 1.0

    def scale_back(value: float) -> float:
        return 10**value if logarithmic else value

    left, bottom, right, top = 54, _CURVE_H - 22, _CURVE_W - 8, 8

    def place(x: float, y: float) -> str:
        return f"{left + (right - left) * x / x_top:.1f} {bottom - (bottom - top) * (scale(y) - low) / span:.1f}"

    marks = ""
    for i in range(3):
        y = bottom - (bottom - top) * i / 2
        value = scale_back(low + span * i / 2)
        marks += f'<path d="M{left} {y:.1f}H{right}" class="grid"/>'
        marks += f'<text x="{left - 6}" y="{y + 4:.1f}" class="label">{_compact(value)}</text>'
    marks += f'<text x="{left}" y="{_CURVE_H - 5}" class="tick start">0</text>'
    marks += f'<text x="{right}" y="{_CURVE_H - 5}" class="tick end">{x_top:g} steps</text>'
    every = max(1, len(finite) // _POINTS)
    raw = "L".join(place(x, y) for x, y in finite[::every])
    smooth = "L".join(place(x, y) for x, y in means)
    marks += f'<path d="M{raw}" class="line raw"/><path d="M{smooth}" class="line"/>'
    said = f"{title}: from {means[0][1]:.3g} to {means[-1][1]:.3g} over {x_top:g} steps"
    return _svg(said, _CURVE_W, _CURVE_H, marks)


def _compact(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of consecutive points, so that no more than `_MEANS` are drawn."""
    size = -(-len(points) // _MEANS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def shares(title: str, parts: Mapping[str, int], kinds: Mapping[str, str]) -> str:
    """One bar cut into counted parts. kinds: part -> CSS class that colours it."""
    total = sum(parts.values()) or 1
    x, marks = 0.0, ""
    for name, count in parts.items():
        width = 100 * count / total
        marks += (
            f'<rect x="{x:.2f}" y="0" width="{width:.2f}" height="10" class="{escape(kinds[name])}">'
            f"<title>{escape(name)}: {count} of {total}</title></rect>"
        )
        x += width
    said = ", ".join(f"{name} {count}" for name, count in parts.items())
    return (
        f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" class="shares" role="img" '
        f'aria-label="{escape(f"{title}: {said}")}">{marks}</svg>'
    )


def _svg(title: str, width: float, height: float, inner: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{escape(title)}">{inner}</svg>'
    )
