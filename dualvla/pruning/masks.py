"""Which frames keep their reasoning: the two labels put together, and the paper's ablations. Knows arrays only."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from dualvla.errors import DataError, UsageError, did_you_mean

Mode = Literal["both", "scene", "action", "random", "none"]
MODES: tuple[str, ...] = get_args(Mode)


def combine(scene: np.ndarray, action: np.ndarray, mode: str, seed: int = 0) -> np.ndarray:
    """True where one episode of N frames keeps its reasoning (Sec. 3.2.1): bool [N], from labels bool [N].

    mode: `both` (the paper's: both labels fire), `scene` or `action` (that label alone), `random` (exactly as many
    frames as `both`, drawn by `seed`, which should be keyed by the episode), `none` (no pruning: all frames keep it).

    Raises: UsageError on an unknown mode, DataError if the labels differ in length.
    """
    scene, action = np.asarray(scene, dtype=bool), np.asarray(action, dtype=bool)
    if scene.ndim != 1 or scene.shape != action.shape:
        raise DataError(f"Scene labels of shape {scene.shape} and action labels of shape {action.shape} do not fit.")
    if mode == "both":
        return scene & action
    if mode == "scene":
        return scene.copy()
    if mode == "action":
        return action.copy()
    if mode == "none":
        return np.ones_like(scene)
    if mode == "random":
        keep = np.zeros_like(scene)
        count = int((scene & action).sum())
        keep[np.random.default_rng(seed).choice(len(keep), size=count, replace=False)] = True
        return keep
    raise UsageError(f"Unknown pruning mode '{mode}'.", did_you_mean(mode, MODES))
