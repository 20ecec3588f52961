"""Success tests of SimplerEnv's Google Robot tasks, with what the original counts over an episode.

Knows `World`; no simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from dualvla_eval.simpler import google_tasks as tasks
from dualvla_eval.simpler.google_station import FLOOR_SHAPE, travel
from dualvla_eval.simpler.rules import Rules, Verdict
from dualvla_eval.simpler.world import MIN_IMPULSE, Body, World


class _OneInstruction:
    instruction = 0

    def before_step(self, step: int) -> None:
        """The instruction never changes."""


class PickRules(_OneInstruction):
    """The can is more than 1 cm up and touches nothing but the robot, or was more than 2 cm up for five steps."""

    _LIFTED_M, _HIGH_M, _STEPS_HIGH = 0.01, 0.02, 5

    def __init__(self, world: World):
        self._world = world
        self._can = world.task.setup.source or ""
        self._lifted = False
        self._steps_high = 0

    def judge(self) -> Verdict:
        world, can = self._world, self._can
        grasped = world.grasped(can)
        if not grasped:
            self._lifted = False
        up = float(world.position(can)[2] - world.settled[can].p[2])
        free = all(body.kind == "robot" for body in world.touching(can))
        self._lifted |= free and up > self._LIFTED_M
        high = self._lifted and up > self._HIGH_M
        self._steps_high += high
        success = self._lifted or self._steps_high >= self._STEPS_HIGH
        stats = {"is_grasped": grasped, "lifted_object": self._lifted, "lifted_object_significantly": high}
        return Verdict(success, stats=stats)


class NearRules(_OneInstruction):
    """The source, and no other, was moved next to the target, nothing fell, nothing else is nearer to it."""

    _DROP_M, _NAMED_DROP_M = 0.02, 0.15
    _MOVED_M, _NEAR_M, _CLOSEST_M = 0.03, 0.10, 0.01

    def __init__(self, world: World):
        self._world = world
        setup = world.task.setup
        self._source, self._target = setup.source or "", setup.target or ""
        self._others = [spec.model for spec in setup.objects if spec.model not in (self._source, self._target)]

    def judge(self) -> Verdict:
        world, source, target = self._world, self._source, self._target
        keep_height = all(self._up(model, world.position(model)) > -self._DROP_M for model in self._others) and all(
            self._up(model, world.center(model)) > -self._NAMED_DROP_M for model in (source, target)
        )
        moved = self._moved(source)
        moved_most = all(moved > self._moved(model) for model in (target, *self._others))
        moved_correct = moved > self._MOVED_M and moved_most
        reach = sum(float(np.linalg.norm(world.boxes[model][:2])) / 2 for model in (source, target))
        gap = float(np.linalg.norm((world.center(source) - world.center(target))[:2]))
        near = gap < reach + self._NEAR_M
        # As in the original: the centre of the target, but the origin of the others.
        rivals = [float(np.linalg.norm((world.center(source) - world.position(m))[:2])) for m in self._others]
        closest = all(gap < rival + self._CLOSEST_M for rival in rivals)
        moved_wrong = any(
            self._moved(model) > self._MOVED_M and self._moved(model) > moved for model in (target, *self._others)
        )
        stats = {
            "all_obj_keep_height": keep_height,
            "moved_correct_obj": moved_correct,
            "moved_wrong_obj": moved_wrong,
            "near_tgt_obj": near,
            "is_closest_to_tgt": closest,
        }
        return Verdict(keep_height and moved_correct and near and closest, stats=stats)

    def _up(self, model: str, position: np.ndarray) -> float:
        return float(position[2] - self._world.settled[model].p[2])

    def _moved(self, model: str) -> float:
        return float(np.linalg.norm((self._world.position(model) - self._world.settled[model].p)[:2]))


class DrawerRules(_OneInstruction):
    """Open at 15 cm, closed at 5 cm, of the instant."""

    _OPEN_M, _CLOSED_M = 0.15, 0.05

    def __init__(self, world: World):
        self._world = world
        self._closing = world.task.setup.task == tasks.CLOSE_DRAWER
        self._joint = f"{(world.task.setup.source or '').replace(' ', '_')}_joint"

    def judge(self) -> Verdict:
        opened = travel(self._world.task.station, self._joint)
        success = opened <= self._CLOSED_M if self._closing else opened >= self._OPEN_M
        return Verdict(success, stats={"qpos": opened})


class AppleRules:
    """In the second subtask: the drawer is open 5 cm, and the apple pressed on its floor once, at whatever time.

    The second subtask, and its instruction, begins with step 101. In the original also when a policy that can says
    "terminate"; an action of ours cannot.
    """

    _SUBTASK_STEPS = 100
    _OPEN_M, _WIDE_OPEN_M = 0.05, 0.15
    _JOINT = "top_drawer_joint"

    def __init__(self, world: World):
        self._world = world
        self._apple = Body("object", world.task.setup.source or "")
        self._drawer = Body("station", "top_drawer")
        self._contacts = 0
        self.instruction = 0

    def before_step(self, step: int) -> None:
        if step >= self._SUBTASK_STEPS:
            self.instruction = 1

    def judge(self) -> Verdict:
        opened = travel(self._world.task.station, self._JOINT)
        self._contacts += self._presses_on_floor()
        success = self.instruction == 1 and opened >= self._OPEN_M and self._contacts >= 1
        stats = {"qpos": opened, "is_drawer_open": opened >= self._WIDE_OPEN_M, "has_contact": float(self._contacts)}
        return Verdict(success, stats=stats)

    def _presses_on_floor(self) -> bool:
        total = np.zeros(3)
        for contact in self._world.contacts:
            if (contact.first, contact.second) == (self._apple, self._drawer) and contact.shapes[1] == FLOOR_SHAPE:
                total += contact.impulse
            elif (contact.second, contact.first) == (self._apple, self._drawer) and contact.shapes[0] == FLOOR_SHAPE:
                total -= contact.impulse
        return float(np.linalg.norm(total)) > MIN_IMPULSE


_RULES: Mapping[str, Callable[[World], Rules]] = {
    tasks.PICK_COKE_CAN: PickRules,
    tasks.MOVE_NEAR: NearRules,
    tasks.OPEN_DRAWER: DrawerRules,
    tasks.CLOSE_DRAWER: DrawerRules,
    tasks.PLACE_APPLE: AppleRules,
}


def google_rules(world: World) -> Rules:
    return _RULES[world.task.setup.task](world)
