"""The Panda arm of the mani_skill wheel in a SAPIEN scene, moved by position deltas of its tool. Knows no task.

Its collision meshes serve as visuals: the stock ones cost ten times more to render than everything else in the scene.
The tool stays vertical: the orientation is locked in the inverse kinematics.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import sapien

from dualvla.errors import PlatformError

ACTION_SIZE = 7
MAX_STEP_M = 0.03
FINGERS = ("panda_leftfinger", "panda_rightfinger")

_REST_QPOS = np.array([0, np.pi / 8, 0, -np.pi * 5 / 8, 0, np.pi * 3 / 4, np.pi / 4, 0.04, 0.04])
_TOOL = "panda_hand_tcp"
_TOOL_DOWN = [0.0, 1.0, 0.0, 0.0]  # w, x, y, z
_FINGER_RANGE_M = 0.04
_STIFFNESS, _DAMPING, _FORCE_LIMIT = 1000.0, 100.0, 100.0
# Where the tool may go. The fingertips reach 1 cm beyond the tool centre point, so that they stay off the table.
_TOOL_LOW_M, _TOOL_HIGH_M = np.array([0.30, -0.32, 0.015]), np.array([0.76, 0.30, 0.40])
_IK_ITERATIONS = 200


def urdf_path() -> Path:
    """Raises: PlatformError without mani_skill, whose wheel carries the robot."""
    spec = find_spec("mani_skill")
    if spec is None or not spec.submodule_search_locations:
        raise PlatformError("The robot model comes with 'mani_skill', which is missing.", 'pip install "dualvla[sim]"')
    return Path(spec.submodule_search_locations[0]) / "assets" / "robots" / "panda" / "panda_v2.urdf"


class Panda:
    """The arm in one scene. Base at the origin: the base frame is the world frame."""

    def __init__(self, scene: sapien.Scene, start_position: tuple[float, float, float]):
        self._robot = _build(scene)
        for link in self._robot.links:
            link.disable_gravity = True
        names = [link.name for link in self._robot.links]
        self._tool_index = names.index(_TOOL)
        self._tool = self._robot.links[self._tool_index].entity
        self.fingers = tuple(self._robot.links[names.index(name)].entity for name in FINGERS)
        self.entities = frozenset(link.entity for link in self._robot.links)
        self._joints = self._robot.active_joints
        for joint in self._joints:
            joint.set_drive_properties(_STIFFNESS, _DAMPING, _FORCE_LIMIT)
        self._model = self._robot.create_pinocchio_model()
        self._arm_mask = np.array([1] * 7 + [0] * 2)
        self.closing = False

        self._robot.set_qpos(_REST_QPOS)
        qpos = self._solve(np.array(start_position))
        self._robot.set_qpos(qpos)
        self._drive(qpos, opening=1.0)

    def command(self, action: np.ndarray) -> None:
        """action [7]: dx, dy, dz (m, base frame, shortened to MAX_STEP_M), three ignored rotations, gripper.

        The gripper opens from 0.5 on, and closes below.
        The target is relative to where the tool is now, so that a policy that sees the tool sees all there is to know.
        """
        delta = action[:3]
        length = float(np.linalg.norm(delta))
        if length > MAX_STEP_M:
            delta = delta * (MAX_STEP_M / length)
        target = np.clip(self.position + delta, _TOOL_LOW_M, _TOOL_HIGH_M)
        self.closing = bool(action[6] < 0.5)
        self._drive(self._solve(target), opening=0.0 if self.closing else 1.0)

    @property
    def position(self) -> np.ndarray:
        """Tool centre point [3], m."""
        return np.asarray(self._tool.pose.p, dtype=np.float64)

    @property
    def ee_pose(self) -> np.ndarray:
        """[6]: m and extrinsic XYZ Euler rad. Roll is in [0, 2 pi): a vertical tool has pi, and must not jump there."""
        w, x, y, z = (float(v) for v in self._tool.pose.q)
        roll = np.arctan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y)) % (2 * np.pi)
        pitch = np.arcsin(np.clip(2 * (w * y - z * x), -1, 1))
        yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
        return np.array([*self.position, roll, pitch, yaw])

    @property
    def opening(self) -> float:
        """0 closed, 1 open."""
        return float(np.clip(np.mean(self._robot.get_qpos()[-2:]) / _FINGER_RANGE_M, 0, 1))

    def _solve(self, position: np.ndarray) -> np.ndarray:
        qpos, _, _ = self._model.compute_inverse_kinematics(
            self._tool_index,
            sapien.Pose(position, _TOOL_DOWN),
            initial_qpos=self._robot.get_qpos().astype(np.float64),
            active_qmask=self._arm_mask,
            max_iterations=_IK_ITERATIONS,
        )
        return qpos

    def _drive(self, qpos: np.ndarray, opening: float) -> None:
        for joint, value in zip(self._joints[:7], qpos[:7], strict=True):
            joint.set_drive_target(float(value))
        for joint in self._joints[7:]:
            joint.set_drive_target(opening * _FINGER_RANGE_M)


def material(color: tuple[float, float, float]) -> sapien.render.RenderMaterial:
    made = sapien.render.RenderMaterial()
    made.base_color = [*color, 1.0]
    return made


def _build(scene: sapien.Scene) -> sapien.physx.PhysxArticulation:
    loader = scene.create_urdf_loader()
    loader.set_material(2.0, 2.0, 0.0)
    builder = loader.load_file_as_articulation_builder(str(urdf_path()))
    for link in builder.link_builders:
        dark = link.name in FINGERS
        for record in link.visual_records:
            record.filename = record.filename.replace("visual", "collision").replace(".glb", ".stl")
            record.material = material((0.2, 0.2, 0.22) if dark else (0.85, 0.85, 0.87))
    return builder.build(fix_root_link=True)
