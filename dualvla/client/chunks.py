"""Action chunks in time: what to do at each control step while newer chunks come in late. Pure; knows no network.

Real-time chunking (Black et al. 2025, arXiv:2506.07339), as far as it can be done outside the policy: the old chunk is
executed while the new one is inferred; the part of the new one that has elapsed by then is left out; over the overlap
of both the weight moves from the old to the new one with the paper's soft mask (its Eq. 5), so that nothing jerks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dualvla.errors import WireError
from dualvla.schema import ActionSpace

Actions = npt.NDArray[np.float32]


class ChunkBuffer:
    """The actions still to be executed. A step is one executed action: a control period in which the robot was held
    moves no arm, so it uses up nothing."""

    def __init__(self, space: ActionSpace):
        self._space = space
        self._first = 0  # the step of _actions[0]
        self._actions = np.zeros((0, space.size), np.float32)
        self._newest = -1  # the step that the newest chunk was asked at

    def add(self, actions: np.ndarray, asked_at: int, now: int) -> int:
        """Takes in a chunk float [H, D] that answers the observation of step `asked_at`, at step `now` (both counted
        from 0, `now` not executed yet). Returns how many of its actions are still of use; 0 for one that came too late,
        or after the answer to a later observation.

        Raises: WireError if it is not [H, D] of this action space, or not finite.
        """
        chunk = np.asarray(actions, np.float32)
        if chunk.ndim != 2 or chunk.shape[1] != self._space.size or not np.isfinite(chunk).all():
            raise WireError(
                f"A chunk of shape {chunk.shape} is not finite [H, {self._space.size}] of '{self._space.name}'."
            )
        chunk = chunk[now - asked_at :]
        if asked_at <= self._newest or not len(chunk):
            return 0
        old = self._from(now)
        overlap = min(len(old), len(chunk))
        merged = chunk.copy()
        merged[:overlap] = self._blend(old[:overlap], chunk[:overlap])
        self._first, self._actions, self._newest = now, merged, asked_at
        return len(merged)

    def action(self, step: int) -> Actions | None:
        """float32 [D] for this step, None if there is none."""
        rest = self._from(step)
        if not len(rest):
            return None
        action: Actions = rest[0]
        return action

    def remaining(self, step: int) -> int:
        """Actions left from this step on."""
        return len(self._from(step))

    def clear(self) -> None:
        """As new: no action is left, and steps may count from 0 again."""
        self._first, self._actions, self._newest = 0, self._actions[:0], -1

    def _from(self, step: int) -> Actions:
        return self._actions[max(0, step - self._first) :]

    def _blend(self, old: Actions, new: Actions) -> Actions:
        """Grippers switch where the new chunk outweighs the old one: half open is what neither of them wants."""
        weight = np.asarray(old_weights(len(old)), np.float32)[:, None]
        blended: Actions = weight * old + (1 - weight) * new
        grippers = list(self._space.gripper_dims)
        blended[:, grippers] = np.where(weight > 0.5, old[:, grippers], new[:, grippers])
        return blended


def old_weights(overlap: int) -> Sequence[float]:
    """Of the old chunk's action, for each step of the overlap: from just under 1 down to just above 0.

    c (exp(c) - 1) / (e - 1) with c falling linearly: Eq. 5 of real-time chunking, between its frozen and its free part.
    """
    slope = [(overlap - i) / (overlap + 1) for i in range(overlap)]
    return [c * math.expm1(c) / math.expm1(1) for c in slope]
