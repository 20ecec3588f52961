"""What may reach a robot: limits on actions, faults of observations, and the safe action when anything is wrong.

Plain functions over numpy arrays and a session's own past; knows no network and no policy. Actions are in the units of
the action space (m, rad, gripper 1 open), positions in the robot's base frame.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from dualvla.config import from_dict
from dualvla.errors import DataError, PolicyError, UnsafeError, UsageError, did_you_mean
from dualvla.io import storage
from dualvla.schema import ACTION_SPACES, Observation, PolicySpec

Controller = Literal["delta", "absolute"]
POSE_SIZE = 6  # x, y, z (m) and three angles (rad) of an arm


@dataclass(frozen=True)
class Embodiment:
    """What one robot can take. None: not limited.

    controller: what the arm's numbers are, displacements or poses; it decides what standing still is. max_*: of one
    action (delta controllers only). max_*_change: between two consecutive actions. gripper: its least and greatest
    command. workspace_low_m, workspace_high_m: [x, y, z] that the commanded position stays between (needs `ee_pose`).
    max_age_ms: of the images. frozen_after: observations in a row with the very same image while the measured state
    has moved by more than frozen_motion (m or rad, any number of ee_pose, else of proprio).
    gripper_state: the number of `proprio` that is the gripper's opening, 0 to 1, for holds before the first action.
    """

    controller: Controller = "delta"
    max_position_m: float | None = None
    max_rotation_rad: float | None = None
    gripper: tuple[float, float] | None = None
    max_position_change_m: float | None = None
    max_rotation_change_rad: float | None = None
    workspace_low_m: tuple[float, float, float] | None = None
    workspace_high_m: tuple[float, float, float] | None = None
    max_age_ms: float | None = None
    frozen_after: int | None = None
    frozen_motion: float = 0.02
    gripper_state: int | None = None


# `generic` is far beyond what a policy at a few Hz commands and well below what a runaway does; it takes no camera for
# frozen, as a simulated one rightly shows the very same picture while the arm is outside of it. The others are the
# ranges of the robots' own public data sets at their control rates (Bridge at 5 Hz, RT-1 at 3 Hz, DROID at 15 Hz).
EMBODIMENTS: Mapping[str, Embodiment] = {
    "unlimited": Embodiment(),
    "generic": Embodiment(max_position_m=0.2, max_rotation_rad=0.8, gripper=(-0.5, 1.5), max_age_ms=2000.0),
    "widowx": Embodiment(
        max_position_m=0.05, max_rotation_rad=0.25, gripper=(0.0, 1.0), max_age_ms=600.0, frozen_after=5
    ),
    "google-robot": Embodiment(
        max_position_m=0.15, max_rotation_rad=0.6, gripper=(0.0, 1.0), max_age_ms=1000.0, frozen_after=5
    ),
    "droid-franka": Embodiment(
        max_position_m=0.075, max_rotation_rad=0.25, gripper=(0.0, 1.0), max_age_ms=300.0, frozen_after=15
    ),
}


def embodiment(name: str) -> Embodiment:
    """A built-in one, or a JSON file of the fields of `Embodiment`. Raises: UsageError."""
    if name in EMBODIMENTS:
        return EMBODIMENTS[name]
    if not name.endswith(".json"):
        raise UsageError(
            f"Embodiment '{name}' does not exist.", did_you_mean(name, EMBODIMENTS) + ", or pass a .json file"
        )
    try:
        fields = json.loads(storage.read_bytes(name))
    except (DataError, ValueError) as error:
        raise UsageError(f"Embodiment '{name}' cannot be read: {error}", "pass a JSON object") from None
    if not isinstance(fields, dict):
        raise UsageError(f"Embodiment '{name}' is no JSON object.", "see docs/serving.md")
    return from_dict(Embodiment, fields, name)


@dataclass(frozen=True)
class Checked:
    """actions: float32 [H, D] that may be executed. interventions: what was changed, of range, step and workspace."""

    actions: np.ndarray
    interventions: tuple[str, ...] = ()


def check_actions(
    actions: np.ndarray,
    spec: PolicySpec,
    limits: Embodiment,
    previous: np.ndarray | None,
    ee_pose: np.ndarray | None,
) -> Checked:
    """Brings a chunk [H, D] within the limits: first its range, then the change from action to action (from `previous`
    [D], the last one commanded), then the workspace (from `ee_pose` [6 per arm]), which may brake harder than that.

    Raises: PolicyError if a value is not finite.
    """
    if not np.isfinite(actions).all():
        raise PolicyError("The policy answered an action that is not finite.")
    arms = _arms(spec)
    safe = np.asarray(actions, np.float32).copy()
    made: list[str] = []
    for name, change in (
        ("range", lambda chunk: _clip_range(chunk, arms, limits)),
        ("step", lambda chunk: _clip_change(chunk, arms, limits, previous)),
        ("workspace", lambda chunk: _clip_workspace(chunk, arms, limits, ee_pose)),
    ):
        changed = change(safe)
        if not np.array_equal(changed, safe):
            made.append(name)
        safe = changed
    return Checked(safe, tuple(made))


@dataclass(frozen=True)
class Arm:
    """Where an arm's numbers stand in an action."""

    position: slice
    rotation: slice
    gripper: int


def _arms(spec: PolicySpec) -> tuple[Arm, ...]:
    starts = [g - POSE_SIZE for g in ACTION_SPACES[spec.action_space].gripper_dims]
    return tuple(Arm(slice(s, s + 3), slice(s + 3, s + POSE_SIZE), s + POSE_SIZE) for s in starts)


