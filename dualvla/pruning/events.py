"""The scene label: at which frames of an episode something happens in view.

Knows decoded images only: nothing of poses, text or files. A detector takes episodes in a batch and answers one label a
frame; the detector here needs no training and serves as the default and as the baseline of learned ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

_BLURS = 2  # an edge that moves by less than a cell then changes the features smoothly, so steady motion looks steady


class SceneEventDetector(Protocol):
    """Episodes in (uint8 [N, H, W, 3] each), scene labels out (bool [N] each), in the same order."""

    def __call__(self, episodes: Sequence[np.ndarray]) -> list[np.ndarray]: ...


@dataclass(frozen=True)
class FrameDifferences:
    """An event is where the picture begins to change in another way than it did.

    With f the features of a frame (mean colours of grid x grid cells, blurred) and v[t] = f[t] - f[t-1], the score is

        s[t] = ||v[t+1] - v[t]|| / (||v[t+1]|| + ||v[t]|| + noise)        in [0, 1], 0 at both ends

    so steady motion scores near 0, whatever its speed, and a start, a stop, a turn or a sudden appearance near 1. A
    frame fires if its score exceeds `threshold` times the mean score of its episode; the first frame always fires,
    because everything in it is new.

    noise: in grey levels (root mean square over the features); below it a change counts as none.
    """

    grid: int = 8
    threshold: float = 1.3
    noise: float = 0.5

    def __call__(self, episodes: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self._label(frames) for frames in episodes]

    def _label(self, frames: np.ndarray) -> np.ndarray:
        scores = self.scores(frames)
        fires = np.zeros(len(scores), dtype=bool)
        if len(scores) >= 3:
            fires = scores > self.threshold * scores[1:-1].mean()
        fires[:1] = True
        return fires

    def scores(self, frames: np.ndarray) -> np.ndarray:
        """s[t] of every frame, float64 [N]."""
        scores = np.zeros(len(frames))
        if len(frames) >= 3:
            change_ND = np.diff(blurred_cells(frames, self.grid), axis=0)
            size_N = _rms(change_ND)
            scores[1:-1] = _rms(np.diff(change_ND, axis=0)) / (size_N[1:] + size_N[:-1] + self.noise)
        return scores


def _rms(values_ND: np.ndarray) -> np.ndarray:
    return np.sqrt((values_ND * values_ND).mean(axis=1))


def blurred_cells(frames_NHWC: np.ndarray, grid: int) -> np.ndarray:
    """Mean colour of each cell, blurred over its neighbours, float64 [N, cells * channels].

    Frames smaller than the grid are taken as they are.
    """
    height, width = frames_NHWC.shape[1:3]
    rows = np.unique(np.arange(grid) * height // grid)
    columns = np.unique(np.arange(grid) * width // grid)
    sums = np.add.reduceat(frames_NHWC, rows, axis=1, dtype=np.uint32)
    sums = np.add.reduceat(sums, columns, axis=2, dtype=np.uint32)
    areas = np.outer(np.diff(rows, append=height), np.diff(columns, append=width))
    cells = sums / areas[:, :, None]
    for _ in range(_BLURS):
        cells = _binomial(_binomial(cells, axis=1), axis=2)
    return cells.reshape(len(cells), -1)


def _binomial(values: np.ndarray, axis: int) -> np.ndarray:
    """Weights 1/4, 1/2, 1/4 along an axis; the border repeats."""
    last = values.shape[axis] - 1
    index = np.arange(last + 1)
    before = values.take(np.maximum(index - 1, 0), axis)
    after = values.take(np.minimum(index + 1, last), axis)
    return before / 4 + values / 2 + after / 4
