"""The text of embodied reasoning in suite `blocks`: one small grammar, written by experts and read by judges.

    text    = "plan: " step {", " step} ". subtask: " step ". move: " move "."
    step    = verb " " object [" " link " " object]
    verb    = "reach" | "touch" | "lower to" | "grasp" | "lift" | "carry" | "place" | "release" | "pull" | "push"
    link    = "to" | "on" | "near" | "in"
    move    = one of MOVES

For example: "plan: reach red cube, grasp red cube, lift red cube. subtask: reach red cube. move: left."
Directions are those of the base frame: forward is away from the robot, left is its left. Knows no simulator.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOVES = ("forward", "back", "left", "right", "up", "down", "open gripper", "close gripper", "stay")
VERBS = ("reach", "touch", "lower to", "grasp", "lift", "carry", "place", "release", "pull", "push")
LINKS = ("to", "on", "near", "in")

_STILL_M = 0.002
_TEXT = re.compile(r"plan: (?P<plan>.+?)\. subtask: (?P<subtask>.+?)\. move: (?P<move>[a-z ]+)\.?")
_STEP = re.compile(
    rf"(?P<verb>{'|'.join(VERBS)}) (?P<object>[a-z0-9 ]+?)(?: (?P<link>{'|'.join(LINKS)}) (?P<second>[a-z0-9 ]+))?"
)


@dataclass(frozen=True)
class Step:
    """One step of a plan, such as "carry red cube to blue cube"."""

    verb: str
    target: str
    link: str | None = None
    reference: str | None = None

    def __str__(self) -> str:
        tail = f" {self.link} {self.reference}" if self.link else ""
        return f"{self.verb} {self.target}{tail}"


@dataclass(frozen=True)
class StatedReasoning:
    """What a text says. move is one of MOVES."""

    plan: tuple[Step, ...]
    subtask: Step
    move: str

    @property
    def target(self) -> str:
        """The object that the subtask is about."""
        return self.subtask.target

    def __str__(self) -> str:
        return f"plan: {', '.join(map(str, self.plan))}. subtask: {self.subtask}. move: {self.move}."


def parse(text: str | None) -> StatedReasoning | None:
    """None if the text is not of the grammar. Whether its objects exist is for the caller to see."""
    match = _TEXT.fullmatch((text or "").strip().lower())
    if match is None or match["move"] not in MOVES:
        return None
    plan = [_parse_step(step) for step in match["plan"].split(", ")]
    subtask = _parse_step(match["subtask"])
    if subtask is None or None in plan:
        return None
    return StatedReasoning(tuple(step for step in plan if step is not None), subtask, match["move"])


def _parse_step(text: str) -> Step | None:
    match = _STEP.fullmatch(text)
    return Step(match["verb"], match["object"], match["link"], match["second"]) if match else None


def motion_primitive(displacement_m: Sequence[float] | np.ndarray, gripper: str | None = None) -> str:
    """The word for a motion: along its largest component in the base frame, if any.

    displacement_m [3]. gripper: "open" or "close" when the gripper changes, which then is the motion.
    """
    if gripper is not None:
        return f"{gripper} gripper"
    displacement = np.asarray(displacement_m)
    axis = int(np.argmax(np.abs(displacement)))
    if abs(displacement[axis]) < _STILL_M:
        return "stay"
    return (("back", "forward"), ("right", "left"), ("down", "up"))[axis][int(displacement[axis] > 0)]
