"""Suite `blocks` in SAPIEN: a Panda arm, coloured blocks, one camera, 5 Hz. Knows tasks; nothing of policies or files.

Raw SAPIEN rather than mani_skill's BaseEnv, whose step costs ten times as much (benchmarks/blocks_env.py). Every reset
builds its scene from nothing (8 ms), so that an episode depends on its seed alone and never on the episodes before it,
to the last bit.
"""

from __future__ import annotations

import os
import string
from importlib import resources
from typing import Any

import gymnasium
import numpy as np
import sapien

from dualvla.errors import PlatformError, PolicyError
from dualvla_eval.sim.base import ObjectState, SceneState
from dualvla_eval.sim.looks import Look, look_of
from dualvla_eval.sim.panda import ACTION_SIZE, MAX_STEP_M, Panda, material
from dualvla_eval.suites import Episode
from dualvla_eval.tasks.blocks import BIN, BIN_WALL_M, COLORS, Layout, ObjectSpec, get_task, sample_layout

CONTROL_HZ = 5.0
IMAGE_SIZE = 64
PROPRIO_SIZE = 4

_PHYSICS_HZ = 100
_SUBSTEPS = int(_PHYSICS_HZ / CONTROL_HZ)
_CONTACT_EVERY = 4  # substeps between looks at the contacts: 25 times a second
_BIN_COLOR = (0.10, 0.07, 0.05)
_TABLE_HALF_M = [3.0, 3.0, 0.05]  # fills the picture
_BLOCK_DENSITY = 400.0  # kg / m^3: wood
_STILL_M = 0.002
_LIFT_EVENT_M = 0.02
_HOLDING_OPENING = 0.3  # fingers that are closed press on an object together without holding it


