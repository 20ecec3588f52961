"""Event boundaries as frame numbers: from events, from scores, and how well two sets of them agree.

Knows arrays only: nothing of images, networks or files. An episode has N frames; a boundary is one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RELATIVE_DISTANCES = tuple(round(0.05 * i, 2) for i in range(1, 11))
_ROUNDING = 1e-9  # 0.05 * 20 frames is one frame


def merge_frames(frames: Sequence[int], gap: int) -> np.ndarray:
    """Frames at which something happened -> boundaries, int [B], sorted.

    Frames at most `gap` after the one before belong to the same boundary, which lies in the middle between the first
    and the last of them (the earlier one of two middles).
    """
    times = np.unique(np.asarray(frames, dtype=np.int64))
    if not len(times):
        return times
    groups = np.split(times, np.flatnonzero(np.diff(times) > gap) + 1)
    return np.array([(group[0] + group[-1]) // 2 for group in groups])


def pick_peaks(scores: np.ndarray, threshold: float, gap: int) -> np.ndarray:
    """Non-maximum suppression: the frames whose score reaches `threshold` and is the highest within `gap` frames.

    scores [N] -> int [B], sorted. Of equal scores the earliest counts, so no two peaks are `gap` or fewer apart.
    """
    peaks: list[int] = []
    for frame in np.argsort(-scores, kind="stable"):
        if scores[frame] < threshold:
            break
        if all(abs(int(frame) - peak) > gap for peak in peaks):
            peaks.append(int(frame))
    return np.array(sorted(peaks), dtype=np.int64)


def count_matches(found: np.ndarray, true: np.ndarray, frames: int, relative_distance: float) -> int:
    """The most pairs (one found, one true boundary) at most relative_distance * frames apart, each in one pair only.

    found, true: sorted. The metric of Kinetics-GEBD (arXiv 2101.10511), with its maximum matching.
    """
    reach = relative_distance * frames + _ROUNDING
    i = j = matched = 0
    while i < len(found) and j < len(true):
        if abs(found[i] - true[j]) <= reach:  # on a line, the earliest fitting partner is never a wrong choice
            matched, i, j = matched + 1, i + 1, j + 1
        elif found[i] < true[j]:
            i += 1
        else:
            j += 1
    return matched


@dataclass(frozen=True)
class Counts:
    """What agreement is computed from, of E episodes at D relative distances.

    matched: int [E, D]; found, true: number of boundaries, int [E].
    """

    matched: np.ndarray
    found: np.ndarray
    true: np.ndarray

    @classmethod
    def of(
        cls,
        found: Sequence[np.ndarray],
        true: Sequence[np.ndarray],
        frames: Sequence[int],
        relative_distances: Sequence[float] = RELATIVE_DISTANCES,
    ) -> Counts:
        """found, true: boundaries of each episode; frames: its length."""
        matched = [
            [count_matches(f, t, n, distance) for distance in relative_distances]
            for f, t, n in zip(found, true, frames, strict=True)
        ]
        sizes = (np.array([len(boundaries) for boundaries in each], dtype=np.int64) for each in (found, true))
        return cls(np.array(matched, dtype=np.int64).reshape(-1, len(relative_distances)), *sizes)

    def f1(self, weights: np.ndarray | None = None) -> np.ndarray:
        """2 matched / (found + true), summed over episodes: [D], or [R, D] for weights [R, E] (bootstrap counts).

        Nothing found where nothing is counts as 1.
        """
        weights = np.ones(len(self.found)) if weights is None else weights
        total = np.asarray(weights @ (self.found + self.true))[..., None]
        return np.where(total > 0, 2.0 * (weights @ self.matched) / np.maximum(total, 1), 1.0)

    def precision_recall(self) -> tuple[np.ndarray, np.ndarray]:
        """matched / found and matched / true, each [D]; 1 where there is nothing to divide by."""
        matched = self.matched.sum(axis=0)
        found, true = self.found.sum(), self.true.sum()
        ones = np.ones(len(matched))
        return (matched / found if found else ones), (matched / true if true else ones)

    def take(self, episodes: np.ndarray) -> Counts:
        return Counts(self.matched[episodes], self.found[episodes], self.true[episodes])


def bootstrap_f1_difference(
    ours: Counts, theirs: Counts, column: int = 0, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """(difference, low, high) of F1 at one relative distance, with the percentile-bootstrap 95 % interval.

    The same episodes are drawn for both: they were judged on the same ones.
    """
    episodes = len(ours.found)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(episodes, np.full(episodes, 1 / episodes), size=resamples).astype(np.float64)
    drawn = ours.f1(weights)[:, column] - theirs.f1(weights)[:, column]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(ours.f1()[column] - theirs.f1()[column]), float(low), float(high)


def best_threshold(
    scores: Sequence[np.ndarray], true: Sequence[np.ndarray], gap: int, relative_distance: float
) -> float:
    """The threshold of `pick_peaks` with the highest F1 on these episodes, of 99 quantiles of all peaks' scores."""
    peaks = [pick_peaks(s, -np.inf, gap) for s in scores]
    heights = np.concatenate([s[p] for s, p in zip(scores, peaks, strict=True)])
    frames = [len(s) for s in scores]
    candidates = np.unique(np.quantile(heights, np.linspace(0.01, 0.99, 99)))

    def f1(threshold: float) -> float:
        found = [p[s[p] >= threshold] for s, p in zip(scores, peaks, strict=True)]
        return float(Counts.of(found, true, frames, [relative_distance]).f1()[0])

    return float(max(candidates, key=f1))


@dataclass(frozen=True)
class EveryKth:
    """The frames offset, offset + k, ... of an episode, counted from its first frame or back from its last."""

    k: int
    offset: int
    from_end: bool = False

    def __call__(self, frames: int) -> np.ndarray:
        """int [B], sorted."""
        chosen = np.arange(self.offset, frames, self.k)
        return frames - 1 - chosen[::-1] if self.from_end else chosen


def best_every_kth(true: Sequence[np.ndarray], frames: Sequence[int], relative_distance: float) -> EveryKth:
    """The one that agrees best with these very episodes, of all there are. It has not looked at a picture."""
    lengths, sizes = np.array(frames), np.array([len(boundaries) for boundaries in true])

    def bound(choice: EveryKth) -> float:
        """No F1 of this choice is higher: every boundary matched that can be."""
        found = np.maximum(-(-(lengths - choice.offset) // choice.k), 0)
        return float(2 * np.minimum(found, sizes).sum() / max(1, (found + sizes).sum()))

    def f1(choice: EveryKth) -> float:
        return float(Counts.of([choice(n) for n in frames], true, frames, [relative_distance]).f1()[0])

    longest = int(lengths.max())
    choices = [
        EveryKth(k, offset, end) for k in range(2, max(2, longest) + 1) for offset in range(k) for end in (False, True)
    ]
    bounds = np.array([bound(choice) for choice in choices])
    best, highest = choices[0], -1.0
    for i in np.argsort(-bounds, kind="stable"):
        if bounds[i] <= highest:
            break
        if (reached := f1(choices[i])) > highest:
            best, highest = choices[i], reached
    return best
