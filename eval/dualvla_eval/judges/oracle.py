"""Ground truth at every recorded step: what the scripted expert would have said and done in that very state.

The expert looks at the privileged state alone, so it can be asked about states that another policy got into. Knows the
expert and recorded states; nothing of scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from dualvla_eval.experts import make_expert
from dualvla_eval.reasoning import StatedReasoning, parse
from dualvla_eval.results import Trajectory
from dualvla_eval.sim.base import ObjectState, SceneState, SimEnv


@dataclass(frozen=True)
class Truth:
    """delta_m: [3], the tool's next displacement. stated: what a correct text says in this state."""

    delta_m: np.ndarray
    stated: StatedReasoning


class _Recording:
    """As much of an environment as an expert looks at, showing one recorded state after another."""

    def __init__(self, state: SceneState):
        self.current = state

    def state(self) -> SceneState:
        return self.current

    def project(self, position: np.ndarray) -> np.ndarray:
        return np.zeros(2)  # the pixel is for training targets only


def read_state(recorded: Mapping[str, Any]) -> SceneState:
    """The inverse of `SceneState.to_dict` after a trip through JSON."""
    values = _tuples(recorded)
    values["objects"] = tuple(ObjectState(**_tuples(o)) for o in recorded["objects"])
    values["contacts"] = tuple((a, b) for a, b in recorded["contacts"])
    return SceneState(**values)


def _tuples(recorded: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in recorded.items()}


def truths(trajectory: Trajectory, states: list[SceneState]) -> list[Truth]:
    """One for each step that was acted on."""
    recording = _Recording(states[0])
    rng = np.random.default_rng(trajectory.row["seed"])
    expert = make_expert(cast(SimEnv, recording), rng, watching=True)
    found = []
    for state in states[:-1]:
        recording.current = state
        step = expert.act()
        stated = parse(step.reasoning)
        assert stated is not None, step.reasoning
        found.append(Truth(np.asarray(step.action[:3], dtype=np.float64), stated))
    return found
