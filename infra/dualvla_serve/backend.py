"""From one robot's observation to a batch for the policy, and back. Plain asyncio: Ray Serve is a layer above this.

`Backend` is what the app needs; `PolicyRunner` is one with the policy in this process.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from dualvla.errors import DualVLAError, PolicyError
from dualvla.policy import Policy
from dualvla.schema import ACTION_SPACES, Observation, PolicyReply, PolicySpec
from dualvla.wire.messages import check_fits

log = logging.getLogger("dualvla.serve")


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


LoadPolicy = Callable[[], LoadedPolicy]


@dataclass(frozen=True)
class _Waiting:
    observation: Observation
    session: str
    answer: asyncio.Future[PolicyReply]


class PolicyRunner:
    """One policy, asked by one thread: batches and resets never overlap, and OpenMP keeps a single team of threads.

    A batch is whatever came in while the one before was worked on, so a lone robot never waits for company.
    (`serve.batch` closes its batches before the policy is free: without a delay they hold one observation each.)
    """

    def __init__(self, load: LoadPolicy, max_batch_size: int):
        loaded = load()
        self._policy, self._example = loaded.policy, loaded.example
        self._max_batch_size = max_batch_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._waiting: deque[_Waiting] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._thread.submit(self._warm_up).result()

    async def describe(self) -> PolicySpec:
        return self._policy.spec

    async def infer(self, observation: Observation, session: str) -> PolicyReply:
        check_fits(observation, self._policy.spec, self._example)  # one misfit would spoil a whole batch
        waiting = _Waiting(observation, session, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await waiting.answer

    async def reset(self, session: str) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._policy.reset, session)

    async def _work(self) -> None:
        while self._waiting:
            size = min(self._max_batch_size, len(self._waiting))
            await self._answer([self._waiting.popleft() for _ in range(size)])

    async def _answer(self, batch: list[_Waiting]) -> None:
        batch = [one for one in batch if not one.answer.done()]  # who gave up is not worked for
        if not batch:
            return
        call = asyncio.get_running_loop().run_in_executor(
            self._thread, self._infer, [one.observation for one in batch], [one.session for one in batch]
        )
        await asyncio.wait([call])
        error = call.exception()
        if error is not None and len(batch) > 1:
            log.warning("a batch of %d failed (%s): each is asked alone", len(batch), type(error).__name__)
            for one in batch:
                await self._answer([one])
            return
        outcomes = [_as_policy_error(error)] if error is not None else call.result()
        for one, outcome in zip(batch, outcomes, strict=True):
            if one.answer.done():
                continue
            if isinstance(outcome, DualVLAError):
                one.answer.set_exception(outcome)
            else:
                one.answer.set_result(outcome)

    def _infer(self, observations: Sequence[Observation], sessions: Sequence[str]) -> list[PolicyReply | PolicyError]:
        """A reply that is no action comes back as its PolicyError, and spoils nobody else's."""
        started = time.perf_counter()
        replies = self._policy.infer(observations, sessions)
        if len(replies) != len(observations):
            raise PolicyError(f"The policy gave {len(replies)} replies to {len(observations)} observations.")
        timing = {"infer_ms": (time.perf_counter() - started) * 1000, "batch_size": float(len(replies))}
        return [
            _checked(replace(reply, id=observation.id, timing={**timing, **reply.timing}), self._policy.spec)
            for reply, observation in zip(replies, observations, strict=True)
        ]

    def _warm_up(self) -> None:
        session = "warm-up"
        (outcome,) = self._infer([self._example], [session])
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


def _as_policy_error(error: BaseException) -> DualVLAError:
    """The traceback stays in this process's log: nobody beyond it needs to see it."""
    if isinstance(error, DualVLAError):
        return error
    log.error("the policy raised", exc_info=error)
    return PolicyError(f"The policy raised {type(error).__name__}.")
