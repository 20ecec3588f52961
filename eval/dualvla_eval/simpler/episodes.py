"""Every SimplerEnv episode: the original's numbered ones, and scenes for demonstrations. Knows no simulator."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from dualvla_eval.simpler import widowx_tasks
from dualvla_eval.simpler.specs import EpisodeSetup, ObjectSetup, Pose, Quaternion, Vector
from dualvla_eval.suites import Episode, get_suite, is_training

_SHIFT_M, _TURN_RAD = 0.02, 0.3  # of every object, for a demonstration
_ROBOT_SHIFT_M, _ROBOT_TURN_RAD = 0.01, 0.02  # of the robot, where no object can be moved


def setup(episode: Episode) -> EpisodeSetup:
    """The original's numbered episode; for a demonstration, one of them with everything moved a little at random.

    Raises: UsageError for a task, variant or number that does not exist.
    """
    if not is_training(episode.seed):
        return numbered(episode.suite, episode.task, episode.variant, episode.episode_id)
    rng = np.random.default_rng(episode.seed)
    chosen = int(rng.integers(_num_episodes(episode)))
    return _moved(numbered(episode.suite, episode.task, episode.variant, chosen), rng)


def numbered(suite: str, task: str, variant: str, episode_id: int) -> EpisodeSetup:
    """Episode `episode_id` of the original. Raises: UsageError for a task, variant or number that does not exist."""
    if suite == widowx_tasks.SUITE:
        return widowx_tasks.setup(task, episode_id)
    from dualvla_eval.simpler import google_tasks

    return google_tasks.setup(suite, task, variant, episode_id)


def _num_episodes(episode: Episode) -> int:
    return get_suite(episode.suite).task(episode.task, episode.variant).num_episodes


def _moved(setup: EpisodeSetup, rng: np.random.Generator) -> EpisodeSetup:
    if any(not spec.locked for spec in setup.objects):
        objects = tuple(spec if spec.locked else _moved_object(spec, rng) for spec in setup.objects)
        return replace(setup, objects=objects)
    pose = _moved_pose(setup.robot.pose, rng, _ROBOT_SHIFT_M, _ROBOT_TURN_RAD)
    return replace(setup, robot=replace(setup.robot, pose=pose))


def _moved_object(spec: ObjectSetup, rng: np.random.Generator) -> ObjectSetup:
    return replace(spec, pose=_moved_pose(spec.pose, rng, _SHIFT_M, _TURN_RAD))


def _moved_pose(pose: Pose, rng: np.random.Generator, shift_m: float, turn_rad: float) -> Pose:
    """Shifted along x and y and turned about z, each uniformly."""
    (dx, dy), turn = rng.uniform(-shift_m, shift_m, 2), float(rng.uniform(-turn_rad, turn_rad))
    x, y, z = pose.position
    position: Vector = (x + float(dx), y + float(dy), z)
    return Pose(position, _turned(pose.rotation, turn))


def _turned(rotation: Quaternion, angle_rad: float) -> Quaternion:
    """Rotated about the world's z axis."""
    c, s = math.cos(angle_rad / 2), math.sin(angle_rad / 2)
    w, x, y, z = rotation
    return (c * w - s * z, c * x - s * y, c * y + s * x, c * z + s * w)
