"""The originals behind the `SimEnv` protocol: what their process tells becomes observations and states of ours.

Knows our conventions and what `original.OriginalImpl` tells; neither Ray nor a simulator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from dualvla.errors import PolicyError, UsageError
from dualvla_eval.maniskill2.robots import OriginalRobot
from dualvla_eval.maniskill2.tasks import OriginalTask
from dualvla_eval.sim.base import ObjectState, SceneState
from dualvla_eval.suites import Episode

ACTION_SIZE = 7
_STILL_M = 0.002
_SEEDS = 2**32  # what the originals' random numbers take


class Process(Protocol):
    """`original.OriginalImpl`, wherever it runs."""

    def reset(self, task: str, seed: int, episode_id: int) -> Mapping[str, Any]: ...

    def step(self, action: list[float]) -> Mapping[str, Any]: ...

    def close(self) -> None: ...


class OriginalEnv:
    """One episode after another, each given by `options={"episode": Episode}`.

    Action [7]: space "ee_delta_pose+gripper". `terminated` is never set; success in `info` is that of the instant, as
    the original tells it. proprio: tool position (m) and extrinsic XYZ Euler angles (rad) in the base frame, measured
    gripper opening (0..1); gripper: as commanded last.
    """

    def __init__(self, process: Process, robot: OriginalRobot, tasks: Mapping[str, OriginalTask]):
        self._process, self._robot, self._tasks = process, robot, tasks

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """seed: ignored; the episode says all."""
        episode: Episode = (options or {})["episode"]
        self._task = self._tasks[episode.task]
        self._told = self._process.reset(self._task.id, episode.seed % _SEEDS, episode.episode_id)
        self._step, self._gripper = 0, self._opening()
        self._touched: list[str] = []
        self._started = {told["name"]: _transform(told["pose"]) for told in self._told["objects"]}
        self._state = self._read_state(previous=None)
        return self._observe(), self._info([])

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Raises: PolicyError for an action that is not seven finite numbers."""
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (ACTION_SIZE,) or not np.isfinite(action).all():
            raise PolicyError(f"The action {action} is not {ACTION_SIZE} finite numbers.", "see its action space")
        native = self._robot.native(action, _transform(self._told["tool"])[:3, :3])
        self._told = self._process.step([float(value) for value in native])
        self._step += 1
        if not (self._robot.holds and action[6] == 0.5):
            self._gripper = float(np.clip(action[6], 0, 1))
        before, self._state = self._state, self._read_state(self._state)
        success, truncated = self._told["success"], self._told["truncated"]
        return self._observe(), float(success), False, truncated, self._info(_events(before, self._state))

    def state(self) -> SceneState:
        return self._state

    def instruction_for(self, target: str) -> str:
        """This episode's sentence about another object of the scene. Raises: UsageError if it names no object."""
        if self._state.target not in self._state.instruction:
            raise UsageError(
                f"The instruction '{self._state.instruction}' does not name '{self._state.target}'.",
                "leave --ablation other-instruction to other tasks",
            )
        mark, state = "\0", self._state
        text = state.instruction.replace(target, mark).replace(state.target, target)
        return text.replace(mark, state.target)

    def render(self, size: int | None = None) -> np.ndarray:
        """The policy's picture, uint8 [H, W, 3]; with a size, scaled to fit [size, size, 3], grey beside it."""
        picture = self._picture()
        if size is None:
            return picture
        height, width = picture.shape[:2]
        scale = size / max(height, width)
        image = Image.fromarray(picture).resize((round(width * scale), round(height * scale)), Image.Resampling.BOX)
        canvas = Image.new("RGB", (size, size), (40,) * 3)
        canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        return np.asarray(canvas)

    def project(self, position: np.ndarray) -> np.ndarray:
        """[x, y, z] m, base frame -> [u, v] in the picture, 0..1, u to the right, v down; clipped to the picture."""
        x, y, depth = np.reshape(self._told["projection"], (3, 4)) @ np.append(position, 1.0)
        height, width, _ = self._told["shape"]
        return np.clip(np.array([x / width, y / height]) / max(float(depth), 1e-6), 0, 1).astype(np.float32)

    def close(self) -> None:
        self._process.close()

    # --- what is known ------------------------------------------------------------------------------------------------

    def _picture(self) -> np.ndarray:
        return np.frombuffer(self._told["picture"], np.uint8).reshape(self._told["shape"])

    def _opening(self) -> float:
        robot = self._robot
        return float(np.clip((np.mean(self._told["fingers"]) - robot.closed) / (robot.open - robot.closed), 0, 1))

    def _name(self, told: Mapping[str, Any]) -> str:
        """What an object is called: by our task, by the original, else by its file."""
        return (
            self._task.phrases.get(told["name"])
            or told["phrase"]
            or told["name"].lstrip("0123456789_").replace("_", " ")
        )

    def _read_state(self, previous: SceneState | None) -> SceneState:
        told, tool = self._told, _transform(self._told["tool"])
        names = {of["name"]: self._name(of) for of in told["objects"]}
        objects = tuple(
            ObjectState(
                name=names[of["name"]],
                shape=names[of["name"]].rsplit(" ", 1)[-1],
                color=None,
                position=_floats(pose[:3, 3]),
                initial_position=_floats(self._started[of["name"]][:3, 3]),
                yaw_rad=float(np.arctan2(pose[1, 0], pose[0, 0])),
                size=tuple(of["size"]),
            )
            for of in told["objects"]
            for pose in [_transform(of["pose"])]
        )
        moved = previous is not None and any(
            np.linalg.norm(np.subtract(o.position, p.position)) > _STILL_M
            for o, p in zip(objects, previous.objects, strict=True)
        )
        contacts = tuple(sorted({(a, b) for c in told["contacts"] for a, b in [sorted(names.get(n, n) for n in c)]}))
        for pair in contacts:
            self._touched += [n for n in pair if "robot" in pair and n in names.values() and n not in self._touched]
        target, reference = self._task.target or told["source"], self._task.reference or told["target"]
        target = names.get(target, target) or self._task.about
        turned = tool[:3, :3] @ np.transpose(self._robot.unrotated)
        return SceneState(
            task=self._task.name,
            instruction=told["instruction"] or self._task.instruct(target, told["goal"]),
            target=target,
            reference=names.get(reference, reference),
            step=self._step,
            objects=objects,
            ee_pose=_floats(np.concatenate([tool[:3, 3], Rotation.from_matrix(turned).as_euler("xyz")])),
            gripper=self._opening(),
            contacts=contacts,
            held=next((names[of["name"]] for of in told["objects"] if of["held"]), None),
            touched=tuple(self._touched),
            still=not moved,
        )

    def _observe(self) -> dict[str, Any]:
        state = self._state
        return {
            "images": {"main": self._picture()},
            "instruction": state.instruction,
            "proprio": np.array([*state.ee_pose, state.gripper], dtype=np.float32),
            "ee_pose": np.array(state.ee_pose),
            "gripper": np.array([self._gripper]),
        }

    def _info(self, events: list[str]) -> dict[str, Any]:
        return {"success": self._told["success"], "failure": None, "events": events}


def _events(before: SceneState, after: SceneState) -> list[str]:
    """What happened to the robot's contacts and its hold within one control step, in a fixed order."""
    events = []
    for name in (o.name for o in after.objects):
        touched, touches = "robot" in before.touching(name), "robot" in after.touching(name)
        if touches != touched:
            events.append(f"{'contact' if touches else 'contact_lost'}:{name}")
        if (after.held == name) != (before.held == name):
            events.append(f"{'grasp' if after.held == name else 'release'}:{name}")
    return events


def _transform(values: Any) -> np.ndarray:
    return np.reshape(np.asarray(values, dtype=np.float64), (4, 4))


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
