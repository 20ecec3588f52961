"""The Google Robot of SimplerEnv, static base: its files, materials, drives and fingers. Knows no task.

Its joints are always found by name: SAPIEN 3 orders them otherwise than SAPIEN 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import sapien

from dualvla_eval.simpler.agent import SimplerAgent
from dualvla_eval.simpler.control import Drives, Kinematics
from dualvla_eval.simpler.google_control import PlannedGripperConfig, PlannedToolConfig

_FILE = "google_robot_meta_sim_fix_wheel_fix_fingertip"
RECOLORED = (
    "recolor_tabletop_visual_matching_1",
    "recolor_tabletop_visual_matching_2",
    "recolor_cabinet_visual_matching_1",
)
# The head belongs to the arm's controller: nothing moves it.
ARM_JOINTS = (
    "joint_torso",
    "joint_shoulder",
    "joint_bicep",
    "joint_elbow",
    "joint_forearm",
    "joint_wrist",
    "joint_gripper",
    "joint_head_pan",
    "joint_head_tilt",
)
FINGER_JOINTS = ("joint_finger_right", "joint_finger_left")
FINGERS_MEET_RAD = 1.0733  # where the original's fingertips stop each other

_ARM_DRIVES = Drives(
    stiffness=(
        1700.0,
        1737.0471680861954,
        979.975871856535,
        930.0,
        1212.154500274304,
        432.96500923932535,
        468.0013365498738,
        2000.0,
        2000.0,
    ),
    damping=(
        1059.9791902443303,
        1010.4720585373592,
        767.2803161582076,
        680.0,
        674.9946964336588,
        274.613381336198,
        340.532560578637,
        900.0,
        900.0,
    ),
    force_limit=(300.0, 300.0, *(100.0,) * 7),
)
_GRIPPER_DRIVES = Drives((200.0, 200.0), (8.0, 8.0), (60.0, 60.0))
_CONTROL_MODE = (
    "arm_pd_ee_delta_pose_align_interpolate_by_planner_gripper_pd_joint_target_delta_pos_interpolate_by_planner"
)
_SIDES = ("left", "right")
_GRIPPING = (2.0, 0.1)  # friction, patch radius in m
_NAIL = (0.1, 0.01)
_FINGER_PARTS = tuple(f"link_finger{part}_{side}" for part in ("", "_tip", "_nail") for side in _SIDES)
_SAME_GROUP = (1, 1, 1 << 5, 0)


class _ChainKinematics(Kinematics):
    """Of the loaded articulation: Pinocchio refuses the file, whose fixed wheels have infinite limits."""

    def __init__(self, robot: Any, tool: str, joints: tuple[str, ...]):
        self._model = robot._objs[0].create_pinocchio_model()
        self._tool = [link.name for link in robot.links].index(tool)
        self._mask = np.array([joint.name in joints for joint in robot.active_joints])


class GoogleRobot(SimplerAgent):
    """The fingers do not collide with each other, but each stops where they would meet.

    Contact within an articulation feeds momentum into SAPIEN 3's solver, which moved the closed hand by centimetres.
    """

    uid = "simpler_google_robot"
    urdf_files: ClassVar[Mapping[str, str]] = {
        "": f"{_FILE}.urdf",
        **{version: f"{_FILE}_{version}.urdf" for version in RECOLORED},
    }
    tool = "link_gripper_tcp"
    gripper_joints = FINGER_JOINTS
    materials: ClassVar[Mapping[str, tuple[float, float]]] = {
        part: _NAIL if "nail" in part else _GRIPPING for part in _FINGER_PARTS
    }
    collision_groups: ClassVar[Mapping[str, tuple[int, int, int, int]]] = dict.fromkeys(_FINGER_PARTS, _SAME_GROUP)
    grasp_angle_deg = 80.0
    unrotated = ((0.0, -1.0, 0.0), (-1.0, 0.0, 0.0), (0.0, 0.0, -1.0))  # pointing straight down
    # Links of each side with the sign of the y axis along which the object pushes.
    grasp_sides = tuple(((f"link_finger_{side}", f"link_finger_tip_{side}"), 1.0) for side in _SIDES)

    def _after_loading_articulation(self) -> None:
        super()._after_loading_articulation()
        self._limits = {joint.name: joint.limits[0].cpu().numpy().reshape(2) for joint in self.robot.active_joints}
        for name in FINGER_JOINTS:
            for joint in self.robot.active_joints_map[name]._objs:
                joint.set_limits([[float(self._limits[name][0]), FINGERS_MEET_RAD]])
        self.kinematics = _ChainKinematics(self.robot, self.tool, ARM_JOINTS)

    @property
    def _controller_configs(self) -> dict[str, Any]:
        arm = PlannedToolConfig(list(ARM_JOINTS), self, _ARM_DRIVES, self._limits_of(ARM_JOINTS))
        gripper = PlannedGripperConfig(list(FINGER_JOINTS), _GRIPPER_DRIVES, self._limits_of(FINGER_JOINTS))
        return {_CONTROL_MODE: {"arm": arm, "gripper": gripper}}

    def _limits_of(self, names: tuple[str, ...]) -> np.ndarray:
        """[joints, 2] rad, of the file."""
        return np.stack([self._limits[name] for name in names])

    def native_action(self, action: np.ndarray) -> np.ndarray:
        """The original's gripper is relative, and +1 closes: 1 (open) becomes -1, 0 becomes +1, 0.5 keeps the goal."""
        native = np.array(action, dtype=np.float64)
        native[6] = 1 - 2 * native[6]
        return native

    def openings(self) -> np.ndarray:
        closed = self.qpos()[:, self._gripper_indices].mean(axis=1) / FINGERS_MEET_RAD
        return np.clip(1 - closed, 0, 1)

    def commanded_openings(self) -> np.ndarray:
        _, closed = self._limits[FINGER_JOINTS[0]]
        return np.clip(1 - self.controller.controllers["gripper"].goals.mean(axis=1) / closed, 0, 1)

    def target_poses(self) -> list[sapien.Pose]:
        return list(self.controller.controllers["arm"].targets)
