"""The rubric judge on the Google Robot's drawer tasks, in a cabinet without physics: what is made worse must lose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from dualvla_eval.experts import make_expert
from dualvla_eval.judges import get_judge
from dualvla_eval.results import Trajectory
from dualvla_eval.sim.base import ObjectState, SceneState
from dualvla_eval.simpler.google_tasks import CLOSE_DRAWER, OPEN_DRAWER

OUT = np.array([-1.0, 0.0, 0.0])  # towards the robot, which looks at the cabinet along x
HEIGHTS_M = {"top drawer": 0.79, "middle drawer": 0.545, "bottom drawer": 0.3}
STEPS = 70


class Cabinet:
    """A hand that goes where it is told, and drawers that it moves: from behind the front's edge, or from before it."""

    def __init__(self, task: str, named: str):
        opened = 0.2 if task == CLOSE_DRAWER else 0.0
        self.opened = {name: opened * (name == named) for name in HEIGHTS_M}
        self._start = dict(self.opened)
        self._task, self._named = task, named
        self._tool, self._turn = np.array([0.4, 0.0, 0.95]), Rotation.identity()
        self._contacts: tuple[tuple[str, str], ...] = ()
        self._touched: tuple[str, ...] = ()
        self.steps = 0

    @property
    def success(self) -> bool:
        opened = self.opened[self._named]
        return opened <= 0.05 if self._task == CLOSE_DRAWER else opened >= 0.15

    def step(self, action: np.ndarray) -> None:
        before, self._tool = self._tool, self._tool + action[:3]
        self._turn = Rotation.from_rotvec(action[3:6]) * self._turn
        self.steps += 1
        self._contacts = ()
        for name, height in HEIGHTS_M.items():
            was, now = (float((tool - self._front(name)) @ OUT) for tool in (before, self._tool))
            hooked = was < -0.02 and 0 < self._tool[2] - height < 0.06
            pushed = was > -0.01 and now < 0 and abs(self._tool[2] - height) < 0.06
            if hooked or pushed:
                self.opened[name] = float(np.clip(self.opened[name] + now - was * hooked, 0, 0.5))
                self._contacts = ((name, "robot"),)
                self._touched = tuple(dict.fromkeys((*self._touched, name)))

    def _front(self, name: str, opened: float | None = None) -> np.ndarray:
        closed = np.array([0.72, 0.0, HEIGHTS_M[name]])
        return closed + (self.opened[name] if opened is None else opened) * OUT

    def state(self) -> SceneState:
        drawers = tuple(
            ObjectState(
                name,
                "drawer",
                None,
                tuple(map(float, self._front(name))),
                tuple(map(float, self._front(name, self._start[name]))),
                np.pi,
                (0.015, 0.615, 0.14),
            )
            for name in HEIGHTS_M
        )
        pose = (*map(float, self._tool), *map(float, self._turn.as_euler("xyz")))
        verb = "close" if self._task == CLOSE_DRAWER else "open"
        return SceneState(
            task=self._task,
            instruction=f"{verb} {self._named}",
            target=self._named,
            reference=None,
            step=self.steps,
            objects=drawers,
            ee_pose=pose,
            gripper=0.0,
            contacts=self._contacts,
            held=None,
            touched=self._touched,
            still=True,
        )

    def project(self, position: np.ndarray) -> np.ndarray:
        return np.zeros(2)


def record(task: str, named: str, goes_for: str | None = None, idle: bool = False, jitter_m: float = 0.0) -> Trajectory:
    """The expert's way, until the task is solved or the time is out."""
    env, rng = Cabinet(task, named), np.random.default_rng(0)
    expert = make_expert(env, rng, goes_for)  # type: ignore[arg-type]
    states, actions, texts = [env.state()], [], []
    while not env.success and env.steps < STEPS:
        decided = expert.act()
        action = np.array(decided.action, dtype=np.float64) * (not idle)
        action[:3] += rng.normal(0, jitter_m, 3) if jitter_m else 0
        env.step(action)
        states.append(env.state())
        actions.append(action)
        texts.append(decided.reasoning)
    return Trajectory(
        row={"success": env.success, "seed": 0},
        actions=np.array(actions, np.float32),
        ee_pose=np.array([s.ee_pose for s in states]),
        gripper=np.array([[s.gripper] for s in states]),
        states=tuple(s.to_dict() for s in states),
        reasoning=tuple(texts),
        keyframe=tuple(i == 0 or texts[i] != texts[i - 1] for i in range(len(texts))),
        events=((),) * len(texts),
    )


def marks(trajectory: Trajectory) -> dict[str, float]:
    (verdict,) = get_judge("rubric").judge([trajectory])
    assert verdict.unjudged is None
    return {part: getattr(verdict, part) for part in ("action", "intention", "reasoning", "alignment")}


CASES = [(task, drawer) for task in (OPEN_DRAWER, CLOSE_DRAWER) for drawer in HEIGHTS_M]


@pytest.mark.parametrize(("task", "drawer"), CASES)
def test_the_expert_does_well_in_everything(task: str, drawer: str) -> None:
    done = record(task, drawer)
    assert done.row["success"]
    assert min(marks(done).values()) > 8, marks(done)


@pytest.mark.parametrize(("task", "drawer"), CASES)
def test_each_fault_lowers_its_own_marks(task: str, drawer: str) -> None:
    other = next(name for name in HEIGHTS_M if name != drawer)
    done = record(task, drawer)
    good = marks(done)
    still = marks(record(task, drawer, idle=True))
    assert still["intention"] < good["intention"] - 4
    assert still["action"] < good["action"] - 3
    shaken = marks(record(task, drawer, jitter_m=0.03))
    assert shaken["action"] < good["action"] - 2
    wrong = marks(record(task, drawer, goes_for=other)) if task == OPEN_DRAWER else None
    if wrong:
        assert wrong["intention"] < good["intention"] - 3
        assert wrong["action"] < good["action"] - 2

    def told(change: Callable[[str], str]) -> dict[str, float]:
        return marks(replace(done, reasoning=tuple(change(t or "") for t in done.reasoning)))

    named = told(lambda text: text.replace(drawer, other))
    assert named["reasoning"] < good["reasoning"] - 4
    assert named["action"] == good["action"]
    verbs = {OPEN_DRAWER: ("pull", "push"), CLOSE_DRAWER: ("push", "pull")}[task]
    reversed_verb = told(lambda text: text.replace(*verbs))
    assert reversed_verb["reasoning"] < good["reasoning"]
    assert reversed_verb["alignment"] < good["alignment"] - 1


def test_another_way_to_the_same_end_is_followed() -> None:
    """The hand is at the drawer at once, without the expert's waypoints: the truth is what the state shows."""
    done = record(OPEN_DRAWER, "top drawer")
    start = next(i for i, text in enumerate(done.reasoning) if "subtask: pull" in (text or ""))
    late = replace(
        done,
        actions=done.actions[start:],
        ee_pose=done.ee_pose[start:],
        gripper=done.gripper[start:],
        states=done.states[start:],
        reasoning=done.reasoning[start:],
        keyframe=(True, *done.keyframe[start + 1 :]),
        events=done.events[start:],
    )
    assert marks(late)["intention"] > 6
