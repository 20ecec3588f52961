"""What a judge is: recorded trajectories in, typed verdicts out. Knows no particular judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from dualvla_eval.results import Trajectory

SCALE = 10.0  # 10 excellent, 5 acceptable, 0 poor or no evidence
Dimension = Literal["A", "I", "R", "RA"]


@dataclass(frozen=True)
class Contribution:
    """One reason for a score. The points of a dimension's contributions add up to its score."""

    name: str
    points: float
    detail: str


@dataclass(frozen=True)
class Verdict:
    """Scores from 0 to 10: action (A), intention (I), reasoning (R), alignment of reasoning and action (RA).

    reasoning and alignment are None where nothing was said. unjudged: why there are no scores at all.
    """

    action: float | None = None
    intention: float | None = None
    reasoning: float | None = None
    alignment: float | None = None
    explanation: Mapping[Dimension, Sequence[Contribution]] = field(default_factory=dict)
    unjudged: str | None = None


class Judge(Protocol):
    """`judge` answers one verdict a trajectory, in order. name identifies the judge and its version in the results."""

    name: str

    def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]: ...
