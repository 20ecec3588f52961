"""The Google Robot of SimplerEnv, static base: what its hand needs in SAPIEN 3. Knows no task.

Its joints are always found by name: SAPIEN 3 orders them otherwise than SAPIEN 2.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import sapien

from dualvla_eval.simpler.agent import SimplerAgent
from dualvla_eval.simpler.control import Kinematics
from dualvla_eval.simpler.google_control import PlannedGripperConfig, PlannedToolConfig
from dualvla_eval.simpler.robots import GOOGLE_ROBOT

FINGERS_MEET_RAD = 1.0733  # where the original's fingertips stop each other
_HELD_SHARE = 0.27  # of its drives' torques, what a blocked finger of SAPIEN 2 passed on to what it held
_CONTROL_MODE = (
    "arm_pd_ee_delta_pose_align_interpolate_by_planner_gripper_pd_joint_target_delta_pos_interpolate_by_planner"
)


class _ChainKinematics(Kinematics):
    """Of the loaded articulation: Pinocchio refuses the file, whose fixed wheels have infinite limits."""

    def __init__(self, robot: Any, tool: str, joints: tuple[str, ...]):
        self._model = robot._objs[0].create_pinocchio_model()
        self._tool = [link.name for link in robot.links].index(tool)
        self._mask = np.array([joint.name in joints for joint in robot.active_joints])


class GoogleRobot(SimplerAgent):
    uid = "simpler_google_robot"
    spec = replace(GOOGLE_ROBOT, finger_drives=GOOGLE_ROBOT.finger_drives.scaled(_HELD_SHARE))
    grasp_angle_deg = 80.0
    unrotated = ((0.0, -1.0, 0.0), (-1.0, 0.0, 0.0), (0.0, 0.0, -1.0))  # pointing straight down
    # Links of each side with the sign of the y axis along which the object pushes.
    grasp_sides = tuple(((f"link_finger_{side}", f"link_finger_tip_{side}"), 1.0) for side in ("left", "right"))

    def _after_loading_articulation(self) -> None:
        super()._after_loading_articulation()
        self._limits = {joint.name: joint.limits[0].cpu().numpy().reshape(2) for joint in self.robot.active_joints}
        self.kinematics = _ChainKinematics(self.robot, self.spec.tool, self.spec.arm_joints)

    @property
    def _controller_configs(self) -> dict[str, Any]:
        joints, fingers = self.spec.arm_joints, self.spec.finger_joints
        arm = PlannedToolConfig(list(joints), self, self.spec.arm_drives, self._limits_of(joints))
        gripper = PlannedGripperConfig(list(fingers), self.spec.finger_drives, self._limits_of(fingers))
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
        _, closed = self._limits[self.spec.finger_joints[0]]
        return np.clip(1 - self.controller.controllers["gripper"].goals.mean(axis=1) / closed, 0, 1)

    def target_poses(self) -> list[sapien.Pose]:
        return list(self.controller.controllers["arm"].targets)