class BlocksEnv(gymnasium.Env):
    """One episode after another, each given by `options={"episode": Episode}`.

    Action: see `Panda.command`. proprio: tool position x, y, z (m) and gripper opening (0..1).
    Raises: PlatformError without a Vulkan device.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": int(CONTROL_HZ)}
    render_mode = "rgb_array"

    def __init__(self, image_size: int = IMAGE_SIZE):
        self._image_size = image_size
        box = gymnasium.spaces.Box
        self.observation_space = gymnasium.spaces.Dict(
            {
                "images": gymnasium.spaces.Dict({"main": box(0, 255, (image_size, image_size, 3), np.uint8)}),
                "instruction": gymnasium.spaces.Text(200, charset=string.ascii_lowercase + " "),
                "proprio": box(-1, 1, (PROPRIO_SIZE,), np.float32),
                "ee_pose": box(-2 * np.pi, 2 * np.pi, (6,), np.float64),
                "gripper": box(0, 1, (1,), np.float64),
            }
        )
        bound = np.array([MAX_STEP_M] * 3 + [np.pi] * 3)
        self.action_space = box(np.append(-bound, 0.0), np.append(bound, 1.0), (ACTION_SIZE,), np.float64)
        self._scene: sapien.Scene | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """options: "episode": Episode, and "layout": Layout, a scene of one's own instead of the episode's.

        Without an episode: task touch, with a scene drawn from `seed`.
        """
        super().reset(seed=seed)
        episode: Episode | None = (options or {}).get("episode")
        if episode is None:
            episode = Episode("blocks", "touch", "base", 0, int(self.np_random.integers(2**32)))
        self._task = get_task(episode.task)
        self._layout = (options or {}).get("layout") or sample_layout(self._task, episode.seed)
        self._look = look_of(episode.variant, episode.seed)
        self._build_scene(self._layout, self._look)
        self._step = 0
        self._touched: list[str] = []
        self._initial_positions: dict[str, tuple[float, ...]] = {}
        self._success = False
        self._failure: str | None = None
        self._advance(_SUBSTEPS)  # the blocks settle
        self._state = self._read_state(previous=None)
        return self._observe(), self._info([])

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """May be called after success too: a demonstration goes a little deeper than the test asks."""
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (ACTION_SIZE,) or not np.isfinite(action).all():
            raise PolicyError(f"The action {action} is not {ACTION_SIZE} finite numbers.", "see its action space")
        self._robot.command(action)
        self._advance(_SUBSTEPS)
        self._step += 1
        before, self._state = self._state, self._read_state(self._state)
        if self._failure is None and not self._success:
            self._failure = self._task.failure(self._state)
            self._success = self._failure is None and self._task.success(self._state)
        terminated = self._success or self._failure is not None
        truncated = not terminated and self._step >= self._task.max_steps
        events = _events(before, self._state)
        return self._observe(), float(self._success), terminated, truncated, self._info(events)

    def state(self) -> SceneState:
        return self._state

    def instruction_for(self, target: str) -> str:
        """This episode's sentence about another object of the scene."""
        return self._layout.instruction(target)

    def render(self, size: int | None = None) -> np.ndarray:
        """The camera's picture, uint8 [size, size, 3]. What a policy sees is not changed by it."""
        assert self._scene is not None, "reset comes first"
        if size is None or size == self._image_size:
            return self._picture(self._camera)
        if size not in self._extra_cameras:
            self._extra_cameras[size] = _add_camera(self._scene, f"render-{size}", size, self._look)
        return self._picture(self._extra_cameras[size])

    def project(self, position: np.ndarray) -> np.ndarray:
        """[x, y, z] m, base frame -> [u, v] in the picture, 0..1, u to the right, v down; clipped to the picture."""
        axes = _camera_axes(self._look)
        forward, left, up = axes.T @ (np.asarray(position) - self._look.camera_eye_m)
        half = np.tan(self._look.camera_fov_rad / 2) * forward
        return np.clip([(1 - left / half) / 2, (1 - up / half) / 2], 0, 1).astype(np.float32)

    def close(self) -> None:
        self._scene = None

    # --- the scene ----------------------------------------------------------------------------------------------------

    def _build_scene(self, layout: Layout, look: Look) -> None:
        _configure_engine()
        try:
            scene = sapien.Scene([sapien.physx.PhysxCpuSystem(), sapien.render.RenderSystem()])
        except RuntimeError as error:
            raise PlatformError(f"No Vulkan device renders here: {error}.", "run `dualvla doctor`") from error
        scene.timestep = 1 / _PHYSICS_HZ
        scene.set_ambient_light(look.ambient)
        scene.add_directional_light(look.light_direction, look.light, shadow=False)
        table = scene.create_actor_builder()
        table.add_box_collision(sapien.Pose([0.5, 0, -0.05]), _TABLE_HALF_M)
        table.add_box_visual(sapien.Pose([0.5, 0, -0.05]), _TABLE_HALF_M, material(look.table))
        self._names = {table.build_static("table"): "table"}
        self._objects: dict[str, sapien.Entity] = {}
        for spec in layout.objects:
            entity = _add_bin(scene, spec) if spec.name == BIN else _add_block(scene, spec)
            self._objects[spec.name] = entity
            self._names[entity] = spec.name
        self._robot = Panda(scene, layout.start_position)
        self._names.update(dict.fromkeys(self._robot.entities, "robot"))
        self._camera = _add_camera(scene, "main", self._image_size, look)
        self._extra_cameras: dict[int, Any] = {}
        self._scene = scene

    def _advance(self, substeps: int) -> None:
        assert self._scene is not None
        for i in range(1, substeps + 1):
            self._scene.step()
            if i % _CONTACT_EVERY == 0:
                self._pairs, self._finger_pairs = self._contacts()
                for pair in sorted(self._pairs):  # sorted: the order of a set of strings differs between processes
                    if "robot" in pair:
                        (other,) = set(pair) - {"robot"}
                        if other not in ("table", BIN, *self._touched):
                            self._touched.append(other)

    def _contacts(self) -> tuple[frozenset[tuple[str, str]], set[tuple[int, str]]]:
        """Pairs of touching names, and (finger, name) for both fingers."""
        assert self._scene is not None
        pairs, fingers = set(), set()
        for contact in self._scene.get_contacts():
            a, b = (body.entity for body in contact.bodies)
            first, second = self._names[a], self._names[b]
            if first == second or not any(np.any(p.impulse) for p in contact.points):
                continue
            pairs.add((min(first, second), max(first, second)))
            for i, finger in enumerate(self._robot.fingers):
                if finger in (a, b):
                    fingers.add((i, second if a == finger else first))
        return frozenset(pairs), fingers

    def _read_state(self, previous: SceneState | None) -> SceneState:
        objects = tuple(self._read_object(spec) for spec in self._layout.objects)
        moved = previous is not None and any(
            np.linalg.norm(np.subtract(o.position, p.position)) > _STILL_M
            for o, p in zip(objects, previous.objects, strict=True)
        )
        held = None
        if self._robot.closing and self._robot.opening > _HOLDING_OPENING:
            held = next((o.name for o in objects if {(0, o.name), (1, o.name)} <= self._finger_pairs), None)
        return SceneState(
            task=self._task.name,
            instruction=self._layout.instruction(),
            target=self._layout.target,
            reference=self._layout.reference,
            step=self._step,
            objects=objects,
            ee_pose=_floats(self._robot.ee_pose),
            gripper=self._robot.opening,
            contacts=tuple(sorted(self._pairs)),
            held=held,
            touched=tuple(self._touched),
            still=not moved,
        )

    def _read_object(self, spec: ObjectSpec) -> ObjectState:
        pose = self._objects[spec.name].pose
        position = _floats(pose.p)
        return ObjectState(
            name=spec.name,
            shape=spec.shape,
            color=spec.color,
            position=position,
            initial_position=self._initial_positions.setdefault(spec.name, position),
            yaw_rad=_yaw(pose.q),
            size=spec.size,
        )

    def _observe(self) -> dict[str, Any]:
        return {
            "images": {"main": self._picture(self._camera)},
            "instruction": self._state.instruction,
            "proprio": np.array([*self._state.ee_pose[:3], self._state.gripper], dtype=np.float32),
            "ee_pose": np.array(self._state.ee_pose),
            # As commanded: fingers on a block stay more than half open, and Eq. 4 asks when the gripper flips.
            "gripper": np.array([0.0 if self._robot.closing else 1.0]),
        }

    def _picture(self, camera: Any) -> np.ndarray:
        assert self._scene is not None
        self._scene.update_render()
        camera.take_picture()
        return np.ascontiguousarray(camera.get_picture("Color")[..., :3])

    def _info(self, events: list[str]) -> dict[str, Any]:
        return {"success": self._success, "failure": self._failure, "events": events}


