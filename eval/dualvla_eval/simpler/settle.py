"""Lets dropped objects come to rest, as the original does before the robot is brought in. Knows no task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sapien

_HALF_S = 0.5
_LONGER_S = 1.5
_MAX_SPEED = 1e-3  # m/s, summed over the objects
_MAX_TURN = 1e-2  # rad/s, summed over the objects
_UPRIGHT = (False, False, False, True, True, False)  # rotation about x and y is locked while falling
_UPRIGHT_IN_PLACE = (True, True, False, True, True, False)
_FREE = (False,) * 6


def settle(objects: Sequence[Any], step: Callable[[], None], sim_hz: int) -> None:
    """Half a second upright, half a second free, and 1.5 s more if anything still moves.

    objects: mani_skill actors. step: advances the physics by one substep.
    """
    bodies = [body for actor in objects for body in actor._bodies]
    _lock(bodies, _UPRIGHT)
    _run(step, sim_hz, _HALF_S)
    _release(bodies)
    _run(step, sim_hz, _HALF_S)
    _wait(bodies, step, sim_hz)


def settle_one_by_one(
    objects: Sequence[Any], poses: Sequence[sapien.Pose], step: Callable[[], None], sim_hz: int
) -> None:
    """For what is dropped when the rest lies still: each falls straight down, then each is let go."""
    bodies = [actor._bodies[0] for actor in objects]
    for body, pose in zip(bodies, poses, strict=True):
        body.entity.set_pose(pose)
        _lock([body], _UPRIGHT_IN_PLACE)
        _run(step, sim_hz, _HALF_S)
    for body in bodies:
        _release([body])
        _run(step, sim_hz, _HALF_S)
    _wait(bodies, step, sim_hz)


def _wait(bodies: Sequence[Any], step: Callable[[], None], sim_hz: int) -> None:
    speed = sum(float(np.linalg.norm(body.linear_velocity)) for body in bodies)
    turn = sum(float(np.linalg.norm(body.angular_velocity)) for body in bodies)
    if speed > _MAX_SPEED or turn > _MAX_TURN:
        _run(step, sim_hz, _LONGER_S)


def _release(bodies: Sequence[Any]) -> None:
    _lock(bodies, _FREE)
    for body in bodies:
        body.entity.set_pose(body.entity.pose)  # wakes it up
        body.set_linear_velocity(np.zeros(3))
        body.set_angular_velocity(np.zeros(3))


def _lock(bodies: Sequence[Any], axes: tuple[bool, ...]) -> None:
    for body in bodies:
        body.set_locked_motion_axes(list(axes))


def _run(step: Callable[[], None], sim_hz: int, seconds: float) -> None:
    for _ in range(int(sim_hz * seconds)):
        step()
