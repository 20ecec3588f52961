"""Judges by name. Knows their names only; each is imported when asked for."""

from __future__ import annotations

from dualvla.errors import UsageError, did_you_mean
from dualvla_eval.judges.base import Contribution, Judge, Verdict

JUDGES = ("rubric",)

__all__ = ["JUDGES", "Contribution", "Judge", "Verdict", "get_judge"]


def get_judge(name: str) -> Judge:
    """Raises: UsageError for a judge that does not exist."""
    if name == "rubric":
        from dualvla_eval.judges.rubric import RubricJudge

        return RubricJudge()
    raise UsageError(f"Unknown judge '{name}'.", did_you_mean(name, JUDGES))
