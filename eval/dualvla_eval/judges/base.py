"""What a judge is: recorded trajectories in, typed verdicts out. Knows no particular judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from dualvla_eval.results import Trajectory

SCALE = 10.0  # 10 excellent, 5 acceptable, 0 poor or no evidence
Dimension = Literal["A", "I", "R", "RA"]
DIMENSIONS: tuple[Dimension, ...] = ("A", "I", "R", "RA")


@dataclass(frozen=True)
class Contribution:
    """One reason for a score. The points of a dimension's contributions add up to its score."""

    name: str
    points: float
    detail: str


@dataclass(frozen=True)
class Verdict:
    """Scores from 0 to 10: action (A), intention (I), reasoning (R), alignment of reasoning and action (RA).

    reasoning and alignment are None where nothing was said. unjudged: why there are no scores at all; passing: asking
    again may help (a server that was away), so that nothing is remembered. rationale: the judge's own words. success:
    what it thinks of it, recorded and never used. examples: ids of the knowledge base's entries that it was shown.
    """

    action: float | None = None
    intention: float | None = None
    reasoning: float | None = None
    alignment: float | None = None
    explanation: Mapping[Dimension, Sequence[Contribution]] = field(default_factory=dict)
    unjudged: str | None = None
    passing: bool = False
    rationale: str = ""
    success: bool | None = None
    examples: tuple[str, ...] = ()

    def mark(self, dimension: Dimension) -> float | None:
        return {"A": self.action, "I": self.intention, "R": self.reasoning, "RA": self.alignment}[dimension]


Advance = Callable[[int], object]


def unheard(count: int) -> None:
    """Progress that nobody watches."""


class Judge(Protocol):
    """name: identifies the judge in the results. identity: all that its verdicts depend on, JSON-ready."""

    name: str

    @property
    def identity(self) -> Mapping[str, Any]: ...

    def judge(self, trajectories: Sequence[Trajectory], advance: Advance = unheard) -> list[Verdict]:
        """One verdict a trajectory, in order; `advance` is told how many more are done.

        The sequence may read its trajectories as they are asked for: take each as often as needed, and keep few.
        """

    def usage(self) -> Mapping[str, int] | None:
        """Of a model so far: calls, prompt_tokens, completion_tokens, cached. None: there is nothing to count."""
