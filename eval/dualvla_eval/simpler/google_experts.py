"""Scripted experts for the Google Robot tasks: stages of a plan, each closed loop on the privileged state.

They look at the state (and at the stage they are in), and command motions from the measured tool pose, as this robot's
controller takes them. Knows no simulator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from dualvla_eval.experts import ExpertStep
from dualvla_eval.reasoning import StatedReasoning, Step, motion_primitive
from dualvla_eval.sim.base import ObjectState, SceneState, SimEnv

_FAST_M, _SLOW_M = 0.08, 0.05
_TURN_RAD = 0.45
_STALLED_M = 0.003  # a tool that moves less in a step has come as near as it can
_SETTLING_STEPS = 4  # before a stage may count as stalled
_CLOSING_STEPS = 4
_TRIES = 4
_ABOUT_THERE_M = 0.06
_MOVED_M, _OPENED_M = 0.02, 0.15  # of a drawer
_TABLE_M = 0.791  # height of the table in the base frame
_SHOULDER_M = np.array([0.0, -0.43])  # about where the arm begins, in the base frame
_STRAIGHT_BELOW_M, _LEAN_PER_M_UP = 0.82, 2.2
_STRAIGHT_WITHIN_M, _LEAN_PER_M_AWAY = 0.75, 1.4
_MAX_LEAN_RAD = 0.6
_CROSSED_RAD = 0.36
_STANDS_M = 0.05  # a centre higher above it is that of something that stands


@dataclass(frozen=True)
class _Stage:
    """One waypoint. goal: state -> tool position [3] m, base frame. turn: state and goal -> orientation [3, 3].

    near_m: how near is enough. steps: at most, before the plan goes on; least: at least.
    """

    subtask: Step
    goal: Callable[[SceneState], np.ndarray]
    turn: Callable[[SceneState, np.ndarray], np.ndarray]
    open_gripper: bool
    near_m: float = 0.012
    steps: int = 25
    least: int = 0
    step_m: float = _SLOW_M


class GoogleExpert:
    """One episode of an environment that has just been reset. target: go for this object instead of the named one.

    watching: it is asked what it would do in states that another policy gets into. Then its stage is what they show: no
    stage ends far from its goal, and what is in the hand, or a drawer on its way, has been reached.
    """

    def __init__(self, env: SimEnv, rng: np.random.Generator, target: str | None = None, watching: bool = False):
        state = env.state()
        self._env, self._watching = env, watching
        self._target = target or state.target
        self._reference = state.reference if state.reference != self._target else state.target
        self._stages = self._plan(state)
        self._steps = tuple(dict.fromkeys(stage.subtask for stage in self._stages))
        self._at = 0
        self._in_stage = 0
        self._tries = 1
        self._last_tool: np.ndarray | None = None
        self._spoken: Step | None = None
        self._text = ""

    def act(self) -> ExpertStep:
        state = self._env.state()
        self._advance(state)
        stage = self._stages[self._at]
        self._in_stage += 1
        self._last_tool = _tool(state)
        motion = _motion(state, stage)
        gripper = {"grasp": "close", "release": "open"}.get(stage.subtask.verb)
        if stage.subtask != self._spoken:  # one text for a whole phase, as annotated data has it
            self._spoken = stage.subtask
            self._text = str(StatedReasoning(self._steps, stage.subtask, motion_primitive(motion[:3], gripper)))
        about = state.object(stage.subtask.target)
        return ExpertStep(
            action=np.append(motion, float(stage.open_gripper)).astype(np.float32),
            reasoning=self._text,
            motion_primitive=motion_primitive(motion[:3], gripper),
            target_pixel=self._env.project(np.array(about.position)),
            target_position=np.array(about.position, dtype=np.float32),
        )

    def _plan(self, state: SceneState) -> list[_Stage]:
        if state.task == "google_robot_open_drawer":
            return _pull(self._target, state)
        if state.task == "google_robot_close_drawer":
            return _push(self._target, state)
        if state.task == "google_robot_place_apple_in_closed_top_drawer":
            drawer = self._reference or ""
            return [*_pull(drawer, state), *_leave(drawer), *_fetch(self._target, state), *_drop(self._target, drawer)]
        lift = _lift(self._target)
        if self._reference is None:
            return [*_fetch(self._target, state), lift]
        return [*_fetch(self._target, state), lift, *_put_near(self._target, self._reference)]

    def _advance(self, state: SceneState) -> None:
        """On to the next stage when this one is done; back to the beginning of the fetch when the object was lost."""
        stage = self._stages[self._at]
        if self._lost(state):
            self._tries += 1
            self._go_to(self._index("reach", self._target))
        elif self._at + 1 < len(self._stages) and self._in_stage >= stage.least and self._done(state, stage):
            self._go_to(self._at + 1)
        if self._watching:
            self._go_to(max(self._at, self._shown(state)))

    def _go_to(self, index: int) -> None:
        if index != self._at:
            self._at, self._in_stage, self._last_tool = index, 0, None

    def _index(self, verb: str, about: str) -> int:
        """The first stage of this verb."""
        return next(i for i, s in enumerate(self._stages) if s.subtask.verb == verb and s.subtask.target == about)

    def _shown(self, state: SceneState) -> int:
        """The stage that a state shows to have been reached."""
        found = 0
        for i, stage in enumerate(self._stages):
            verb, about = stage.subtask.verb, state.object(stage.subtask.target)
            if verb in ("pull", "push") and about.displaced_m > _MOVED_M:
                opened = verb == "pull" and about.displaced_m > _OPENED_M
                found = min(i + opened, len(self._stages) - 1)
            if verb == "lift" and state.held == about.name:
                found = i
        return found

    def _done(self, state: SceneState, stage: _Stage) -> bool:
        tool = _tool(state)
        near = float(np.linalg.norm(stage.goal(state) - tool)) < stage.near_m
        turned = np.linalg.norm(_turn(state, stage)) < 0.15
        stalled = (
            self._in_stage >= _SETTLING_STEPS
            and self._last_tool is not None
            and float(np.linalg.norm(tool - self._last_tool)) < _STALLED_M
        )
        given_up = stalled or self._in_stage >= stage.steps
        if self._watching:
            given_up = given_up and float(np.linalg.norm(stage.goal(state) - tool)) < _ABOUT_THERE_M
        return bool((near and turned) or given_up)

    def _lost(self, state: SceneState) -> bool:
        """Carrying, but the object is not in the hand."""
        stage = self._stages[self._at]
        tried = self._tries >= _TRIES and not self._watching
        if stage.subtask.verb not in ("lift", "carry") or tried or self._in_stage < 3:
            return False
        tool = _tool(state)
        return float(np.linalg.norm(tool - np.array(state.object(self._target).position))) > 0.08


# --- stages: an object ------------------------------------------------------------------------------------------------


def _fetch(target: str, state: SceneState) -> list[_Stage]:
    """Over the object, down, close: fingers across its long axis."""
    start = state.object(target)
    upright = start.position[2] - _TABLE_M > _STANDS_M
    lower, hover = (0.02, 0.11) if upright else (-0.004, 0.085)

    def turn(state: SceneState, goal: np.ndarray) -> np.ndarray:
        return _leaning(_grasp_yaw(state, state.object(target), upright), goal, _least_lean(state))

    def above(state: SceneState) -> np.ndarray:
        return _over(state.object(target), hover)

    def around(state: SceneState) -> np.ndarray:
        return _over(state.object(target), lower)

    reach, grasp = Step("reach", target), Step("grasp", target)
    return [
        _Stage(reach, above, turn, True, near_m=0.015, step_m=_FAST_M),
        _Stage(Step("lower to", target), around, turn, True, near_m=0.01, steps=14),
        _Stage(grasp, _tool, _as_is, False, least=_CLOSING_STEPS, steps=_CLOSING_STEPS),
    ]


def _lift(target: str) -> _Stage:
    def up(state: SceneState) -> np.ndarray:
        goal = _tool(state)
        goal[2] += max(0.0, 0.1 - state.object(target).lifted_m)
        return goal

    return _Stage(Step("lift", target), up, _hanging, False, near_m=0.015, least=4, steps=12)


def _put_near(target: str, reference: str) -> list[_Stage]:
    """To a free place beside the reference, down, let go, up."""

    def place(state: SceneState, lift_m: float) -> np.ndarray:
        moved, tool = state.object(target), _tool(state)
        spot = _free_place(state, target, reference)
        there = np.array([*spot, moved.initial_position[2] + lift_m])
        return np.asarray(tool + there - np.array(moved.position))

    carry, put = Step("carry", target, "to", reference), Step("place", target, "near", reference)
    release = Step("release", target)

    def up(state: SceneState) -> np.ndarray:
        return _raised(_tool(state), 0.05)

    return [
        _Stage(carry, lambda s: place(s, 0.08), _hanging, False, near_m=0.02, steps=20, step_m=_FAST_M),
        _Stage(put, lambda s: place(s, 0.004), _hanging, False, near_m=0.012, steps=10),
        _Stage(release, _tool, _as_is, True, least=4, steps=4),
        _Stage(release, up, _as_is, True, steps=4),
        _Stage(release, _tool, _as_is, True, steps=1000),
    ]


def _drop(target: str, drawer: str) -> list[_Stage]:
    """Up, out over the open drawer, let go."""

    def over(state: SceneState, height_m: float) -> np.ndarray:
        front, moved = state.object(drawer), state.object(target)
        spot = _raised(np.array(front.position) - 0.115 * _outward(front), height_m)
        return np.asarray(_tool(state) + spot - np.array(moved.position))

    release = Step("release", target)
    carry, put = Step("carry", target, "to", drawer), Step("place", target, "in", drawer)
    return [
        _lift(target),
        _Stage(carry, lambda s: over(s, 0.29), _hanging, False, near_m=0.02, steps=20),
        _Stage(put, lambda s: over(s, 0.17), _hanging, False, near_m=0.02, steps=8),
        _Stage(release, _tool, _as_is, True, steps=1000),
    ]


# --- stages: a drawer -------------------------------------------------------------------------------------------------


def _pull(drawer: str, state: SceneState) -> list[_Stage]:
    """The closed hand goes in above the front plate, hooks its top edge from behind and pulls."""
    start = state.object(drawer)
    side = _sideways(start, state, 0.0)

    def at(out_m: float, up_m: float) -> Callable[[SceneState], np.ndarray]:
        return lambda s: _raised(np.array(s.object(drawer).position) + out_m * _outward(start) + side, up_m)

    def pull(state: SceneState) -> np.ndarray:
        tool, out = _tool(state), _outward(start)
        front = np.array(state.object(drawer).position)
        goal = _raised(front + side - 0.065 * out, 0.045)
        error = goal - tool
        return np.asarray(tool + error - (error @ out) * out + _SLOW_M * out)

    turn = _hook_turn(start, 0.62)
    reach, low, haul = Step("reach", drawer), Step("lower to", drawer), Step("pull", drawer)
    return [
        _Stage(reach, at(0.13, 0.205), turn, False, near_m=0.02, steps=22, step_m=_FAST_M),
        _Stage(low, at(0.019, 0.131), turn, False, near_m=0.02, steps=14),
        _Stage(low, at(-0.06, 0.07), turn, False, near_m=0.012, steps=14),
        _Stage(low, at(-0.065, 0.04), turn, False, near_m=0.012, steps=6),
        _Stage(haul, pull, turn, False, least=16, steps=24),
    ]


def _push(drawer: str, state: SceneState) -> list[_Stage]:
    """The closed hand comes down in front of the plate and pushes it home."""
    start = state.object(drawer)
    side = _sideways(start, state, 0.145)

    def at(out_m: float, up_m: float) -> Callable[[SceneState], np.ndarray]:
        return lambda _: _raised(np.array(start.position) + out_m * _outward(start) + side, up_m)

    turn = _hook_turn(start, 0.71)
    reach, low, push = Step("reach", drawer), Step("lower to", drawer), Step("push", drawer)
    return [
        _Stage(reach, at(0.09, 0.11), turn, False, near_m=0.02, steps=22, step_m=_FAST_M),
        _Stage(low, at(0.06, 0.01), turn, False, near_m=0.015, steps=16),
        _Stage(push, at(-0.175, 0.01), turn, False, near_m=0.01, steps=1000),
    ]


def _leave(drawer: str) -> list[_Stage]:
    """Up and out of the opened drawer, and open the hand."""

    def up(state: SceneState) -> np.ndarray:
        return _raised(_tool(state), 0.06)

    def clear(state: SceneState) -> np.ndarray:
        front = state.object(drawer)
        return _raised(np.array(front.position) - 0.03 * _outward(front), 0.33)

    release = Step("release", drawer)
    return [
        _Stage(release, up, _as_is, False, least=3, steps=4),
        _Stage(release, clear, _as_is, True, near_m=0.03, steps=12, step_m=_FAST_M),
    ]


# --- geometry ---------------------------------------------------------------------------------------------------------


def _motion(state: SceneState, stage: _Stage) -> np.ndarray:
    """[6]: towards the stage's goal from where the tool is."""
    way = stage.goal(state) - _tool(state)
    way *= min(1.0, stage.step_m / max(float(np.linalg.norm(way)), 1e-9))
    turn = _turn(state, stage)
    turn *= min(1.0, _TURN_RAD / max(float(np.linalg.norm(turn)), 1e-9))
    return np.concatenate([way, turn])


