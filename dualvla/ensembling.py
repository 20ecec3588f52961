"""Adaptive action ensembling: overlapping chunks blended by how far they agree. Pure functions on numpy arrays.

After CogACT (arXiv 2411.19650), as InstructVLA uses it. Knows no policy and no session.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Chunk = tuple[int, np.ndarray]  # the control step of its first action, actions [H, D]


def blend(past: Sequence[Chunk], step: int, actions: np.ndarray, alpha: float, kept_dims: Sequence[int]) -> np.ndarray:
    """The newest chunk [H, D], each action averaged with what earlier chunks planned for the same control step.

    An earlier action weighs exp(alpha * cos(new, old)), the new one exp(alpha). kept_dims (grippers) stay the newest
    chunk's and count in no cosine: an average of open and closed is neither.
    """
    moving = np.setdiff1d(np.arange(actions.shape[1]), kept_dims)
    new = actions[:, moving].astype(np.float64)
    weights = np.full((len(new), 1), np.exp(alpha))
    total = weights * new
    for start, chunk in past:
        offset = step - start
        overlap = min(len(chunk) - offset, len(new))
        if offset > 0 and overlap > 0:
            old = chunk[offset : offset + overlap, moving].astype(np.float64)
            weight = np.exp(alpha * _cosine(new[:overlap], old))[:, None]
            total[:overlap] += weight * old
            weights[:overlap] += weight
    out = actions.copy()
    out[:, moving] = total / weights
    return out


def until(past: Sequence[Chunk], step: int) -> list[Chunk]:
    """`past`, or nothing if any of it lies at `step` or ahead: an episode began anew."""
    return [] if any(start >= step for start, _ in past) else list(past)


def remember(past: Sequence[Chunk], step: int, actions: np.ndarray, horizon: int) -> list[Chunk]:
    """The newest `horizon` - 1 chunks, for the next one."""
    return [*past, (step, actions)][-(horizon - 1) :] if horizon > 1 else []


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n, D], [n, D] -> [n]; 0 beside an action that does not move."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(axis=1) / np.where(lengths > 0, lengths, 1.0)
