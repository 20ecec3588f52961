"""The safe action: what keeps an arm where it is. Knows the action spaces only; for the robot's side and the server's.

Every space in `dualvla.schema.ACTION_SPACES` commands pose *differences*, so zero keeps the pose; the gripper is
absolute and keeps its opening, so that what it holds is not dropped.
"""

from __future__ import annotations

import numpy as np

from dualvla.schema import ActionSpace

OPEN = 1.0


def hold_action(space: ActionSpace, last: np.ndarray | None) -> np.ndarray:
    """float32 [D]: no motion, grippers as in `last` [D], the action executed before (None: nothing was, so open)."""
    action = np.zeros(space.size, np.float32)
    grippers = list(space.gripper_dims)
    action[grippers] = OPEN if last is None else last[grippers]
    return action
