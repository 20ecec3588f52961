"""From one robot's observation to a batch for the policy, and back. Plain asyncio: Ray Serve is a layer above this.

`Backend` is what the app needs; `PolicyRunner` holds a policy in this process.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from dualvla.errors import PolicyError, UsageError
from dualvla.policy import Policy
from dualvla.schema import ACTION_SPACES, Observation, PolicyReply, PolicySpec
from dualvla.wire.messages import check_fits


class Backend(Protocol):
    """Raises only WireError (the policy cannot use this), PolicyError (it failed), ServerError (nobody to ask)."""

    async def describe(self) -> PolicySpec: ...

    async def infer(self, observation: Observation, session: str) -> PolicyReply: ...

    async def reset(self, session: str) -> None: ...


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy and an observation of the kind it expects, to warm up with."""

    policy: Policy
    example: Observation


@dataclass(frozen=True)
class PolicySource:
    """Where a replica gets its policy: `loader` is the import path "module:function" of str -> LoadedPolicy."""

    argument: str
    loader: str = "dualvla_serve.checkpoint:load"

    def load(self) -> LoadedPolicy:
        module, _, name = self.loader.partition(":")
        try:
            function: Callable[[str], LoadedPolicy] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UsageError(f"No policy loader '{self.loader}': {error}.", "write it as module:function") from error
        return function(self.argument)


class PolicyRunner:
    """One policy, asked by one thread: batches and resets never overlap, and OpenMP keeps a single team of threads."""

    def __init__(self, source: PolicySource):
        loaded = source.load()
        self._policy = loaded.policy
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._thread.submit(self._warm_up, loaded.example).result()

    def spec(self) -> PolicySpec:
        return self._policy.spec

    def check(self, observation: Observation) -> None:
        """Before it joins a batch. Raises: WireError if the policy could do nothing with this observation."""
        check_fits(observation, self._policy.spec)

    async def run(
        self, observations: Sequence[Observation], sessions: Sequence[str]
    ) -> list[PolicyReply | PolicyError]:
        """One batch. A reply that is no action comes back as its PolicyError, and spoils nobody else's.

        Raises: whatever the policy raises.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._infer, observations, sessions)

    async def reset(self, session: str) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._policy.reset, session)

    def _infer(self, observations: Sequence[Observation], sessions: Sequence[str]) -> list[PolicyReply | PolicyError]:
        started = time.perf_counter()
        replies = self._policy.infer(observations, sessions)
        if len(replies) != len(observations):
            raise PolicyError(f"The policy gave {len(replies)} replies to {len(observations)} observations.")
        timing = {"infer_ms": (time.perf_counter() - started) * 1000, "batch_size": float(len(replies))}
        return [
            _checked(replace(reply, id=observation.id, timing={**timing, **reply.timing}), self._policy.spec)
            for reply, observation in zip(replies, observations, strict=True)
        ]

    def _warm_up(self, example: Observation) -> None:
        session = "warm-up"
        (outcome,) = self._infer([example], [session])
        self._policy.reset(session)
        if isinstance(outcome, PolicyError):
            raise outcome


def _checked(reply: PolicyReply, spec: PolicySpec) -> PolicyReply | PolicyError:
    actions = np.asarray(reply.actions)
    width = ACTION_SPACES[spec.action_space].size
    if actions.ndim != 2 or actions.shape[0] < 1 or actions.shape[1] != width:
        return PolicyError(f"The policy answered actions of shape {actions.shape}, not [H, {width}].")
    if not np.isfinite(actions).all():
        return PolicyError("The policy answered an action that is not finite.")
    return reply
