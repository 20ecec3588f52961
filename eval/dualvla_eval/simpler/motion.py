"""Jerk-limited motions of joints, and rotation vectors. Knows no simulator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import ruckig

from dualvla.errors import PlatformError


@dataclass(frozen=True)
class MotionLimits:
    """Of each joint: rad/s, rad/s^2, rad/s^3."""

    speed: float
    acceleration: float
    jerk: float


@dataclass(frozen=True)
class JointPath:
    """positions, velocities: [steps + 1, joints], rad and rad/s; row 0 is the start."""

    positions: np.ndarray
    velocities: np.ndarray


def plan(
    start: np.ndarray, velocity: np.ndarray, goal: np.ndarray, limits: MotionLimits, sim_hz: float, steps: int
) -> JointPath:
    """The fastest motion from `start` at `velocity` to rest at `goal`, its first `steps` substeps. All [joints]; rad.

    It takes what time it needs, often many control steps: only the beginning is executed. Raises: PlatformError.
    """
    joints = len(start)
    query = ruckig.InputParameter(joints)
    query.current_position, query.current_velocity = start.tolist(), velocity.tolist()
    query.target_position = goal.tolist()
    query.max_velocity = [limits.speed] * joints
    query.max_acceleration = [limits.acceleration] * joints
    query.max_jerk = [limits.jerk] * joints
    found = ruckig.Trajectory(joints)
    result = ruckig.Ruckig(joints).calculate(query, found)
    if result not in (ruckig.Result.Working, ruckig.Result.Finished):
        raise PlatformError(f"Ruckig plans no motion from {start} to {goal} rad: {result}.", "are they finite?")
    samples = [found.at_time(step / sim_hz)[:2] for step in range(steps + 1)]
    return JointPath(np.array([s[0] for s in samples]), np.array([s[1] for s in samples]))


def quaternion(rotation_vector: np.ndarray) -> np.ndarray:
    """[3] rad -> [w, x, y, z]."""
    angle = float(np.linalg.norm(rotation_vector))
    if angle < 1e-12:
        return np.array([1.0, 0.0, 0.0, 0.0])
    return np.concatenate([[np.cos(angle / 2)], np.sin(angle / 2) * rotation_vector / angle])
