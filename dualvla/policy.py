"""The Policy protocol: how evaluation and serving drive any policy, whatever is behind it.

Knows schema.py only. Policies hold no hidden counters: all state belongs to a session and is dropped by `reset`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from dualvla.schema import Observation, PolicyReply, PolicySpec


@runtime_checkable
class Policy(Protocol):
    """Batch in, batch out. `sessions[i]` names the robot or episode that `observations[i]` comes from."""

    spec: PolicySpec

    def infer(self, observations: Sequence[Observation], sessions: Sequence[str]) -> list[PolicyReply]: ...

    def reset(self, session: str) -> None: ...


@runtime_checkable
class SessionPolicy(Policy, Protocol):
    """A policy whose sessions can be set up one by one, and carried to another process.

    reasoning: "auto", "never" or "every:K" (K control steps). A state is plain values (numbers, text, lists, maps),
    empty if the session remembers nothing; after `restore` the session goes on as if it had never moved.
    """

    def configure(self, session: str, reasoning: str) -> None: ...

    def state_of(self, session: str) -> dict[str, Any]: ...

    def restore(self, session: str, state: Mapping[str, Any]) -> None: ...
