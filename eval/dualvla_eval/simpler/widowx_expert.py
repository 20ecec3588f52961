"""Scripted expert for the WidowX tasks: closed loop on the privileged state, with the reasoning behind each step.

Like the expert of suite `blocks`, it looks at the state alone (and at its own last phase), so it recovers from what
noise does to it and can be asked about recorded states. Knows no simulator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from dualvla_eval.experts import ExpertStep
from dualvla_eval.reasoning import StatedReasoning, Step, motion_primitive
from dualvla_eval.sim.base import ObjectState, SceneState, SimEnv

_STEP_M = 0.05
_TURN_RAD = 0.35
_ALIGNED_M, _ALIGNED_RAD = 0.012, 0.12  # at which the tool starts down
_SLACK_M = 0.025  # ... and at which it gives up and goes up again
_DOWN_M = 0.008
_OPEN = 0.6
_GRIPPED_M = 0.02  # of a closed gripper from where it holds the object
_CLOSING_STEPS = 3
_LOWERING_STEPS = 8
_OTHER_TURNS_RAD = (0.5, -0.5, 1.0, -1.0)
_OVER_M = 0.008
_NEAR_PLACE_M = 0.035
_RELEASE_M = 0.008


@dataclass(frozen=True)
class _Skill:
    """How an object is taken and put down. All in m, heights over its centre.

    along: from the centre along its long axis. lower: of the tool when it closes. hover, carry: of the tool when it
    travels. gap: between object and place when it is let go. link: the word for the place.
    """

    along: float
    lower: float
    hover: float
    carry: float
    gap: float
    link: str
    square: bool = False


_SKILLS = {
    "widowx_spoon_on_towel": _Skill(0.03, 0.0046, 0.07, 0.09, 0.008, "on"),
    "widowx_carrot_on_plate": _Skill(0.0, -0.006, 0.07, 0.09, 0.005, "on"),
    "widowx_stack_cube": _Skill(0.0, -0.004, 0.07, 0.09, 0.0, "on", square=True),
    "widowx_put_eggplant_in_basket": _Skill(0.0, -0.006, 0.10, 0.12, 0.06, "in"),
}
TASKS = frozenset(_SKILLS)


@dataclass(frozen=True)
class _Intent:
    """goal: of the tool, m. yaw_rad: of the tool, None to keep it. about: the object that the subtask is about."""

    subtask: Step
    goal: np.ndarray
    yaw_rad: float | None
    open_gripper: bool
    about: ObjectState


class WidowXExpert:
    """One episode of one environment, just reset. target: go for this object instead of the named one."""

    def __init__(self, env: SimEnv, rng: np.random.Generator, target: str | None = None):
        state = env.state()
        self._env = env
        self._skill = _SKILLS[state.task]
        self._target = target or state.target
        self._reference = (state.reference if state.reference != self._target else state.target) or ""
        self._plan = (
            Step("reach", self._target),
            Step("grasp", self._target),
            Step("carry", self._target, "to", self._reference),
            Step("place", self._target, self._skill.link, self._reference),
        )
        self._closed = 0  # steps since the gripper was told to close
        self._lowering = 0  # steps in a row
        self._jams = 0  # times a finger met an edge on the way down
        self._subtask: Step | None = None
        self._text = ""

    def act(self) -> ExpertStep:
        state = self._env.state()
        intent = self._intend(state)
        self._closed = 0 if intent.open_gripper else self._closed + 1
        self._lowering = self._lowering + 1 if intent.subtask.verb == "lower to" else 0
        self._jams += self._lowering > _LOWERING_STEPS
        motion = _motion(state, intent)
        gripper = {"grasp": "close", "release": "open"}.get(intent.subtask.verb)
        if intent.subtask != self._subtask:  # one text for a whole phase, as annotated data has it
            self._subtask = intent.subtask
            way = intent.goal - np.array(state.ee_pose[:3])
            self._text = str(StatedReasoning(self._plan, intent.subtask, motion_primitive(way, gripper)))
        return ExpertStep(
            action=np.append(motion, float(intent.open_gripper)).astype(np.float32),
            reasoning=self._text,
            motion_primitive=motion_primitive(motion[:3], gripper),
            target_pixel=self._env.project(np.array(intent.about.position)),
            target_position=np.array(intent.about.position, dtype=np.float32),
        )

    def _intend(self, state: SceneState) -> _Intent:
        target, reference = state.object(self._target), state.object(self._reference)
        tool = np.array(state.ee_pose[:3])
        grasp, yaw = self._grasp(state, target)
        # Pressed on the table the fingers hardly close, and grip only as they are lifted.
        gripped = self._closed > 0 and float(np.linalg.norm(tool - grasp)) < _GRIPPED_M
        if state.held == target.name or gripped:
            if state.held != target.name and self._closed < _CLOSING_STEPS:
                return _Intent(Step("grasp", target.name), grasp, yaw, False, target)
            return self._deliver(state, target, reference)
        if self._lies_there(target, reference):
            up = np.array([*tool[:2], target.position[2] + self._skill.carry])
            return _Intent(Step("release", target.name), up, None, True, target)
        return self._fetch(state, target, grasp, yaw)

    def _grasp(self, state: SceneState, target: ObjectState) -> tuple[np.ndarray, float]:
        """Where the tool closes, m, and its yaw: fingers across the long axis, turned as little as possible."""
        x, y, z = target.position
        axis = np.array([np.cos(target.yaw_rad), np.sin(target.yaw_rad)]) * self._skill.along
        period = np.pi / 2 if self._skill.square else np.pi
        now = _yaw(state.ee_pose)
        turn = (target.yaw_rad - now + period / 2) % period - period / 2
        yaw = now + turn
        if self._jams:
            base = (target.yaw_rad + period / 2) % period - period / 2
            yaw = base + _OTHER_TURNS_RAD[(self._jams - 1) % len(_OTHER_TURNS_RAD)]
        if abs(yaw) > np.pi / 2 + 0.1:  # the wrist's comfortable half
            yaw -= np.sign(yaw) * period
        return np.array([x + axis[0], y + axis[1], z + self._skill.lower]), float(yaw)

    def _fetch(self, state: SceneState, target: ObjectState, grasp: np.ndarray, yaw: float) -> _Intent:
        """Over the object, down, close."""
        tool = np.array(state.ee_pose[:3])
        offset = float(np.linalg.norm((tool - grasp)[:2]))
        turned = abs(_yaw(state.ee_pose) - yaw) < _ALIGNED_RAD
        low = tool[2] - grasp[2] < self._skill.hover / 2
        if offset < _ALIGNED_M and tool[2] - grasp[2] < _DOWN_M and turned:
            return _Intent(Step("grasp", target.name), grasp, yaw, False, target)
        jammed = self._lowering > _LOWERING_STEPS
        if not jammed and state.gripper >= _OPEN and turned and (offset < _ALIGNED_M or (low and offset < _SLACK_M)):
            return _Intent(Step("lower to", target.name), grasp, yaw, True, target)
        hover = np.array([*grasp[:2], target.position[2] + self._skill.hover])
        if low and (jammed or offset > _SLACK_M or not turned):  # up before sideways
            hover[:2] = tool[:2]
        return _Intent(Step("reach", target.name), hover, yaw, True, target)

    def _deliver(self, state: SceneState, target: ObjectState, reference: ObjectState) -> _Intent:
        """Up, over the place, down, open."""
        skill, tool = self._skill, np.array(state.ee_pose[:3])
        place = np.array(reference.position)
        place[2] += (reference.size[2] + target.size[2]) / 2 + skill.gap
        goal = place + tool - np.array(target.position)  # the object may sit off the tool's centre
        error = float(np.linalg.norm((goal - tool)[:2]))
        height = max(place[2], target.initial_position[2]) + skill.carry - 0.02
        high = target.position[2] > place[2] + 0.025
        if error > _NEAR_PLACE_M and not high:
            up = np.array([*tool[:2], tool[2] + height - target.position[2]])
            return _Intent(Step("lift", target.name), up, None, False, target)
        step = Step("place", target.name, skill.link, reference.name)
        if error > _OVER_M:
            if not high:
                return _Intent(step, np.array([*goal[:2], tool[2]]), None, False, reference)
            over = np.array([*goal[:2], tool[2] + height - target.position[2]])
            return _Intent(Step("carry", target.name, "to", reference.name), over, None, False, reference)
        if reference.name in state.touching(target.name) or tool[2] - goal[2] < _RELEASE_M:
            here = tool if state.ee_target is None else np.array(state.ee_target[:3])
            return _Intent(Step("release", target.name), here, None, True, target)
        return _Intent(step, goal, None, False, reference)

    def _lies_there(self, target: ObjectState, reference: ObjectState) -> bool:
        offset = np.subtract(target.position, reference.position)
        reach = float(np.linalg.norm(reference.size[:2])) / 2
        rest = (reference.size[2] + target.size[2]) / 2
        return bool(np.linalg.norm(offset[:2]) < reach and -0.01 < offset[2] < rest + max(self._skill.gap, 0.015))


def _motion(state: SceneState, intent: _Intent) -> np.ndarray:
    """[6]: what brings the commanded pose nearer to the goal, upright. A rotation turns about the tool as it is now."""
    tool = np.array(state.ee_pose[:3])
    target = np.array(state.ee_target if state.ee_target is not None else state.ee_pose)
    was = Rotation.from_euler("xyz", target[3:])
    yaw = _yaw(target) if intent.yaw_rad is None else intent.yaw_rad
    turn = (Rotation.from_euler("z", yaw) * was.inv()).as_rotvec()
    turn *= min(1.0, _TURN_RAD / max(float(np.linalg.norm(turn)), 1e-9))
    way = intent.goal - target[:3]
    way *= min(1.0, _STEP_M / max(float(np.linalg.norm(way)), 1e-9))
    shift = tool + Rotation.from_rotvec(turn).apply(target[:3] - tool)
    return np.concatenate([target[:3] + way - shift, turn])


def _yaw(pose: np.ndarray | tuple[float, ...]) -> float:
    """Of a tool that is nearly upright."""
    x = Rotation.from_euler("xyz", pose[3:6]).apply([1.0, 0.0, 0.0])
    return float(np.arctan2(x[1], x[0]))
