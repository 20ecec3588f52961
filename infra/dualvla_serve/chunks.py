"""What a session's options do to a chunk of actions: ensembling over time, the gripper's convention. Knows numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dualvla.schema import ACTION_SPACES
from dualvla.wire.options import Gripper

Chunk = tuple[int, np.ndarray]  # the control step of its first action, actions [H, D]


def ensemble(past: Sequence[Chunk], step: int, actions: np.ndarray, rate: float, action_space: str) -> np.ndarray:
    """The newest chunk [H, D], each action averaged with what earlier chunks planned for the same control step.

    A chunk of age a control steps weighs exp(-rate * a). The gripper is the newest chunk's: an average of open and
    closed is neither.
    """
    total = actions.astype(np.float64)
    weights = np.ones(len(actions))
    for start, chunk in past:
        offset = step - start
        overlap = min(len(chunk) - offset, len(actions))
        if offset <= 0 or overlap <= 0:
            continue
        weight = np.exp(-rate * offset)
        total[:overlap] += weight * chunk[offset : offset + overlap]
        weights[:overlap] += weight
    out = (total / weights[:, None]).astype(np.float32)
    grippers = list(ACTION_SPACES[action_space].gripper_dims)
    out[:, grippers] = actions[:, grippers]
    return out


def remember(past: Sequence[Chunk], step: int, actions: np.ndarray) -> list[Chunk]:
    """The chunks that still plan for steps after `step`; none of a past that lies ahead (an episode began anew)."""
    kept = [] if any(start >= step for start, _ in past) else [c for c in past if c[0] + len(c[1]) > step + 1]
    return [*kept, (step, actions)]


def to_convention(actions: np.ndarray, gripper: Gripper, action_space: str) -> np.ndarray:
    """Our gripper (0 closed, 1 open) as the robot's: 1 closed, or -1 to 1 with either end open."""
    if gripper == "open01":
        return actions
    dims = list(ACTION_SPACES[action_space].gripper_dims)
    out = actions.copy()
    if gripper == "closed01":
        out[:, dims] = 1 - actions[:, dims]
    else:
        out[:, dims] = (2 * actions[:, dims] - 1) * (1 if gripper == "open11" else -1)
    return out