def _clip_range(chunk: np.ndarray, arms: tuple[Arm, ...], limits: Embodiment) -> np.ndarray:
    out = chunk.copy()
    for arm in arms:
        if limits.controller == "delta":
            for part, most in ((arm.position, limits.max_position_m), (arm.rotation, limits.max_rotation_rad)):
                if most is not None:
                    out[:, part] = _shorten(out[:, part], most)
        if limits.gripper is not None:
            out[:, arm.gripper] = np.clip(out[:, arm.gripper], *limits.gripper)
    return out


def _clip_change(
    chunk: np.ndarray, arms: tuple[Arm, ...], limits: Embodiment, previous: np.ndarray | None
) -> np.ndarray:
    out = chunk.copy()
    for arm in arms:
        changes = ((arm.position, limits.max_position_change_m), (arm.rotation, limits.max_rotation_change_rad))
        for part, most in changes:
            if most is None:
                continue
            last = None if previous is None else previous[part]
            for row in out:
                if last is not None and np.linalg.norm(row[part] - last) > most:
                    row[part] = last + _shorten((row[part] - last)[None], most)[0]
                last = row[part].copy()
    return out


def _clip_workspace(
    chunk: np.ndarray, arms: tuple[Arm, ...], limits: Embodiment, ee_pose: np.ndarray | None
) -> np.ndarray:
    """A robot that stands outside is never led farther out, and is free to come back."""
    if ee_pose is None or limits.workspace_low_m is None or limits.workspace_high_m is None:
        return chunk
    out = chunk.copy()
    for number, arm in enumerate(arms):
        start = ee_pose[POSE_SIZE * number : POSE_SIZE * number + 3]
        low, high = np.minimum(limits.workspace_low_m, start), np.maximum(limits.workspace_high_m, start)
        if limits.controller == "absolute":
            out[:, arm.position] = np.clip(out[:, arm.position], low, high)
            continue
        at = start
        for row in out:
            wanted = at + row[arm.position]
            allowed = np.clip(wanted, low, high)
            if not np.array_equal(wanted, allowed):
                row[arm.position] = allowed - at
            at = allowed
    return out


def _shorten(vectors: np.ndarray, most: float) -> np.ndarray:
    """[N, 3] of length `most` at the longest, directions kept."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.where(lengths > most, vectors * (most / np.maximum(lengths, 1e-12)), vectors)


@dataclass(frozen=True)
class Watch:
    """What a session remembers of its last images: camera -> (checksum, times seen in a row), and the measured state
    when the longest-standing of them came in."""

    seen: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    state: tuple[float, ...] = ()


def check_observation(observation: Observation, age_ms: float | None, limits: Embodiment, watch: Watch) -> Watch:
    """The session's next `Watch`. Raises: UnsafeError if the images are too old, or a camera has frozen."""
    if limits.max_age_ms is not None and age_ms is not None and age_ms > limits.max_age_ms:
        raise UnsafeError(f"The observation is {age_ms:.0f} ms old, over the limit of {limits.max_age_ms:.0f}.")
    if limits.frozen_after is None:
        return watch
    measured = observation.ee_pose if observation.ee_pose is not None else observation.proprio
    if measured is None:
        return watch  # whether the robot moved is not known
    seen = {}
    for name, image in observation.images.items():
        checksum = zlib.crc32(np.ascontiguousarray(image).data)
        last, times = watch.seen.get(name, (None, 0))
        seen[name] = (checksum, times + 1 if checksum == last else 1)
    longest = max((times for _, times in seen.values()), default=0)
    fresh = longest == 1 or len(watch.state) != measured.size
    state = tuple(float(x) for x in measured) if fresh else watch.state
    moved = float(np.abs(np.asarray(measured, np.float64) - np.array(state)).max(initial=0.0))
    if longest > limits.frozen_after and moved > limits.frozen_motion:
        camera = next(name for name, (_, times) in seen.items() if times == longest)
        raise FrozenError(
            f"Camera '{camera}' has shown the very same image {longest} times while the robot moved.",
            Watch(seen, state),
        )
    return Watch(seen, state)


class FrozenError(UnsafeError):
    """Carries the session's next `Watch`: the fault stays until the camera shows something else."""

    def __init__(self, message: str, watch: Watch):
        super().__init__(message, "check the camera")
        self.watch = watch


def hold(
    spec: PolicySpec, limits: Embodiment, previous: np.ndarray | None, observation: Observation | None
) -> np.ndarray | None:
    """The chunk [H, D] that makes the robot stand still: zero displacement, or the current pose; gripper unchanged.

    None if that is not known: no gripper command and no measured gripper yet, or no pose for an absolute controller.
    """
    arms = _arms(spec)
    action = np.zeros(ACTION_SPACES[spec.action_space].size, np.float32)
    for number, arm in enumerate(arms):
        if limits.controller == "absolute":
            pose = None if observation is None else observation.ee_pose
            if pose is None or pose.size < POSE_SIZE * (number + 1):
                return None
            action[arm.position.start : arm.rotation.stop] = pose[POSE_SIZE * number : POSE_SIZE * (number + 1)]
        opening = _gripper(arm, limits, previous, observation)
        if opening is None:
            return None
        action[arm.gripper] = opening
    return np.tile(action, (spec.horizon, 1))


def _gripper(
    arm: Arm, limits: Embodiment, previous: np.ndarray | None, observation: Observation | None
) -> float | None:
    if previous is not None:
        return float(previous[arm.gripper])
    proprio = None if observation is None else observation.proprio
    if limits.gripper_state is None or proprio is None or limits.gripper_state >= proprio.size:
        return None
    return float(np.clip(proprio[limits.gripper_state], 0.0, 1.0))