def _tool(state: SceneState) -> np.ndarray:
    """[3], m, base frame."""
    return np.array(state.ee_pose[:3])


def _turn(state: SceneState, stage: _Stage) -> np.ndarray:
    """[3], rotation vector in the base frame that is left to turn."""
    now = Rotation.from_euler("xyz", state.ee_pose[3:])
    return (Rotation.from_matrix(stage.turn(state, stage.goal(state))) * now.inv()).as_rotvec()


def _as_is(state: SceneState, goal: np.ndarray | None = None) -> np.ndarray:
    return np.asarray(Rotation.from_euler("xyz", state.ee_pose[3:]).as_matrix())


def _grasp_yaw(state: SceneState, target: ObjectState, upright: bool) -> float:
    """The fingers open along the tool's x axis, which goes across the object's long axis."""
    now = _yaw(state)
    if upright or _round(target):
        return now
    across = target.yaw_rad + (np.pi / 2 if target.size[0] > target.size[1] else 0.0)
    return float(now + (across - now + np.pi / 2) % np.pi - np.pi / 2)


def _yaw(state: SceneState) -> float:
    x = _as_is(state)[:, 0]
    return float(np.arctan2(x[1], x[0]))


def _leaning(yaw_rad: float, goal: np.ndarray, least_rad: float = 0.0) -> np.ndarray:
    """Down, but away from the shoulder the higher and the farther the goal is: the wrist bends no further."""
    way = goal[:2] - _SHOULDER_M
    reach = float(np.linalg.norm(way))
    way /= reach
    high = max(0.0, goal[2] - _STRAIGHT_BELOW_M) * _LEAN_PER_M_UP
    far = max(0.0, reach - _STRAIGHT_WITHIN_M) * _LEAN_PER_M_AWAY
    lean = min(max(high + far, least_rad), _MAX_LEAN_RAD)
    tilt = Rotation.from_rotvec(lean * np.array([way[1], -way[0], 0.0]))
    return np.asarray((tilt * Rotation.from_euler("z", yaw_rad)).as_matrix())


