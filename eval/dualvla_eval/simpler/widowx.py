"""The WidowX 250 S of SimplerEnv: its arm and gripper controllers. Knows no task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.agents.controllers.base_controller import ControllerConfig

from dualvla_eval.simpler.agent import SimplerAgent
from dualvla_eval.simpler.control import JointController, Kinematics
from dualvla_eval.simpler.motion import quaternion
from dualvla_eval.simpler.robots import WIDOWX, WIDOWX_OPENING_M, Drives


class ToolTargetController(JointController):
    """`ee_target_delta_pose_align2`: turns the last *target* pose about the current tool tip and moves it.

    target = T(p) D T(p)^-1 target, where p is the current position of the tool and D the commanded motion, all in the
    frame of the base. The joints that reach it are commanded at once. Where none are found within 100 iterations, the
    arm holds, but the target moves on: both as in the original.
    """

    def reset(self) -> None:
        self.targets = self.config.agent.tool_poses()

    def set_action(self, action: torch.Tensor) -> None:
        commands = action.cpu().numpy().astype(np.float64)
        qpos = self.articulation.get_qpos().cpu().numpy()
        goals = []
        for i, tool in enumerate(self.config.agent.tool_poses()):
            at_tip = sapien.Pose(tool.p)
            motion = sapien.Pose(commands[i, :3], quaternion(commands[i, 3:6]))
            self.targets[i] = at_tip * motion * at_tip.inv() * self.targets[i]
            goals.append(self.config.agent.kinematics.solve(self.targets[i], qpos[i]))
        self._drive_to(np.stack(goals)[:, self.active_joint_indices.cpu().numpy()])

    def get_state(self) -> dict[str, torch.Tensor]:
        poses = [np.concatenate([target.p, target.q]) for target in self.targets]
        return {"target_pose": torch.as_tensor(np.stack(poses))}


class GripperController(JointController):
    """Both fingers to the same place: -1 closed, +1 open. commanded: [N], 0 closed to 1 open."""

    def reset(self) -> None:
        self.commanded = np.ones(self.scene.num_envs)

    def set_action(self, action: torch.Tensor) -> None:
        low, high = WIDOWX_OPENING_M
        self.commanded = (np.clip(action.cpu().numpy()[:, 0], -1, 1) + 1) / 2
        goal = (low + self.commanded * (high - low))[:, None]
        self._drive_to(np.repeat(goal, len(self.joints), axis=1))


@dataclass
class ToolTargetConfig(ControllerConfig):
    agent: Any = None
    drives: Drives = WIDOWX.arm_drives
    action_size: int = 6
    controller_cls = ToolTargetController


@dataclass
class GripperConfig(ControllerConfig):
    drives: Drives = WIDOWX.finger_drives
    action_size: int = 1
    controller_cls = GripperController


class WidowX(SimplerAgent):
    uid = "simpler_widowx"
    spec = WIDOWX
    # BridgeData's: the tool that points down, its fingers across, is not rotated.
    unrotated = ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (-1.0, 0.0, 0.0))
    grasp_angle_deg = 60.0
    grasp_sides = ((("left_finger_link",), 1.0), (("right_finger_link",), -1.0))

    def _after_loading_articulation(self) -> None:
        super()._after_loading_articulation()
        self.kinematics = Kinematics(str(self.urdf_path), self.robot, self.spec.tool, self.spec.arm_joints)

    @property
    def _controller_configs(self) -> dict[str, Any]:
        return {
            "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos": {
                "arm": ToolTargetConfig(list(self.spec.arm_joints), agent=self),
                "gripper": GripperConfig(list(self.spec.finger_joints)),
            }
        }

    def target_poses(self) -> list[sapien.Pose]:
        return self.controller.controllers["arm"].targets

    def native_action(self, action: np.ndarray) -> np.ndarray:
        native = np.array(action, dtype=np.float64)
        native[6] = 2 * native[6] - 1
        return native

    def commanded_openings(self) -> np.ndarray:
        return self.controller.controllers["gripper"].commanded

    def openings(self) -> np.ndarray:
        low, high = WIDOWX_OPENING_M
        fingers = self.qpos()[:, self._gripper_indices].mean(axis=1)
        return np.clip((fingers - low) / (high - low), 0, 1)
