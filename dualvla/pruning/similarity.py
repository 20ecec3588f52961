"""A training-free boundary score from self-similarity: where the frames before are alike, those after are alike, and
the two are not (the novelty of Foote, 2000, as in the unsupervised baselines of event boundary detection).

Knows decoded images only. It is what a learned detector must beat; `events.FrameDifferences` is the other one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dualvla.pruning.events import blurred_cells


@dataclass(frozen=True)
class SelfSimilarity:
    """Features: mean colours of grid x grid cells, blurred, less their mean over the episode. Similarity: their cosine.

    half_window: frames before and after that are compared.
    """

    grid: int = 8
    half_window: int = 5

    def scores(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3] -> novelty of every frame, float64 [N] in [-2, 2]: t is the first of the frames after.

        0 where there is nothing before.
        """
        scores = np.zeros(len(frames))
        if len(frames) < 2:
            return scores
        features = blurred_cells(frames, self.grid)
        features = features - features.mean(axis=0)
        features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-9)
        similarity = features @ features.T
        for t in range(1, len(frames)):
            before, after = slice(max(0, t - self.half_window), t), slice(t, t + self.half_window)
            within = (similarity[before, before].mean() + similarity[after, after].mean()) / 2
            scores[t] = within - similarity[before, after].mean()
        return scores
