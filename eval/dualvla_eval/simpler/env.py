"""The suites `simpler-*` behind the `SimEnv` protocol: one episode after another in one process.

Knows the scenes, the success tests and the overlay; nothing of policies or files of results. Every episode gets a scene
of its own, so that it depends on its set-up and its actions alone, to the last bit.
"""

from __future__ import annotations

import gc
import string
from functools import cache
from typing import Any

import gymnasium
import numpy as np
import sapien
from PIL import Image
from scipy.spatial.transform import Rotation

from dualvla.errors import PlatformError, PolicyError
from dualvla_eval.sim.base import ObjectState, SceneState
from dualvla_eval.simpler import episodes, google_station
from dualvla_eval.simpler.assets import Assets
from dualvla_eval.simpler.rules import Rules, Verdict, rules_for
from dualvla_eval.simpler.specs import EpisodeSetup
from dualvla_eval.simpler.task_env import SimplerTask
from dualvla_eval.simpler.world import Body, World
from dualvla_eval.suites import Episode

ACTION_SIZE = 7
PROPRIO_SIZE = 7
_STILL_M = 0.002
_LIFT_EVENT_M = 0.02
_GREY = 40  # beside a picture that is not square


class SimplerEnv(gymnasium.Env):
    """One episode after another, each given by `options={"episode": Episode}` or `{"setup": EpisodeSetup}`.

    Action [7]: space "ee_delta_pose+gripper". `terminated` is never set: the original's episodes run until the policy
    or the clock ends them, and the success in `info` is that of the instant. proprio: tool position (m) and extrinsic
    XYZ Euler angles (rad) in the base frame, measured gripper opening (0..1); gripper: as commanded last.
    Raises: DataError without the assets; PlatformError without a Vulkan device.
    """

    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"

    def __init__(self, assets: Assets | None = None, width: int = 640, height: int = 480):
        _spare_what_is_loaded()
        self._assets = assets or Assets.find()
        box = gymnasium.spaces.Box
        self.observation_space = gymnasium.spaces.Dict(
            {
                "images": gymnasium.spaces.Dict({"main": box(0, 255, (height, width, 3), np.uint8)}),
                "instruction": gymnasium.spaces.Text(200, charset=string.ascii_lowercase + string.digits + " "),
                "proprio": box(-np.inf, np.inf, (PROPRIO_SIZE,), np.float32),
                "ee_pose": box(-np.inf, np.inf, (6,), np.float64),
                "gripper": box(0, 1, (1,), np.float64),
            }
        )
        bound = np.array([np.inf] * 6)
        self.action_space = box(np.append(-bound, 0.0), np.append(bound, 1.0), (ACTION_SIZE,), np.float64)
        self._task: SimplerTask | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """seed: ignored; the episode says all."""
        super().reset(seed=seed)
        setup: EpisodeSetup | None = (options or {}).get("setup")
        if setup is None:
            episode: Episode = (options or {})["episode"]
            setup = episodes.setup(episode)
        self.close()
        try:
            self._task = SimplerTask([setup], self._assets)
        except RuntimeError as error:
            raise PlatformError(f"No Vulkan device renders here: {error}.", "run `dualvla doctor`") from error
        self._setup = setup
        self._phrases = {spec.model: spec.phrase for spec in setup.objects if not spec.locked}
        self._world = World(self._task)
        self._rules: Rules = rules_for(self._world)
        self._drawers = {} if self._task.station is None else google_station.fronts(self._task.station)
        self._verdict = Verdict(False)
        self._step = 0
        self._touched: list[str] = []
        self._state = self._read_state(previous=None)
        self._picture = self._task.pictures()[0]
        return self._observe(), self._info([])

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Raises: PolicyError for an action that is not seven finite numbers."""
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (ACTION_SIZE,) or not np.isfinite(action).all():
            raise PolicyError(f"The action {action} is not {ACTION_SIZE} finite numbers.", "see its action space")
        return self.step_native(self.task.agent.native_action(action))

    def step_native(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """As `step`, with the original's own gripper dimension."""
        self._rules.before_step(self._step)
        self.task.step(np.asarray(action, dtype=np.float32))
        self._step += 1
        self._world.read()
        self._verdict = self._rules.judge()
        before, self._state = self._state, self._read_state(self._state)
        self._picture = self.task.pictures()[0]
        success = self._verdict.success
        truncated = self._step >= self._setup.max_steps
        return self._observe(), float(success), False, truncated, self._info(_events(before, self._state))

    def state(self) -> SceneState:
        return self._state

    @property
    def task(self) -> SimplerTask:
        assert self._task is not None, "reset comes first"
        return self._task

    @property
    def world(self) -> World:
        return self._world

    def instruction_for(self, target: str) -> str:
        """This episode's sentence about another object of the scene; about the reference, both change places."""
        mark, state = "\0", self._state
        text = self._instruction.replace(target, mark).replace(state.target, target)
        return text.replace(mark, state.target)

    def render(self, size: int | None = None) -> np.ndarray:
        """The policy's picture, uint8 [H, W, 3]; with a size, fitted into [size, size, 3]."""
        if size is None:
            return self._picture
        image = Image.fromarray(self._picture)
        image.thumbnail((size, size), Image.Resampling.BOX)
        canvas = Image.new("RGB", (size, size), (_GREY,) * 3)
        canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        return np.asarray(canvas)

    def project(self, position: np.ndarray) -> np.ndarray:
        """[x, y, z] m, base frame -> [u, v] in the picture, 0..1, u to the right, v down; clipped to the picture."""
        camera = self._setup.camera
        x, y, z = (self._camera_pose().inv() * self._base() * sapien.Pose(np.asarray(position, dtype=np.float32))).p
        depth = max(float(x), camera.near_m)
        u = (camera.center_px[0] - camera.focal_px * y / depth) / camera.width
        v = (camera.center_px[1] - camera.focal_px * z / depth) / camera.height
        return np.clip([u, v], 0, 1).astype(np.float32)

    def close(self) -> None:
        if self._task is not None:
            self._task.close()
            self._task = None

    # --- what is known ------------------------------------------------------------------------------------------------

    @property
    def _instruction(self) -> str:
        return self._setup.instructions[self._rules.instruction]

    def _base(self) -> sapien.Pose:
        pose = self._setup.robot.pose
        return sapien.Pose(pose.position, pose.rotation)

    def _camera_pose(self) -> sapien.Pose:
        pose = self._setup.camera.pose
        link = self.task.agent.robot.links_map[self._setup.camera.link]._objs[0].entity.pose
        return link * sapien.Pose(pose.position, np.asarray(pose.rotation) / np.linalg.norm(pose.rotation))

    def _read_state(self, previous: SceneState | None) -> SceneState:
        world, agent = self._world, self.task.agent
        objects = tuple(self._read_object(model, phrase) for model, phrase in self._phrases.items())
        objects += self._read_drawers()
        moved = previous is not None and any(
            np.linalg.norm(np.subtract(o.position, p.position)) > _STILL_M
            for o, p in zip(objects, previous.objects, strict=True)
        )
        pairs = {tuple(sorted((self._name(c.first), self._name(c.second)))) for c in world.contacts if c.pressed}
        contacts = tuple(sorted((a, b) for a, b in pairs if a != b))
        names = {o.name for o in objects}
        for pair in contacts:
            self._touched += [n for n in pair if "robot" in pair and n in names and n not in self._touched]
        held = next((phrase for model, phrase in self._phrases.items() if world.grasped(model)), None)
        return SceneState(
            task=self._setup.task,
            instruction=self._instruction,
            target=self._phrases.get(self._setup.source or "", self._setup.source or ""),
            reference=self._phrases.get(self._setup.target or "", self._setup.target),
            step=self._step,
            objects=objects,
            ee_pose=self._pose6(agent.tool_poses()[0]),
            gripper=float(agent.openings()[0]),
            contacts=contacts,
            held=held,
            touched=tuple(self._touched),
            still=not moved,
            ee_target=self._pose6(agent.target_poses()[0]),
        )

    def _pose6(self, pose: sapien.Pose) -> tuple[float, ...]:
        """m and extrinsic XYZ Euler angles, rad, from the robot's `unrotated`."""
        turned = pose.to_transformation_matrix()[:3, :3] @ np.transpose(self.task.agent.unrotated)
        return _floats(np.concatenate([pose.p, Rotation.from_matrix(turned).as_euler("xyz")]))

    def _name(self, body: Body) -> str:
        """What a judge calls it."""
        if body.kind == "object":
            return self._phrases.get(body.name, "table")
        drawer = body.name.replace("_", " ")
        if drawer in self._drawers:
            return drawer
        return {"robot": "robot", "stage": "table", "station": "cabinet"}[body.kind]

    def _read_object(self, model: str, phrase: str) -> ObjectState:
        world, base = self._world, self._base().inv()
        x, y = (base * world.pose(model)).to_transformation_matrix()[:2, 0]
        return ObjectState(
            name=phrase,
            shape=phrase.rsplit(" ", 1)[-1],
            color=None,
            position=_floats((base * sapien.Pose(world.center(model))).p),
            initial_position=_floats((base * sapien.Pose(world.settled_center(model))).p),
            yaw_rad=float(np.arctan2(y, x)),
            size=_floats(world.extents[model]),
        )

    def _read_drawers(self) -> tuple[ObjectState, ...]:
        """The front plates of the cabinet's drawers, if the scene has one."""
        if self.task.station is None:
            return ()
        base = self._base().inv()
        return tuple(
            ObjectState(
                name=name,
                shape="drawer",
                color=None,
                position=_floats((base * front).p),
                initial_position=_floats((base * self._drawers[name]).p),
                yaw_rad=float(np.arctan2(*(base * front).to_transformation_matrix()[[1, 0], 0])),
                size=google_station.FRONT_SIZE_M,
            )
            for name, front in google_station.fronts(self.task.station).items()
        )

    def _observe(self) -> dict[str, Any]:
        state = self._state
        return {
            "images": {"main": self._picture},
            "instruction": state.instruction,
            "proprio": np.array([*state.ee_pose, state.gripper], dtype=np.float32),
            "ee_pose": np.array(state.ee_pose),
            "gripper": self.task.agent.commanded_openings()[:1].astype(np.float64),
        }

    def _info(self, events: list[str]) -> dict[str, Any]:
        verdict = self._verdict
        return {"success": verdict.success, "failure": verdict.failure, "events": events, "stats": dict(verdict.stats)}


@cache
def _spare_what_is_loaded() -> None:
    """mani_skill collects garbage twice an episode; looking through all that was imported takes 0.2 s each time."""
    gc.collect()
    gc.freeze()


def _events(before: SceneState, after: SceneState) -> list[str]:
    """What happened within one control step, in a fixed order."""
    events = []
    for old, new in zip(before.objects, after.objects, strict=True):
        name = new.name
        touched, touches = "robot" in before.touching(name), "robot" in after.touching(name)
        if touches and not touched:
            events.append(f"contact:{name}")
        if touched and not touches:
            events.append(f"contact_lost:{name}")
        if after.held == name and before.held != name:
            events.append(f"grasp:{name}")
        if after.held == name and old.lifted_m <= _LIFT_EVENT_M < new.lifted_m:
            events.append(f"lift:{name}")
        if before.held == name and after.held != name:
            events.append(f"release:{name}")
        support, supported = before.touching(name) - {"robot"}, after.touching(name) - {"robot"}
        if supported and not support and after.step > 1:
            events.append(f"place:{name}")
    return events


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(v) for v in values)
