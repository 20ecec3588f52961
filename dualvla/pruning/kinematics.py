"""The action label: where the arm changes its motion or the gripper its state (Eq. 4 of the paper; parameter-free).

Knows poses and gripper openings as arrays only: nothing of images, text, files or control rates (a difference is
compared with the mean of its own episode, so the rate cancels). Works on many episodes laid end to end at once, so that
the cost of numpy is paid once a batch and not once an episode.

Suffixes: M frames of all episodes, E episodes, A arms, P pose, R rotation.
"""

from __future__ import annotations

import numpy as np

from dualvla.errors import DataError

POSE_DIMS = 6  # x, y, z (m), rx, ry, rz (rad, extrinsic XYZ Euler), per arm
_ROTATION = slice(3, 6)
_GRIPPER_THRESHOLD = 0.5
_GRIPPER_HYSTERESIS = 0.05
_ROUNDING = 1e-9  # a constant velocity leaves second differences of 1e-16, each of which may exceed their mean


def action_labels(ee_pose_m_rad: np.ndarray, gripper: np.ndarray) -> np.ndarray:
    """True where the reasoning of a frame may matter to the action: Eq. 4 on one episode of N frames, bool [N].

    ee_pose_m_rad: [N, 6], or [N, 12] for two arms: position in m, extrinsic XYZ Euler angles in rad (any branch).
    gripper: [N] or [N, arms], 0 closed, 1 open.

    A frame fires if the norm of the second difference of the pose exceeds its mean over the episode, or if the gripper
    has flipped since the frame before; with two arms, if either arm's rule fires. Both ends of the episode take their
    neighbour's second difference; an episode of fewer than 3 frames has none and keeps the gripper rule only.

    Raises: DataError if the shapes do not fit each other or a value is not finite.
    """
    return action_labels_ragged(ee_pose_m_rad, gripper, np.array([len(ee_pose_m_rad)]))


def action_labels_ragged(ee_pose_m_rad: np.ndarray, gripper: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`action_labels` of E episodes laid end to end: M frames in all, lengths int [E] -> bool [M]."""
    pose_MAP, gripper_MA = _by_arm(ee_pose_m_rad, gripper)
    lengths = np.asarray(lengths)
    lengths = lengths[lengths > 0]
    if lengths.sum() != len(pose_MAP):
        raise DataError(f"Episode lengths sum to {lengths.sum()}, but there are {len(pose_MAP)} frames.")
    if not len(lengths):
        return np.zeros(0, dtype=bool)
    starts = np.cumsum(lengths) - lengths
    fires_MA = _gripper_flips(gripper_MA, starts) | _motion_fires(pose_MAP, starts, lengths)
    return fires_MA.any(axis=1)


def motion_changes(ee_pose_m_rad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the motion rule compares, of one episode: ||T''|| of every frame and arm [N, A], and its mean [A].

    Per frame and in mixed units (m and rad), as Eq. 4 has it. Zero for an episode of fewer than 3 frames.
    """
    length = len(ee_pose_m_rad)
    pose_MAP, _ = _by_arm(ee_pose_m_rad, np.zeros((length, np.shape(ee_pose_m_rad)[-1] // POSE_DIMS)))
    if length < 3:
        return np.zeros(pose_MAP.shape[:2]), np.zeros(pose_MAP.shape[1])
    norm_MA = _second_differences(pose_MAP, np.array([0]), np.array([length]))
    return norm_MA, norm_MA.mean(axis=0)


def _by_arm(pose: np.ndarray, gripper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pose = np.asarray(pose, dtype=np.float64)
    gripper = np.asarray(gripper, dtype=np.float64)
    if pose.ndim != 2 or pose.shape[1] not in (POSE_DIMS, 2 * POSE_DIMS):
        raise DataError(f"Poses of shape {pose.shape} are not [N, 6] or [N, 12].", "see ee_pose in dualvla/schema.py")
    arms = pose.shape[1] // POSE_DIMS
    if gripper.shape != (len(pose), arms) and not (arms == 1 and gripper.shape == (len(pose),)):
        raise DataError(
            f"Gripper openings of shape {gripper.shape} do not fit poses of shape {pose.shape}.",
            "give one opening per frame and arm",
        )
    for name, values in (("pose", pose), ("gripper opening", gripper)):
        if not np.isfinite(values).all():
            raise DataError(f"A {name} is not finite.", "leave such episodes out; `dualvla prune` quarantines them")
    return pose.reshape(len(pose), arms, POSE_DIMS), gripper.reshape(len(pose), arms)


def _motion_fires(pose_MAP: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """||T''|| above its episode's mean, [M, A]."""
    if len(pose_MAP) < 3:
        return np.zeros(pose_MAP.shape[:2], dtype=bool)
    norm_MA = _second_differences(pose_MAP, starts, lengths)
    mean_EA = np.add.reduceat(norm_MA, starts, axis=0) / lengths[:, None]
    mean_EA[lengths < 3] = np.inf
    return norm_MA > np.repeat(mean_EA, lengths, axis=0) + _ROUNDING


def _second_differences(pose_MAP: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """||T''||, [M, A] with M >= 3: central, both ends of an episode as their neighbour, angles unwrapped.

    Means nothing in episodes of fewer than 3 frames.
    """
    pose_MAP = pose_MAP.copy()
    pose_MAP[..., _ROTATION] = _unwrap(pose_MAP[..., _ROTATION], starts)
    second_MAP = np.zeros_like(pose_MAP)
    second_MAP[1:-1] = pose_MAP[2:] - 2.0 * pose_MAP[1:-1] + pose_MAP[:-2]
    norm_MA = np.sqrt((second_MAP * second_MAP).sum(axis=-1))
    long = lengths >= 3
    first, last = starts[long], starts[long] + lengths[long] - 1
    norm_MA[first] = norm_MA[first + 1]
    norm_MA[last] = norm_MA[last - 1]
    return norm_MA


def _unwrap(angle_MAR: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Removes jumps of whole turns within each episode. Whole turns are counted as integers, so nothing accumulates."""
    turns = np.zeros_like(angle_MAR)
    turns[1:] = -np.rint(np.diff(angle_MAR, axis=0) / (2.0 * np.pi))
    turns[starts] = 0.0  # what was counted across a border of episodes shifts a whole episode: no difference sees it
    return angle_MAR + 2.0 * np.pi * np.cumsum(turns, axis=0)


def _gripper_flips(opening_MA: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """True at the first frame after a flip; inside the hysteresis band the state is the one before, [M, A]."""
    is_open_MA = opening_MA > _GRIPPER_THRESHOLD + _GRIPPER_HYSTERESIS
    decided_MA = is_open_MA | (opening_MA < _GRIPPER_THRESHOLD - _GRIPPER_HYSTERESIS)
    is_open_MA[starts] = opening_MA[starts] >= _GRIPPER_THRESHOLD
    decided_MA[starts] = True
    latest_MA = np.maximum.accumulate(np.where(decided_MA, np.arange(len(opening_MA))[:, None], 0), axis=0)
    state_MA = np.take_along_axis(is_open_MA, latest_MA, axis=0)
    flips_MA = np.zeros_like(state_MA)
    flips_MA[1:] = state_MA[1:] != state_MA[:-1]
    flips_MA[starts] = False
    return flips_MA
