"""What the controllers of both robots are made of: driven joints, inverse kinematics. Knows no robot."""

from __future__ import annotations

from typing import Any

import numpy as np
import sapien
import torch
from gymnasium import spaces
from mani_skill.agents.controllers.base_controller import BaseController
from sapien.wrapper.pinocchio_model import PinocchioModel

_IK_ITERATIONS = 100


class JointController(BaseController):
    """What all of SimplerEnv's controllers share: PD drives of some joints, and an action that nothing clips."""

    sets_target_qpos = True
    sets_target_qvel = False
    config: Any

    def _initialize_action_space(self) -> None:
        self.single_action_space = spaces.Box(-np.inf, np.inf, (self.config.action_size,), np.float32)

    def set_drive_property(self) -> None:
        """With the damping that SAPIEN 2's drives have in effect: it steps them at once, SAPIEN 3 in 25 parts.

        An implicit step of dt follows its target as damping + stiffness * dt / 2 does in small ones.
        """
        drives, lag_s = self.config.drives, self.scene.timestep / 2
        for joint, stiffness, damping, limit in zip(
            self.joints, drives.stiffness, drives.damping, drives.force_limit, strict=True
        ):
            joint.set_drive_properties(stiffness, damping + stiffness * lag_s, force_limit=limit, mode="force")
            joint.set_friction(0.0)

    def _drive_to(self, targets: np.ndarray) -> None:
        """targets: [N, joints]; what is sent is clipped to the joints' limits, as SAPIEN 2 did by itself."""
        limits = self.articulation.get_qlimits()[0, self.active_joint_indices].cpu().numpy()
        sent = torch.as_tensor(np.clip(targets, limits[:, 0], limits[:, 1]), dtype=torch.float32)
        self.articulation.set_joint_drive_targets(sent, self.joints, self.active_joint_indices)


class Kinematics:
    """Joints for a tool pose, by Pinocchio from the current joints, as in the original."""

    def __init__(self, urdf_path: str, robot: Any, tool: str, joints: tuple[str, ...]):
        with open(urdf_path) as file:
            self._model = PinocchioModel(file.read(), [0, 0, -9.81])
        names = [joint.name for joint in robot.active_joints]
        links = [link.name for link in robot.links]
        self._model.set_joint_order(names)
        self._model.set_link_order(links)
        self._tool = links.index(tool)
        self._mask = np.array([name in joints for name in names])

    def solve(self, pose: sapien.Pose, qpos: np.ndarray) -> np.ndarray:
        """pose: in the base frame. qpos [joints] -> the joints that reach it, or `qpos` if none were found."""
        found, success, _ = self._model.compute_inverse_kinematics(
            self._tool, pose, initial_qpos=qpos, active_qmask=self._mask, max_iterations=_IK_ITERATIONS
        )
        return np.asarray(found if success else qpos, dtype=np.float64)