def _configure_engine() -> None:
    """SAPIEN keeps these for the process. What is set here holds for the scenes and cameras made afterwards."""
    os.environ.setdefault("LP_NUM_THREADS", "1")  # the software renderer is faster at 64 px without threads
    sapien.physx.set_scene_config(enable_enhanced_determinism=True)
    # SAPIEN's own shaders give the same picture (at most 1/255 off), but take 6 s of CPU to compile in every process.
    sapien.render.set_camera_shader_dir(str(resources.files("dualvla_eval.sim") / "shaders"))
    sapien.render.set_picture_format("Color", "r8g8b8a8unorm")


def _camera_axes(look: Look) -> np.ndarray:
    """Columns: forward, left, up of the camera, base frame."""
    forward = np.subtract(look.camera_target_m, look.camera_eye_m)
    forward = forward / np.linalg.norm(forward)
    left = np.cross([0.0, 0.0, 1.0], forward)
    left = left / np.linalg.norm(left)
    return np.stack([forward, left, np.cross(forward, left)], axis=1)


def _add_camera(scene: sapien.Scene, name: str, size: int, look: Look) -> Any:
    pose = np.eye(4)
    pose[:3, :3] = _camera_axes(look)
    pose[:3, 3] = look.camera_eye_m
    camera = scene.add_camera(name, size, size, look.camera_fov_rad, 0.05, 5.0)
    camera.entity.set_pose(sapien.Pose(pose))
    return camera


