"""Success tests of SimplerEnv. The tests of one robot's tasks are in its own module; `rules_for` finds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from dualvla_eval.simpler import widowx_tasks
from dualvla_eval.simpler.world import Body, World


@dataclass(frozen=True)
class Verdict:
    """Of one instant: nothing is latched but what the original latches. stats: the original's per-step facts.

    failure: why the episode cannot succeed any more; the original knows none.
    """

    success: bool
    failure: str | None = None
    stats: Mapping[str, bool | float] = field(default_factory=dict)


class Rules(Protocol):
    """One episode's success test. instruction: index into the setup's, which may change before a step."""

    instruction: int

    def before_step(self, step: int) -> None:
        """step: control steps done so far."""

    def judge(self) -> Verdict:
        """After each control step, once `World.read` was called."""


class PutOnRules:
    """WidowX: the source lies over the target, at most a little above it, and (`alone`) touches nothing else."""

    instruction = 0
    _SLACK_M = 0.003

    def __init__(self, world: World):
        self._world = world
        self._task = widowx_tasks.get_task(world.task.setup.task)

    def before_step(self, step: int) -> None:
        """Nothing changes during the episode."""

    def judge(self) -> Verdict:
        world, task = self._world, self._task
        on_target = self._is_over()
        alone = not task.alone or all(
            body.kind == "robot" or body == Body("object", task.target) for body in world.touching(task.source)
        )
        success = on_target and alone
        return Verdict(success, stats={"is_src_obj_grasped": world.grasped(task.source), "src_on_target": success})

    def _is_over(self) -> bool:
        world, task = self._world, self._task
        offset = world.center(task.source) - world.center(task.target)
        source, target = world.boxes[task.source], world.boxes[task.target]
        reach = float(np.linalg.norm(target[:2])) / 2 + self._SLACK_M
        gap = offset[2] - target[2] / 2 - source[2] / 2
        return bool(np.linalg.norm(offset[:2]) <= reach and offset[2] > 0 and gap <= task.max_gap_m)


def rules_for(world: World) -> Rules:
    if world.task.setup.suite == widowx_tasks.SUITE:
        return PutOnRules(world)
    from dualvla_eval.simpler.google_rules import google_rules

    return google_rules(world)
