"""A policy whose answers can be computed by hand, and what loads it in a replica."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dualvla.schema import Observation, PolicyReply, PolicySpec
from dualvla_serve.batching import LoadedPolicy

SPEC = PolicySpec("ee_delta_pose+gripper", 5.0, ("main",), "reasoning", horizon=3, execute_steps=2)


class CountingPolicy:
    """Remembers how often each session asked. actions[:, 0]: that count; [:, 1]: mean pixel; [:, 2]: proprio's sum.

    An instruction may order a fault: "nan", "raise", or "slow" (0.2 s for the whole batch), "very slow" (1.5 s).
    """

    spec = SPEC

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def infer(self, observations: Sequence[Observation], sessions: Sequence[str]) -> list[PolicyReply]:
        if any(o.instruction == "raise" for o in observations):
            raise RuntimeError("secret detail of the policy")
        if any(o.instruction == "slow" for o in observations):
            time.sleep(0.2)
        if any(o.instruction == "very slow" for o in observations):
            time.sleep(1.5)
        return [self._reply(o, session, len(observations)) for o, session in zip(observations, sessions, strict=True)]

    def reset(self, session: str) -> None:
        self.asked.pop(session, None)

    def configure(self, session: str, reasoning: str) -> None:
        """Its reasoning is the same for all."""

    def state_of(self, session: str) -> dict[str, Any]:
        return {"asked": self.asked[session]}

    def restore(self, session: str, state: Mapping[str, Any]) -> None:
        self.asked[session] = state.get("asked", 0)

    def _reply(self, observation: Observation, session: str, batch: int) -> PolicyReply:
        self.asked[session] += 1
        actions = np.zeros((SPEC.horizon, 7), np.float32)
        actions[:, 0] = self.asked[session]
        actions[:, 1] = observation.images["main"].mean()
        actions[:, 2] = 0.0 if observation.proprio is None else observation.proprio.sum()
        actions[:, 3] = batch
        if observation.instruction == "nan":
            actions[:] = np.nan
        text = f"{observation.instruction} at {observation.step}"
        return PolicyReply(actions, text, keyframe=True, reasoning_tokens=4, timing={"policy_ms": 1.0})


def example(step: int = 0, instruction: str = "go", id: str = "") -> Observation:
    image = np.full((16, 24, 3), step % 256, np.uint8)
    return Observation({"main": image}, instruction, np.arange(3, dtype=np.float32), None, step, id)


def load_counting() -> LoadedPolicy:
    return LoadedPolicy(CountingPolicy(), example())


def load_broken() -> LoadedPolicy:
    raise RuntimeError("these weights do not load")
