"""What runs beside the original simulators: one of their environments, told about in plain values.

Goes by value into the interpreter that has mani-skill2 or SimplerEnv, so it imports nothing of ours, and what it gives
and takes are numbers, strings and bytes: the numpy there is another one. Knows their interface, which both share; no
convention of ours. Poses are 4 x 4, row by row, in the base frame of the robot; metres.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

PRESSED_NS = 1e-6  # the impulse from which on the originals' success tests speak of a contact


class OriginalImpl:
    """One environment at a time. package: "mani_skill2" or "simpler_env". camera: whose picture. fingers: joints."""

    def __init__(self, package: str, camera: str, fingers: Sequence[str]):
        self._package, self._camera, self._fingers = package, camera, tuple(fingers)
        self._task: str | None = None
        self._env: Any = None

    def reset(self, task: str, seed: int, episode_id: int) -> dict[str, Any]:
        """A scene of its own. seed: below 2^32. episode_id: where the task numbers its set-ups, else ignored."""
        if task != self._task:
            self.close()
            self._env, self._task = self._make(task), task
        options: dict[str, Any] = {"reconfigure": True}
        if self._package == "simpler_env":
            options["obj_init_options"] = {"episode_id": episode_id}
        observation, _ = self._env.reset(seed=seed, options=options)
        return self._told(observation, success=False, truncated=False)

    def step(self, action: Sequence[float]) -> dict[str, Any]:
        """action: the original's own, [7]."""
        import numpy as np

        observation, _, _, truncated, info = self._env.step(np.array(action, dtype=np.float32))
        return self._told(observation, bool(info["success"]), bool(truncated))

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
        self._env = self._task = None

    def _make(self, task: str) -> Any:
        if self._package == "simpler_env":
            import simpler_env

            return simpler_env.make(task)
        import gymnasium
        import mani_skill2.envs  # noqa: F401  (registers its tasks)

        return gymnasium.make(task, obs_mode="rgbd", control_mode="pd_ee_delta_pose")

    def _told(self, observation: Any, success: bool, truncated: bool) -> dict[str, Any]:
        import numpy as np

        env = self._env.unwrapped
        robot = env.agent.robot
        to_base = np.linalg.inv(_matrix(robot.pose))
        picture = np.ascontiguousarray(observation["image"][self._camera]["rgb"], dtype=np.uint8)
        lens = observation["camera_param"][self._camera]
        links = {link.name for link in robot.get_links()}
        objects = [actor for actor in env.get_actors() if actor.type == "dynamic"]
        joints = dict(zip([joint.name for joint in robot.get_active_joints()], robot.get_qpos(), strict=True))
        goal = getattr(env, "goal_pos", None)
        return {
            "picture": picture.tobytes(),
            "shape": picture.shape,
            # pixels from positions in the base frame: [3, 4]
            "projection": _floats(lens["intrinsic_cv"] @ (lens["extrinsic_cv"] @ np.linalg.inv(to_base))[:3]),
            "tool": _floats(to_base @ _matrix(env.tcp.pose)),
            "fingers": [float(joints[name]) for name in self._fingers],
            "objects": [
                {
                    "name": actor.name,
                    "phrase": _phrase(env, actor.name),
                    "pose": _floats(to_base @ _matrix(actor.pose)),
                    "size": _size(actor),
                    "held": bool(env.agent.check_grasp(actor)),
                }
                for actor in objects
            ],
            "contacts": _contacts(env, links, {actor.name for actor in objects}),
            "goal": None if goal is None else _floats((to_base @ np.append(goal, 1.0))[:3]),
            "source": _named(env, "episode_source_obj", "obj"),
            "target": _named(env, "episode_target_obj"),
            "instruction": env.get_language_instruction() if hasattr(env, "get_language_instruction") else None,
            "success": success,
            "truncated": truncated,
        }


def versions() -> dict[str, str]:
    """Of what simulates in this process, by the names of the packages."""
    from importlib import metadata

    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("ray", "numpy", "sapien", "mani_skill2", "mani_skill2_real2sim", "simpler_env"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _matrix(pose: Any) -> Any:
    import numpy as np

    return np.asarray(pose.to_transformation_matrix(), dtype=np.float64)


def _floats(values: Any) -> list[float]:
    return [float(value) for value in values.reshape(-1)]


def _phrase(env: Any, name: str) -> str | None:
    """What SimplerEnv's instructions call an object; mani-skill2 has none."""
    call = getattr(env, "_get_instruction_obj_name", None)
    return None if call is None else str(call(name))


def _named(env: Any, *attributes: str) -> str | None:
    """The name of the first of these actors that the environment has."""
    actors = (getattr(env, name, None) for name in attributes)
    return next((actor.name for actor in actors if actor is not None), None)


def _size(actor: Any) -> list[float]:
    """Extent of the collision shapes along the actor's axes, before rotation, m."""
    import numpy as np

    low, high = np.full(3, math.inf), np.full(3, -math.inf)
    for shape in actor.get_collision_shapes():
        geometry = shape.geometry
        if hasattr(geometry, "half_lengths"):
            signs = np.array(np.meshgrid(*[[-1, 1]] * 3)).reshape(3, -1).T
            points = signs * geometry.half_lengths
        elif hasattr(geometry, "vertices"):
            points = np.asarray(geometry.vertices) * geometry.scale
        else:
            points = np.array([[-1.0] * 3, [1.0] * 3]) * geometry.radius
        pose = _matrix(shape.get_local_pose())
        points = points @ pose[:3, :3].T + pose[:3, 3]
        low, high = np.minimum(low, points.min(axis=0)), np.maximum(high, points.max(axis=0))
    return _floats(high - low) if np.isfinite(high).all() else [0.0, 0.0, 0.0]


def _contacts(env: Any, links: set[str], objects: set[str]) -> list[tuple[str, str]]:
    """Pairs that press on each other, once each; links of the robot are "robot", what never moves is "table"."""
    import numpy as np

    def called(name: str) -> str:
        return "robot" if name in links else name if name in objects else "table"

    pairs = set()
    for contact in env._scene.get_contacts():
        impulse = np.sum([point.impulse for point in contact.points], axis=0)
        first, second = sorted((called(contact.actor0.name), called(contact.actor1.name)))
        if first != second and np.linalg.norm(impulse) > PRESSED_NS:
            pairs.add((first, second))
    return sorted(pairs)
