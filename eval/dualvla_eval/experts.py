"""Scripted experts for suite `blocks`: closed loop on the privileged state, with the reasoning behind each step.

An expert looks at the state alone to know what comes next, so that it recovers by itself from anything that noise does
to it. Knows the simulator's state, never its engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dualvla_eval.reasoning import StatedReasoning, Step, motion_primitive
from dualvla_eval.sim.base import ObjectState, SceneState, SimEnv
from dualvla_eval.tasks.blocks import BIN_SIZE_M

_STEP_M = 0.03
_HOVER_M = 0.12  # of the tool over the table, when travelling empty: fingertips clear every block
_CARRY_M = 0.155  # when carrying: the carried block clears every other one
_ALIGNED_M = 0.012  # horizontal error at which the tool starts down
_SLACK_M = 0.02  # ... and at which it gives up and goes up again
_GRASP_HEIGHT_M = 0.022
_GRASP_TOLERANCE_M = 0.008
_PLACE_TOLERANCE_M = 0.012
_PLACE_GAP_M = 0.006  # let go this far above the support
_NEAR_M = 0.072  # between centres, along x: the fingers open along y
_OPEN = 0.7
_ROOMY_M = 0.12  # more room than this is as good
_X_RANGE_M = (0.36, 0.74)


@dataclass(frozen=True)
class ExpertStep:
    """action: float32 [7]. target_pixel [2] and target_position [3]: of the object that the subtask is about."""

    action: np.ndarray
    reasoning: str
    motion_primitive: str
    target_pixel: np.ndarray
    target_position: np.ndarray


@dataclass(frozen=True)
class _Intent:
    """goal: where the tool should go, m. about: the object that the subtask is about."""

    subtask: Step
    goal: np.ndarray
    open_gripper: bool
    about: ObjectState


class Acting(Protocol):
    """A scripted expert in one episode of one environment, which has just been reset."""

    def act(self) -> ExpertStep: ...


def make_expert(env: SimEnv, rng: np.random.Generator, target: str | None = None, *, watching: bool = False) -> Acting:
    """The expert for the episode's task. rng: breaks ties. target: go for this object instead of the named one.

    watching: it will be shown states that another policy gets into, for an expert that keeps track of its own way.
    """
    task = env.state().task
    if task.startswith("widowx_"):
        from dualvla_eval.simpler.widowx_expert import WidowXExpert

        return WidowXExpert(env, rng, target)
    if task.startswith("google_robot_"):
        from dualvla_eval.simpler.google_experts import GoogleExpert

        return GoogleExpert(env, rng, target, watching)
    return Expert(env, rng, target)


class Expert:
    """Of suite `blocks`; one episode of one environment, which has just been reset.

    target: go for this object instead of the named one. rng: breaks ties, such as the side on which to put something.
    """

    def __init__(self, env: SimEnv, rng: np.random.Generator, target: str | None = None):
        state = env.state()
        self._env = env
        self._target = target or state.target
        self._reference = state.reference if state.reference != self._target else state.target
        self._side = self._choose_side(state, rng) if state.task == "move_near" else 0.0
        self._plan = _plan(state.task, self._target, self._reference)
        self._subtask: Step | None = None
        self._text = ""

    def act(self) -> ExpertStep:
        state = self._env.state()
        intent = self._intend(state)
        tool = np.array(state.ee_pose[:3])
        delta = intent.goal - tool
        length = float(np.linalg.norm(delta))
        if length > _STEP_M:
            delta = delta * (_STEP_M / length)
        gripper = _gripper_change(intent)
        primitive = motion_primitive(delta, gripper)
        if intent.subtask != self._subtask:  # one text for a whole phase, as annotated data has it
            self._subtask = intent.subtask
            self._text = str(StatedReasoning(self._plan, intent.subtask, motion_primitive(intent.goal - tool, gripper)))
        return ExpertStep(
            action=np.array([*delta, 0, 0, 0, float(intent.open_gripper)], dtype=np.float32),
            reasoning=self._text,
            motion_primitive=primitive,
            target_pixel=self._env.project(np.array(intent.about.position)),
            target_position=np.array(intent.about.position, dtype=np.float32),
        )

    def _intend(self, state: SceneState) -> _Intent:
        target = state.object(self._target)
        if state.task == "touch":
            return self._touch(state, target)
        if state.task == "pick":
            return self._lift(state, target) if state.held == target.name else self._fetch(state, target)
        reference = state.object(self._reference or "")
        place, link = self._destination(state.task, target, reference)
        if state.held == target.name:
            return self._deliver(state, target, reference, place, link)
        if _lies_at(target, place, link):
            return _Intent(Step("release", target.name), np.array([*state.ee_pose[:2], _CARRY_M]), True, target)
        return self._fetch(state, target)

    def _touch(self, state: SceneState, target: ObjectState) -> _Intent:
        goal = np.array(target.position)
        if self._offset(state, target) > _ALIGNED_M and not self._is_down_at(state, target):
            return _Intent(Step("reach", target.name), np.array([*goal[:2], _HOVER_M]), False, target)
        return _Intent(Step("touch", target.name), goal, False, target)

    def _fetch(self, state: SceneState, target: ObjectState) -> _Intent:
        """Over the object, down, close."""
        x, y, z = target.position
        tool = np.array(state.ee_pose[:3])
        grasp = np.array([x, y, max(z - 0.025 + _GRASP_HEIGHT_M, _GRASP_HEIGHT_M)])
        offset = self._offset(state, target)
        down = self._is_down_at(state, target)
        if offset < _ALIGNED_M and abs(tool[2] - grasp[2]) < _GRASP_TOLERANCE_M:
            return _Intent(Step("grasp", target.name), grasp, False, target)
        if state.gripper >= _OPEN and (offset < _ALIGNED_M or down):
            return _Intent(Step("lower to", target.name), grasp, True, target)
        hover = np.array([x, y, z - 0.025 + _HOVER_M])
        if tool[2] < hover[2] - 0.03 and offset > _SLACK_M:  # among the blocks: up before sideways
            hover[:2] = tool[:2]
        return _Intent(Step("reach", target.name), hover, True, target)

    def _lift(self, state: SceneState, target: ObjectState) -> _Intent:
        return _Intent(Step("lift", target.name), np.array([*state.ee_pose[:2], _CARRY_M]), False, target)

    def _deliver(
        self, state: SceneState, target: ObjectState, reference: ObjectState, place: np.ndarray, link: str
    ) -> _Intent:
        """Up, over the place, down, open."""
        tool = np.array(state.ee_pose[:3])
        goal = place + tool - np.array(target.position)  # the object may sit off the tool's centre
        error = float(np.hypot(*(goal - tool)[:2]))
        if error > _PLACE_TOLERANCE_M:
            low = tool[2] < _CARRY_M - 0.02
            if low and error > 0.03:
                return self._lift(state, target)
            height = tool[2] if low else _CARRY_M
            step = Step("place", target.name, link, reference.name) if low else _carry(target, reference)
            return _Intent(step, np.array([*goal[:2], height]), False, reference)
        if tool[2] - goal[2] > _GRASP_TOLERANCE_M:
            return _Intent(Step("place", target.name, link, reference.name), goal, False, reference)
        return _Intent(Step("release", target.name), goal, True, target)

    def _destination(self, task: str, target: ObjectState, reference: ObjectState) -> tuple[np.ndarray, str]:
        """Where the target's centre should be when it is let go, m, and the word for it."""
        place = np.array(reference.position)
        if task == "stack":
            place[2] += (reference.size[2] + target.size[2]) / 2 + _PLACE_GAP_M
            return place, "on"
        if task == "move_near":
            place[0] += self._side * _NEAR_M
            place[2] = target.size[2] / 2 + _PLACE_GAP_M
            return place, "near"
        place[2] = reference.size[2] + target.size[2] / 2 + _PLACE_GAP_M
        return place, "in"

    def _choose_side(self, state: SceneState, rng: np.random.Generator) -> float:
        """+1 beyond the reference, -1 before it: the one with the most room."""
        reference = state.object(self._reference or "")
        others = [o for o in state.objects if o.name not in (self._target, reference.name)]

        def room(side: float) -> float:
            x, y = reference.position[0] + side * _NEAR_M, reference.position[1]
            if not _X_RANGE_M[0] < x < _X_RANGE_M[1]:
                return -1.0
            free = [float(np.hypot(o.position[0] - x, o.position[1] - y)) for o in others]
            return min([*free, _ROOMY_M])

        near, far = room(-1.0), room(1.0)
        return float(rng.choice([-1.0, 1.0])) if near == far else (-1.0 if near > far else 1.0)

    def _offset(self, state: SceneState, target: ObjectState) -> float:
        return float(np.hypot(*np.subtract(state.ee_pose[:2], target.position[:2])))

    def _is_down_at(self, state: SceneState, target: ObjectState) -> bool:
        """Below the travelling height and still over the object: no need to go up again."""
        height = state.ee_pose[2] - (target.position[2] - target.size[2] / 2)
        return height < _HOVER_M - 0.02 and self._offset(state, target) < _SLACK_M


def _carry(target: ObjectState, reference: ObjectState) -> Step:
    return Step("carry", target.name, "to", reference.name)


def _lies_at(target: ObjectState, place: np.ndarray, link: str) -> bool:
    offset = np.subtract(target.position, place)
    if link == "in":
        return bool(np.all(np.abs(offset[:2]) < (BIN_SIZE_M[0] - target.size[0]) / 2) and offset[2] < 0)
    return bool(np.hypot(*offset[:2]) < 0.5 * target.size[0] and abs(offset[2]) < 0.4 * target.size[2])


def _gripper_change(intent: _Intent) -> str | None:
    return {"grasp": "close", "release": "open"}.get(intent.subtask.verb)


def _plan(task: str, target: str, reference: str | None) -> tuple[Step, ...]:
    if task == "touch":
        return Step("reach", target), Step("touch", target)
    fetch = (Step("reach", target), Step("grasp", target), Step("lift", target))
    if task == "pick":
        return fetch
    link = {"stack": "on", "move_near": "near", "put_in_bin": "in"}[task]
    return (*fetch[:2], Step("carry", target, "to", reference), Step("place", target, link, reference))
