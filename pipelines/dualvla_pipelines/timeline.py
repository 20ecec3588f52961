"""One episode as a picture: its frames, what moved, both labels, and the reasoning that was kept, on one time axis.

Pure: arrays and strings in, PNG bytes out, the same ones every time. Knows no files and no rule of pruning.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

_WIDTH, _LEFT, _RIGHT = 1200, 132, 16  # px
_PLOT = _WIDTH - _LEFT - _RIGHT
_THUMB, _CARD_THUMB = 66, 96  # px
_CURVE, _CELLS, _GAP = 46, 16, 9  # heights of a curve, of a row of labels, and of what lies between
_CARDS, _CARD_COLUMNS, _CARD_LINES, _CARD_CHARACTERS = 12, 3, 5, 40
_INK, _MUTED, _RULE, _PAPER = "#1b1b1b", "#6b6b6b", "#d9d9d9", "#ffffff"
_SCENE, _ACTION, _KEPT, _EVENT = "#0072b2", "#d55e00", "#009e73", "#cc79a7"  # Okabe and Ito: safe for the colour-blind
_ARMS = (_INK, "#999999")


@dataclass(frozen=True)
class Episode:
    """What a picture shows of N frames.

    frames: uint8 [N, H, W, 3]. time_s: [N]. motion: ||T''|| [N, A], motion_mean: [A]. gripper: [N, A] in [0, 1].
    scene (None if it was not computed), action, keep: bool [N]. reasoning: N texts. events: names of what happened, N.
    """

    title: str
    frames: np.ndarray
    time_s: np.ndarray
    motion: np.ndarray
    motion_mean: np.ndarray
    gripper: np.ndarray
    scene: np.ndarray | None
    action: np.ndarray
    keep: np.ndarray
    reasoning: Sequence[str]
    events: Sequence[Sequence[str]]


def draw(episode: Episode) -> bytes:
    """PNG, 1200 px wide."""
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (_WIDTH, 4000), _PAPER)
    pen = _Pen(ImageDraw.Draw(canvas), len(episode.keep))
    bottom = _frames(canvas, pen, episode, _title(pen, episode))
    bottom = pen.curves(bottom, "change of motion", episode.motion, episode.motion.max(initial=0.0), "dashed: mean")
    for arm, mean in enumerate(episode.motion_mean.tolist()):
        pen.dashes(bottom, mean, episode.motion.max(initial=0.0), _ARMS[arm])
    bottom = pen.curves(bottom, "gripper", episode.gripper, 1.0, "1 open, 0 closed")
    if any(episode.events):
        bottom = pen.cells(bottom, "events", np.array([bool(e) for e in episode.events]), _EVENT)
    bottom = pen.cells(bottom, "scene label", episode.scene, _SCENE)
    bottom = pen.cells(bottom, "action label", episode.action, _ACTION)
    bottom = pen.cells(bottom, "reasoning kept", episode.keep, _KEPT)
    bottom = _cards(canvas, pen, episode, _axis(pen, episode, bottom))
    sink = io.BytesIO()
    few = canvas.crop((0, 0, _WIDTH, bottom)).quantize(256, Image.Quantize.FASTOCTREE)
    few.save(sink, format="PNG", optimize=True)
    return sink.getvalue()


class _Pen:
    """Draws tracks below each other; each method takes where the one above ended and returns where it ends itself."""

    def __init__(self, draw: Any, length: int):
        self.draw = draw
        self.length = max(length, 1)

    def x(self, frame: float) -> float:
        """The middle of a frame."""
        return _LEFT + (frame + 0.5) * _PLOT / self.length

    def text(self, x: float, y: float, text: str, size: int = 12, colour: str = _INK, anchor: str = "la") -> None:
        self.draw.text((x, y), text, fill=colour, font=_font(size), anchor=anchor)

    def name(self, y: float, name: str, note: str = "") -> None:
        self.text(_LEFT - 10, y, name, anchor="rm")
        if note:
            self.text(_LEFT - 10, y + 15, note, 10, _MUTED, anchor="rm")

    def curves(self, top: int, name: str, values: np.ndarray, largest: float, note: str) -> int:
        top += _GAP
        self.name(top + _CURVE / 2 - 8, name, note)
        self.draw.line([(_LEFT, top + _CURVE), (_WIDTH - _RIGHT, top + _CURVE)], fill=_RULE)
        for arm in range(values.shape[1]):
            points = [(self.x(k), _height(top, v, largest)) for k, v in enumerate(values[:, arm].tolist())]
            if len(points) > 1:
                self.draw.line(points, fill=_ARMS[arm], width=2)
        return top + _CURVE

    def dashes(self, bottom: int, value: float, largest: float, colour: str) -> None:
        y = _height(bottom - _CURVE, value, largest)
        for x in range(_LEFT, _WIDTH - _RIGHT, 8):
            self.draw.line([(x, y), (x + 4, y)], fill=colour)

    def cells(self, top: int, name: str, fires: np.ndarray | None, colour: str) -> int:
        top += _GAP
        self.name(top + _CELLS / 2, name)
        self.draw.rectangle((_LEFT, top, _WIDTH - _RIGHT, top + _CELLS), outline=_RULE)
        if fires is None:
            self.text(_LEFT + 6, top + _CELLS / 2, "not computed in this mode", 11, _MUTED, anchor="lm")
            return top + _CELLS
        half = _PLOT / self.length / 2
        inset = min(1.0, half / 4)
        for frame in np.flatnonzero(fires).tolist():
            x = self.x(frame)
            self.draw.rectangle((x - half + inset, top + 1, x + half - inset, top + _CELLS - 1), fill=colour)
        return top + _CELLS


def _height(top: int, value: float, largest: float) -> float:
    return top + _CURVE - 2 - (_CURVE - 4) * value / largest if largest > 0 else top + _CURVE - 2


def _title(pen: _Pen, episode: Episode) -> int:
    kept = int(episode.keep.sum())
    for row, line in enumerate(textwrap.wrap(episode.title, 150) or [""]):
        pen.text(16, 10 + 20 * row, line, 15)
    top = 12 + 20 * (row + 1)
    pen.text(16, top, f"reasoning kept at {kept} of {len(episode.keep)} frames", 12, _MUTED)
    return top + 18


def _frames(canvas: Any, pen: _Pen, episode: Episode, top: int) -> int:
    """As many frames as fit, evenly spread, each where it lies on the time axis."""
    top += _GAP
    height, width = _fitted(episode.frames, _THUMB)
    slots = min(len(episode.frames), _PLOT // (width + 2))
    for slot in range(slots):
        frame = int((slot + 0.5) * len(episode.frames) / slots)
        x = int(_LEFT + (slot + 0.5) * _PLOT / slots - width / 2)
        canvas.paste(_thumbnail(episode.frames[frame], height, width), (x, top))
        kept = bool(episode.keep[frame])
        if kept:
            pen.draw.rectangle((x - 1, top - 1, x + width, top + height), outline=_KEPT, width=2)
        pen.text(x + width / 2, top + height + 2, f"{frame}", 10, _KEPT if kept else _MUTED, anchor="ma")
    pen.name(top + height / 2, "frames", "green: kept")
    return top + height + 12


def _axis(pen: _Pen, episode: Episode, top: int) -> int:
    top += 4
    every = max(1, pen.length // 12)
    for frame in range(0, len(episode.keep), every):
        pen.text(pen.x(frame), top, f"{frame}", 10, _MUTED, anchor="ma")
        pen.text(pen.x(frame), top + 12, f"{episode.time_s[frame]:.1f} s", 10, _MUTED, anchor="ma")
    pen.text(_LEFT - 10, top, "frame", 10, _MUTED, anchor="ra")
    return top + 28


def _cards(canvas: Any, pen: _Pen, episode: Episode, top: int) -> int:
    """The kept frames, larger, with their reasoning."""
    kept = np.flatnonzero(episode.keep).tolist()
    top += _GAP
    if not kept:
        pen.text(16, top, "No reasoning is kept in this episode.", 12, _MUTED)
        return top + 24
    height, width = _fitted(episode.frames, _CARD_THUMB)
    column = (_WIDTH - 32) // _CARD_COLUMNS
    row_height = max(height, 16 * (_CARD_LINES + 1)) + 12
    characters = _CARD_CHARACTERS * (column - width - 24) // (column - _CARD_THUMB - 24)
    for i, frame in enumerate(kept[:_CARDS]):
        x, y = 16 + i % _CARD_COLUMNS * column, top + i // _CARD_COLUMNS * row_height
        canvas.paste(_thumbnail(episode.frames[frame], height, width), (x, y))
        pen.text(x + width + 10, y, f"frame {frame}, {episode.time_s[frame]:.1f} s", 12, _KEPT)
        lines = textwrap.wrap(episode.reasoning[frame], max(characters, 12), max_lines=_CARD_LINES, placeholder=" …")
        for row, line in enumerate(lines, 1):
            pen.text(x + width + 10, y + 16 * row, line)
    top += -(-len(kept[:_CARDS]) // _CARD_COLUMNS) * row_height
    if len(kept) > _CARDS:
        pen.text(16, top, f"and {len(kept) - _CARDS} more kept frames", 12, _MUTED)
        top += 22
    return top


def _fitted(frames: np.ndarray, height: int) -> tuple[int, int]:
    """(height, width) of a thumbnail; a very wide picture is made lower rather than wider than twice its height."""
    aspect = frames.shape[2] / frames.shape[1]
    return (height, round(height * aspect)) if aspect <= 2 else (round(2 * height / aspect), 2 * height)


def _thumbnail(frame: np.ndarray, height: int, width: int) -> Any:
    from PIL import Image

    enlarged = height > frame.shape[0]
    how = Image.Resampling.NEAREST if enlarged and height % frame.shape[0] == 0 else Image.Resampling.BICUBIC
    return Image.fromarray(frame).resize((width, height), how)


@cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)  # comes with Pillow, so the picture is the same on every machine
