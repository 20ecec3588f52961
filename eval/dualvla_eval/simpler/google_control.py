"""The Google Robot's controllers: every command becomes a jerk-limited plan of the joints, followed substep by substep.

Knows mani_skill's controllers; no robot's links and no task. Both follow SimplerEnv's `..._interpolate_by_planner`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import ruckig
import sapien
import torch
from mani_skill.agents.controllers.base_controller import ControllerConfig

from dualvla.errors import PlatformError
from dualvla_eval.simpler.control import Drives, JointController, quaternion


@dataclass(frozen=True)
class MotionLimits:
    """Of each joint: rad/s, rad/s^2, rad/s^3."""

    speed: float
    acceleration: float
    jerk: float


@dataclass(frozen=True)
class JointPath:
    """positions, velocities: [steps + 1, joints], rad and rad/s; row 0 is the start."""

    positions: np.ndarray
    velocities: np.ndarray


def plan(
    start: np.ndarray, velocity: np.ndarray, goal: np.ndarray, limits: MotionLimits, sim_hz: float, steps: int
) -> JointPath:
    """The fastest motion from `start` at `velocity` to rest at `goal`, its first `steps` substeps. All [joints]; rad.

    It takes what time it needs, often many control steps: only the beginning is executed. Raises: PlatformError.
    """
    joints = len(start)
    query = ruckig.InputParameter(joints)
    query.current_position, query.current_velocity = start.tolist(), velocity.tolist()
    query.target_position = goal.tolist()
    query.max_velocity = [limits.speed] * joints
    query.max_acceleration = [limits.acceleration] * joints
    query.max_jerk = [limits.jerk] * joints
    found = ruckig.Trajectory(joints)
    result = ruckig.Ruckig(joints).calculate(query, found)
    if result not in (ruckig.Result.Working, ruckig.Result.Finished):
        raise PlatformError(f"Ruckig plans no motion from {start} to {goal} rad: {result}.", "are they finite?")
    samples = [found.at_time(step / sim_hz)[:2] for step in range(steps + 1)]
    return JointPath(np.array([s[0] for s in samples]), np.array([s[1] for s in samples]))


class PlannedController(JointController):
    """Follows one `JointPath` an environment: row k is set before substep k.

    What is sent is clipped to `config.limits_rad`, as SAPIEN 2 did; what is remembered is not. Velocities are measured
    as differences of positions: those of SAPIEN 3 are off by rad/s while a finger presses on something.
    """

    def reset(self) -> None:
        self.paths: list[JointPath] = []
        self._row = 0
        self._positions_before: np.ndarray | None = None  # of the last substep

    def before_simulation_step(self) -> None:
        if not self.paths:
            return
        self._row = min(self._row + 1, self._sim_steps)
        if self._row == self._sim_steps:
            self._positions_before = self._positions()
        low, high = self.config.limits_rad.T
        positions = self._balanced(np.clip([path.positions[self._row] for path in self.paths], low, high))
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

    def _balanced(self, targets: np.ndarray) -> np.ndarray:
        """[N, joints] as they are sent."""
        return targets

    def _follow(self, paths: list[JointPath]) -> None:
        self.paths = paths
        self._row = 0

    def _plan(self, start: np.ndarray, velocity: np.ndarray, goal: np.ndarray) -> JointPath:
        return plan(start, velocity, goal, self.config.motion, self._sim_steps * self._control_freq, self._sim_steps)

    def _measured(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions and clipped velocities of this controller's joints, [N, joints] each."""
        positions, speed = self._positions(), self.config.motion.speed
        if self._positions_before is None:
            return positions, np.zeros_like(positions)
        sim_hz = self._sim_steps * self._control_freq
        return positions, np.clip((positions - self._positions_before) * sim_hz, -speed, speed)

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

    def _balanced(self, targets: np.ndarray) -> np.ndarray:
        """Around an object, the fingers press less hard and stay opposite each other.

        At the force limit each finger would press alike wherever it is, and SAPIEN 3's residual forces would carry a
        light object sideways out of the hand, which SAPIEN 2's did not. Fingers that have met are left alone.
        """
        positions = self._positions()
        middle = positions.mean(axis=1, keepdims=True)
        pressing = np.clip(targets, middle - self.config.press_rad, middle + self.config.press_rad)
        opposed = pressing - self.config.coupling * (positions - middle)
        return np.where(middle < self.config.met_rad, opposed, targets)

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
    motion: MotionLimits = MotionLimits(speed=1.5, acceleration=2.0, jerk=50.0)
    action_size: int = 6
    drives_velocity: bool = False
    controller_cls = PlannedToolController


@dataclass
class PlannedGripperConfig(ControllerConfig):
    """limits_rad: [fingers, 2]. step_rad: what an action of 1 adds. Goals may lie `margin_rad` beyond the limits.

    press_rad: how far ahead of the fingers a target may be. coupling: how much stiffer their difference is than each of
    them. met_rad: beyond, they press on each other. See `_balanced`.
    """

    drives: Drives
    limits_rad: np.ndarray
    step_rad: float = 1.31
    margin_rad: float = 0.01
    repeat_below_rad: float = 1e-3
    motion: MotionLimits = MotionLimits(speed=1.0, acceleration=7.0, jerk=50.0)
    action_size: int = 1
    drives_velocity: bool = True
    press_rad: float = 0.1
    coupling: float = 10.0
    met_rad: float = 0.95
    controller_cls = PlannedGripperController
