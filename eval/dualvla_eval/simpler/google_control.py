"""The Google Robot's controllers: every command becomes a jerk-limited plan of the joints, followed substep by substep.

Knows mani_skill's controllers; no robot's links and no task. Both follow SimplerEnv's `..._interpolate_by_planner`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.agents.controllers.base_controller import ControllerConfig

from dualvla_eval.simpler.control import JointController
from dualvla_eval.simpler.motion import JointPath, MotionLimits, plan, quaternion
from dualvla_eval.simpler.robots import (
    GOOGLE_ARM_MOTION,
    GOOGLE_FINGER_MARGIN_RAD,
    GOOGLE_FINGER_MOTION,
    GOOGLE_FINGER_REPEAT_RAD,
    GOOGLE_FINGER_STEP_RAD,
    Drives,
)


class PlannedController(JointController):
    """Follows one `JointPath` an environment: row k is set before substep k.

    What is sent is clipped to `config.limits_rad`, as SAPIEN 2 did; what is remembered is not.
    """

    def reset(self) -> None:
        self.paths: list[JointPath] = []
        self._row = 0

    def before_simulation_step(self) -> None:
        if not self.paths:
            return
        self._row = min(self._row + 1, self._sim_steps)
        low, high = self.config.limits_rad.T
        positions = np.clip([path.positions[self._row] for path in self.paths], low, high)
        velocities = np.array([path.velocities[self._row] for path in self.paths])
        if self.scene.gpu_sim_enabled:
            self._drive_to(positions)
            if self.config.drives_velocity:
                self.articulation.set_joint_drive_velocity_targets(
                    torch.as_tensor(velocities, dtype=torch.float32), self.joints, self.active_joint_indices
                )
            return
        for i, joint in enumerate(self.joints):  # without mani_skill's tensors: 171 times a control step
            raw = joint._objs[0]
            raw.set_drive_target(positions[0, i])
            if self.config.drives_velocity:
                raw.set_drive_velocity_target(velocities[0, i])

    def _follow(self, paths: list[JointPath]) -> None:
        self.paths = paths
        self._row = 0

    def _plan(self, start: np.ndarray, velocity: np.ndarray, goal: np.ndarray) -> JointPath:
        return plan(start, velocity, goal, self.config.motion, self._sim_steps * self._control_freq, self._sim_steps)

    def _measured(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions and clipped velocities of this controller's joints, [N, joints] each."""
        speed = self.config.motion.speed
        return self._positions(), np.clip(self.qvel.cpu().numpy().astype(np.float64), -speed, speed)

    def _positions(self) -> np.ndarray:
        """[N, joints], rad."""
        return self.qpos.cpu().numpy().astype(np.float64)


class PlannedToolController(PlannedController):
    """`ee_delta_pose_align_interpolate_by_planner`: a motion relative to the *measured* tool pose.

    The goal is p + dp, dq * q in the frame of the base; the plan, however, starts from the last planned waypoint and
    its planned velocity, not from where the joints are. Joints that find no solution within 100 iterations hold.
    targets: the goals, one an environment.
    """

    def reset(self) -> None:
        super().reset()
        self.targets = self.config.agent.tool_poses()

    def set_action(self, action: torch.Tensor) -> None:
        commands = action.cpu().numpy().astype(np.float64)
        agent = self.config.agent
        indices = self.active_joint_indices.cpu().numpy()
        qpos = agent.qpos()
        measured, velocities = self._measured()
        self.targets, paths = [], []
        for i, tool in enumerate(agent.tool_poses()):
            turned = sapien.Pose(q=quaternion(commands[i, 3:6])) * sapien.Pose(q=tool.q)
            target = sapien.Pose(tool.p + commands[i, :3], turned.q)
            goal = agent.kinematics.solve(target, qpos[i])[indices]
            start, velocity = measured[i], velocities[i]
            if self.paths:
                start, velocity = self.paths[i].positions[-1], self.paths[i].velocities[-1]
            self.targets.append(target)
            paths.append(self._plan(start, velocity, goal))
        self._follow(paths)


class PlannedGripperController(PlannedController):
    """`gripper_pd_joint_target_delta_pos_interpolate_by_planner`: +1 closes, -1 opens, about 0 repeats the last goal.

    A goal is the last target that was sent plus the action; the plan starts from the measured joints.
    goals: [N, fingers], rad.
    """

    def reset(self) -> None:
        super().reset()
        self.goals = self._positions()
        self._sent = self.goals

    def set_drive_property(self) -> None:
        super().set_drive_property()
        for joint in self.joints:
            for raw in joint._objs:
                raw.set_armature(np.full((raw.dof,), self.config.armature, dtype=np.float32))

    def _measured(self) -> tuple[np.ndarray, np.ndarray]:
        """As SAPIEN 2 measured them: a finger that something holds back seems to move on by what its drive pushes.

        So a hand that holds an object plans to go on closing at once; measured truly, it would let go a little at the
        beginning of every control step.
        """
        positions, velocities = super()._measured()
        if not self.paths:
            return positions, velocities
        drives, speed = self.config.drives, self.config.motion.speed
        ahead = np.array([path.positions[self._row] for path in self.paths]) - positions
        faster = np.array([path.velocities[self._row] for path in self.paths]) - velocities
        torques = np.clip(
            np.multiply(drives.stiffness, ahead) + np.multiply(drives.damping, faster),
            np.negative(drives.force_limit),
            drives.force_limit,
        )
        return positions, np.clip(velocities + self.config.seeming_speed * torques, -speed, speed)

    def set_action(self, action: torch.Tensor) -> None:
        change = np.clip(action.cpu().numpy().astype(np.float64), -1, 1) * self.config.step_rad
        if self.paths:
            self._sent = np.array([path.positions[self._row] for path in self.paths])
        low, high = self.config.limits_rad.T
        goals = np.clip(self._sent + change, low - self.config.margin_rad, high + self.config.margin_rad)
        self.goals = np.where(np.abs(change) < self.config.repeat_below_rad, self.goals, goals)
        measured, velocities = self._measured()
        self._follow([self._plan(*args) for args in zip(measured, velocities, self.goals, strict=True)])


@dataclass
class PlannedToolConfig(ControllerConfig):
    """limits_rad: [joints, 2]. agent: has `tool_poses`, `qpos` and `kinematics`."""

    agent: Any
    drives: Drives
    limits_rad: np.ndarray
    motion: MotionLimits = GOOGLE_ARM_MOTION
    action_size: int = 6
    drives_velocity: bool = False
    controller_cls = PlannedToolController


@dataclass
class PlannedGripperConfig(ControllerConfig):
    """limits_rad: [fingers, 2]. step_rad: what an action of 1 adds. Goals may lie `margin_rad` beyond the limits.

    armature: kg m^2 added to each finger's inertia; with fingers as light as the file's, SAPIEN 3 pushes the arm away
    from what is in the hand. seeming_speed: rad/s per N m, see `_measured`.
    """

    drives: Drives
    limits_rad: np.ndarray
    step_rad: float = GOOGLE_FINGER_STEP_RAD
    margin_rad: float = GOOGLE_FINGER_MARGIN_RAD
    repeat_below_rad: float = GOOGLE_FINGER_REPEAT_RAD
    motion: MotionLimits = GOOGLE_FINGER_MOTION
    action_size: int = 1
    drives_velocity: bool = True
    armature: float = 0.004
    seeming_speed: float = 0.13
    controller_cls = PlannedGripperController