def _least_lean(state: SceneState) -> float:
    """Beside the cabinet the arm reaches across itself, and points down even less."""
    return _CROSSED_RAD if any(o.shape == "drawer" for o in state.objects) else 0.0


def _hanging(state: SceneState, goal: np.ndarray) -> np.ndarray:
    """As far down as it can point there, with the yaw it has."""
    return _leaning(_yaw(state), goal, _least_lean(state))


def _round(target: ObjectState) -> bool:
    return abs(target.size[0] - target.size[1]) < 0.01


def _over(target: ObjectState, above_m: float) -> np.ndarray:
    return _raised(np.array(target.position), above_m)


def _raised(position: np.ndarray, by_m: float) -> np.ndarray:
    return np.add(position, (0.0, 0.0, by_m))


def _free_place(state: SceneState, target: str, reference: str) -> np.ndarray:
    """[2]: beside the reference, where there is most room, preferring the near side."""
    center = np.array(state.object(reference).position[:2])
    start = np.array(state.object(target).initial_position[:2])
    others = [np.array(o.position[:2]) for o in state.objects if o.name not in (target, reference)]
    angles = np.arctan2(*(start - center)[::-1]) + np.linspace(-np.pi / 2, np.pi / 2, 9)
    spots = [center + 0.13 * np.array([np.cos(a), np.sin(a)]) for a in angles]

    def worth(spot: np.ndarray) -> float:
        room = min((float(np.linalg.norm(spot - other)) for other in others), default=1.0)
        return min(room, 0.2) - 0.3 * float(np.linalg.norm(spot - start))

    return max(spots, key=worth)


def _outward(front: ObjectState) -> np.ndarray:
    """[3]: out of the cabinet, in the base frame."""
    return np.array([np.cos(front.yaw_rad), np.sin(front.yaw_rad), 0.0])


def _sideways(front: ObjectState, state: SceneState, offset_m: float) -> np.ndarray:
    """[3] along the plate: `offset_m` to the cabinet's left of where the robot stands, within the plate."""
    left = np.array([-np.sin(front.yaw_rad), np.cos(front.yaw_rad), 0.0])
    stands = float(-np.array(front.position) @ left)
    place = np.clip(stands + offset_m, -0.2, 0.2) if offset_m else 0.0
    return float(place) * left


def _hook_turn(front: ObjectState, down: float) -> Callable[[SceneState, np.ndarray], np.ndarray]:
    """Pointing into the cabinet and down, the fingers opening sideways. down: sine of the angle below horizontal."""
    out = _outward(front)
    approach = _raised(-np.sqrt(1 - down**2) * out, -down)
    opening = -np.array([-out[1], out[0], 0.0])
    tool = np.stack([np.cross(opening, approach), opening, approach], axis=1)
    told = tool @ np.array([[0.0, -1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]).T
    return lambda state, goal: told
