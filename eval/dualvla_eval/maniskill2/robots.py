"""The robots of the originals: whose camera and fingers are told, and how our action becomes theirs.

Knows our action space and conventions, and the originals' controllers; no simulator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_PANDA_STEP = 0.1  # what 1 means in `pd_ee_delta_pose`: m along an axis of the tool, and rad


@dataclass(frozen=True)
class OriginalRobot:
    """fingers: joints. closed, open: their mean position. unrotated: [3, 3], the orientation of the tool in the base
    frame that is told as no rotation. native: our action [7] and the tool's orientation [3, 3] -> the original's [7].
    holds: the gripper command 0.5 keeps the goal that it has.
    """

    camera: str
    fingers: tuple[str, str]
    closed: float
    open: float
    unrotated: tuple[tuple[float, float, float], ...]
    native: Callable[[np.ndarray, np.ndarray], np.ndarray]
    holds: bool = False


def _panda(action: np.ndarray, tool: np.ndarray) -> np.ndarray:
    """The original moves along and about the axes of the tool, of the pose it is at, and clips what exceeds 1."""
    moved, turned = tool.T @ action[:3], tool.T @ action[3:6]
    return np.array([*moved / _PANDA_STEP, *turned / _PANDA_STEP, 2 * action[6] - 1])


def _widowx(action: np.ndarray, tool: np.ndarray) -> np.ndarray:
    return np.array([*action[:6], 2 * action[6] - 1])


def _google(action: np.ndarray, tool: np.ndarray) -> np.ndarray:
    """Its gripper is relative, and +1 closes."""
    return np.array([*action[:6], 1 - 2 * action[6]])


PANDA = OriginalRobot(
    camera="base_camera",
    fingers=("panda_finger_joint1", "panda_finger_joint2"),
    closed=0.0,
    open=0.04,
    unrotated=((1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, -1.0)),
    native=_panda,
)
WIDOWX = OriginalRobot(
    camera="3rd_view_camera",
    fingers=("left_finger", "right_finger"),
    closed=0.014,
    open=0.038,
    unrotated=((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (-1.0, 0.0, 0.0)),
    native=_widowx,
)
GOOGLE_ROBOT = OriginalRobot(
    camera="overhead_camera",
    fingers=("joint_finger_right", "joint_finger_left"),
    closed=1.0733,
    open=0.0,
    unrotated=((0.0, -1.0, 0.0), (-1.0, 0.0, 0.0), (0.0, 0.0, -1.0)),
    native=_google,
    holds=True,
)