def _add_block(scene: sapien.Scene, spec: ObjectSpec) -> sapien.Entity:
    assert spec.color is not None
    half = spec.size[0] / 2
    paint = material(COLORS[spec.color])
    upright = sapien.Pose(q=[np.sqrt(0.5), 0, np.sqrt(0.5), 0])  # SAPIEN's cylinders lie along x
    builder = scene.create_actor_builder()
    if spec.shape == "cube":
        builder.add_box_collision(half_size=[half] * 3, density=_BLOCK_DENSITY)
        builder.add_box_visual(half_size=[half] * 3, material=paint)
    elif spec.shape == "cylinder":
        builder.add_cylinder_collision(upright, half, half, density=_BLOCK_DENSITY)
        builder.add_cylinder_visual(upright, half, half, material=paint)
    else:
        builder.add_sphere_collision(radius=half, density=_BLOCK_DENSITY)
        builder.add_sphere_visual(radius=half, material=paint)
    yaw = [np.cos(spec.yaw_rad / 2), 0, 0, np.sin(spec.yaw_rad / 2)]
    builder.set_initial_pose(sapien.Pose(spec.position, yaw))
    entity = builder.build(spec.name)
    body = entity.find_component_by_type(sapien.physx.PhysxRigidDynamicComponent)
    body.angular_damping = 5.0  # a sphere that was brushed comes to rest
    body.linear_damping = 0.5
    return entity


def _add_bin(scene: sapien.Scene, spec: ObjectSpec) -> sapien.Entity:
    """Four fixed walls on the table."""
    x, y, z = (s / 2 for s in spec.size)
    wall = BIN_WALL_M / 2
    builder = scene.create_actor_builder()
    for center, half in (
        ([x - wall, 0, 0], [wall, y, z]),
        ([wall - x, 0, 0], [wall, y, z]),
        ([0, y - wall, 0], [x, wall, z]),
        ([0, wall - y, 0], [x, wall, z]),
    ):
        builder.add_box_collision(sapien.Pose(center), half)
        builder.add_box_visual(sapien.Pose(center), half, material(_BIN_COLOR))
    builder.add_box_visual(sapien.Pose([0, 0, 0.002 - z]), [x, y, 0.001], material(_BIN_COLOR))
    builder.set_initial_pose(sapien.Pose(spec.position))
    return builder.build_static(spec.name)


def _events(before: SceneState, after: SceneState) -> list[str]:
    """What happened within one control step, in a fixed order."""
    events = []
    for old, new in zip(before.objects, after.objects, strict=True):
        name = new.name
        touched, touches = "robot" in before.touching(name), "robot" in after.touching(name)
        brushed = name in after.touched and name not in before.touched
        if (touches and not touched) or (brushed and not touches):
            events.append(f"contact:{name}")
        if (touched and not touches) or (brushed and not touches):
            events.append(f"contact_lost:{name}")
        if after.held == name and before.held != name:
            events.append(f"grasp:{name}")
        if after.held == name and old.lifted_m <= _LIFT_EVENT_M < new.lifted_m:
            events.append(f"lift:{name}")
        if before.held == name and after.held != name:
            events.append(f"release:{name}")
        support, supported = before.touching(name) - {"robot"}, after.touching(name) - {"robot"}
        if supported and not support and after.step > 1:
            events += [f"place:{name}"]
    return events


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


def _yaw(quaternion: np.ndarray) -> float:
    w, x, y, z = (float(v) for v in quaternion)
    return float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))
