"""The scene label: at which frames of an episode something happens in view.

Knows decoded images only: nothing of poses, text or files. A detector takes episodes in a batch and answers one label a
frame; the detector here needs no training and serves as the default and as the baseline of learned ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class SceneEventDetector(Protocol):
    """Episodes in (uint8 [N, H, W, 3] each), scene labels out (bool [N] each), in the same order."""

    def __call__(self, episodes: Sequence[np.ndarray]) -> list[np.ndarray]: ...


@dataclass(frozen=True)
class FrameNovelty:
    """An event is where the frames before and the frames after resemble themselves more than each other.

    The score of a frame is the novelty of Foote (2000) on the distances between frames: the mean distance between the
    `window` frames before it and the `window` frames from it on, less the mean distance within either side. Steady
    motion scores the same everywhere; what starts, stops, turns or appears scores higher. Scores are divided by their
    mean over the episode, so that lighting, distance and speed do not matter. A frame fires if its score exceeds
    `threshold` means. The first frame always fires: everything in it is new.

    grid: frames are averaged down to grid x grid cells before they are compared. window: in frames.
    """

    grid: int = 16
    window: int = 2
    threshold: float = 1.2

    def __call__(self, episodes: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self._label(frames) for frames in episodes]

    def _label(self, frames: np.ndarray) -> np.ndarray:
        fires = self.scores(frames) > self.threshold
        fires[:1] = True
        return fires

    def scores(self, frames: np.ndarray) -> np.ndarray:
        """Novelty of every frame in means of its episode, float64 [N]; zeros if nothing ever changes."""
        novelty = _novelty(_cell_means(frames, self.grid), self.window)
        mean = novelty[1:].mean() if len(novelty) > 1 else 0.0
        return novelty / mean if mean > 0.0 else novelty


def _cell_means(frames_NHWC: np.ndarray, grid: int) -> np.ndarray:
    """Mean colour of each cell, float64 [N, cells * channels]; frames smaller than the grid are taken as they are."""
    height, width = frames_NHWC.shape[1:3]
    rows = np.unique(np.arange(grid) * height // grid)
    columns = np.unique(np.arange(grid) * width // grid)
    sums = np.add.reduceat(frames_NHWC, rows, axis=1, dtype=np.uint32)
    sums = np.add.reduceat(sums, columns, axis=2, dtype=np.uint32)
    areas = np.outer(np.diff(rows, append=height), np.diff(columns, append=width))
    return (sums / areas[:, :, None]).reshape(len(frames_NHWC), len(rows) * len(columns) * frames_NHWC.shape[3])


def _novelty(features_ND: np.ndarray, window: int) -> np.ndarray:
    """Foote's checkerboard along the diagonal of the distance matrix, float64 [N]; windows shrink at both ends."""
    count = len(features_ND)
    if count < 2:
        return np.zeros(count)
    edge = np.full((window, features_ND.shape[1]), np.nan)
    padded = np.concatenate([edge, features_ND, edge])

    def distance(i: int, j: int) -> np.ndarray:
        """Between frame t + i and frame t + j for every t, NaN outside the episode."""
        difference = padded[window + i : window + i + count] - padded[window + j : window + j + count]
        return np.sqrt((difference * difference).mean(axis=1))

    def mean_distance(pairs: Iterable[tuple[int, int]]) -> np.ndarray:
        distances = np.array([distance(i, j) for i, j in pairs]).reshape(-1, count)
        inside = ~np.isnan(distances)
        return distances.sum(axis=0, where=inside) / np.maximum(inside.sum(axis=0), 1)

    before, after = range(-window, 0), range(window)
    across = mean_distance(itertools.product(before, after))
    within = mean_distance(itertools.combinations(before, 2)) + mean_distance(itertools.combinations(after, 2))
    return np.maximum(across - within / 2, 0.0)
