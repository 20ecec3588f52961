"""The named conventions by which a policy's replies become actions; each can change a number, so each is recorded.

Knows replies and actions; nothing of environments or of who answers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np

from dualvla.errors import UsageError, did_you_mean
from dualvla.schema import ACTION_SPACES, Observation, PolicyReply, PolicySpec

Termination = Literal["first_success", "original"]
Given = Literal["given", "withheld"]

TERMINATION: dict[Termination, str] = {
    "first_success": "ends at the first step with success, at a failure that cannot be undone, or at max_steps",
    "original": "SimplerEnv's: runs on after success until a failure that cannot be undone or "
    "max_steps; what holds at the last step counts",
}
_JUMP = 0.5  # of the gripper's opening: as SimplerEnv's Octo adapter


@dataclass(frozen=True)
class Conventions:
    """termination: one of TERMINATION. sticky_gripper: once a commanded opening has jumped by more than 0.5, it is held
    for that many steps (0: never; SimplerEnv's Octo on the Google Robot: 15). ensemble: every step asks anew, and the
    mean of the last that many predictions for this very step is executed (0: chunks are executed as they come; Octo in
    SimplerEnv: 4). proprioception: whether the policy is shown it.
    """

    termination: Termination = "first_success"
    sticky_gripper: int = 0
    ensemble: int = 0
    proprioception: Given = "given"

    def shown(self, observation: Observation) -> Observation:
        return observation if self.proprioception == "given" else replace(observation, proprio=None)


def parse(base: Conventions, assignments: Sequence[str]) -> Conventions:
    """`sticky_gripper=15` and the like over `base`. Raises: UsageError."""
    names = [f.name for f in fields(Conventions)]
    changes: dict[str, Any] = {}
    for text in assignments:
        name, _, value = text.partition("=")
        if name not in names:
            raise UsageError(f"There is no convention '{name}'.", did_you_mean(name, names))
        options = {"termination": get_args(Termination), "proprioception": get_args(Given)}.get(name)
        if options is None and not value.isdecimal():
            raise UsageError(f"Convention {name}: '{value}' is no number of steps.", f"write {name}=4, or 0 for none")
        if options is not None and value not in options:
            raise UsageError(f"Convention {name} cannot be '{value}'.", did_you_mean(value, options))
        changes[name] = value if options else int(value)
    return replace(base, **changes)


class Plan:
    """What is left to execute of one episode's replies."""

    def __init__(self, conventions: Conventions, spec: PolicySpec):
        self._ensemble, self._execute = conventions.ensemble, spec.execute_steps
        self._queue: deque[np.ndarray] = deque()
        self._predictions: deque[tuple[int, np.ndarray]] = deque(maxlen=conventions.ensemble or 1)
        grippers = ACTION_SPACES[spec.action_space].gripper_dims
        self._grippers = [(dim, _Sticky(conventions.sticky_gripper)) for dim in grippers]

    @property
    def empty(self) -> bool:
        return not self._queue

    def add(self, step: int, reply: PolicyReply) -> None:
        """reply: a good one, asked at `step`."""
        actions = np.array(reply.actions, dtype=np.float32)
        if not self._ensemble:
            self._queue.extend(actions[: self._execute])
            return
        self._predictions.append((step, actions))
        own = [chunk[step - at] for at, chunk in self._predictions if step - at < len(chunk)]
        self._queue.append(np.asarray(np.mean(own, axis=0), dtype=np.float32))

    def clear(self) -> None:
        self._queue.clear()
        self._predictions.clear()

    def next(self) -> np.ndarray:
        """float32 [D]."""
        action = self._queue.popleft().copy()
        for dim, sticky in self._grippers:
            action[dim] = sticky(float(action[dim]))
        return action


class _Sticky:
    """An opening that is held for a number of steps once the command has jumped to it."""

    def __init__(self, steps: int):
        self._steps, self._left = steps, 0
        self._held = 0.0
        self._previous: float | None = None

    def __call__(self, opening: float) -> float:
        jumped = self._previous is not None and abs(opening - self._previous) > _JUMP
        self._previous = opening
        if jumped and self._left == 0:
            self._left, self._held = self._steps, opening
        if self._left == 0:
            return opening
        self._left -= 1
        return self._held
