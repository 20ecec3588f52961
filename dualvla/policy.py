"""The Policy protocol: how evaluation and serving drive any policy, whatever is behind it.

Knows schema.py only. Policies hold no hidden counters: all state belongs to a session and is dropped by `reset`.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from dualvla.schema import Observation, PolicyReply, PolicySpec


@runtime_checkable
class Policy(Protocol):
    """Batch in, batch out. `sessions[i]` names the robot or episode that `observations[i]` comes from."""

    spec: PolicySpec

    def infer(self, observations: Sequence[Observation], sessions: Sequence[str]) -> list[PolicyReply]: ...

    def reset(self, session: str) -> None: ...
