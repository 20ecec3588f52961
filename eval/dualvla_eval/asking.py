"""How an episode asks its policy: alone and at once, together with whoever else asks, or over a network.

An episode only knows `EpisodePolicy`: one question, one awaited answer. Knows the `Policy` protocol; nothing of Ray.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dualvla.errors import BusyError, LateError, ServerError, SessionLostError, StoppedError, UnsafeError
from dualvla.policy import Policy
from dualvla.schema import Observation, PolicyReply, PolicySpec
from dualvla_eval.sim.base import SimEnv
from dualvla_eval.suites import Episode

log = logging.getLogger(__name__)

_PAUSE_S = 1.0
_FINAL = (LateError, StoppedError, UnsafeError, SessionLostError)  # asking the same again changes nothing


@dataclass(frozen=True)
class Answer:
    """infer_ms: wall time of the call, shared by the observations in its batch. reply: None if there was none."""

    reply: PolicyReply | None
    infer_ms: float


class EpisodePolicy(Protocol):
    """Raises, from `ask`: PolicyError, and ServerError where the policy is somewhere else."""

    spec: PolicySpec

    async def ask(self, observation: Observation, session: str) -> Answer: ...

    def attach(self, session: str, env: SimEnv, episode: Episode) -> None:
        """Called once an episode, after the environment was reset and before its first question."""

    def renew(self, session: str) -> None:
        """The instruction has changed: what the session remembers of the old one is dropped."""

    def reset(self, session: str) -> None:
        """The session is over, or about to begin."""


@runtime_checkable
class PrivilegedPolicy(Protocol):
    """A policy that may look into the simulator: an expert."""

    def attach(self, session: str, env: SimEnv, episode: Episode) -> None:
        """Called once an episode, after the environment was reset and before the first `infer` of that session."""


class _OfThisProcess:
    """What an episode tells a policy beside its questions."""

    def __init__(self, policy: Policy):
        self.spec = policy.spec
        self._policy = policy

    def attach(self, session: str, env: SimEnv, episode: Episode) -> None:
        if isinstance(self._policy, PrivilegedPolicy):
            self._policy.attach(session, env, episode)

    def renew(self, session: str) -> None:
        if not isinstance(self._policy, PrivilegedPolicy):  # that one has seen it coming
            self._policy.reset(session)

    def reset(self, session: str) -> None:
        self._policy.reset(session)


class Batched(_OfThisProcess):
    """Asks a policy about all observations that have come while it was busy, without waiting for any other.

    max_batch: at most so many at once. executor: where the policy computes, so that questions come in meanwhile; None:
    here, once every episode that could go on has asked.
    """

    def __init__(self, policy: Policy, max_batch: int | None = None, executor: Executor | None = None):
        super().__init__(policy)
        self._max_batch, self._executor = max_batch, executor
        self._waiting: deque[tuple[Observation, str, asyncio.Future[Answer]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def ask(self, observation: Observation, session: str) -> Answer:
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((observation, session, answer))
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        return await answer

    async def _work(self) -> None:
        while self._waiting:
            number = min(len(self._waiting), self._max_batch or len(self._waiting))
            asked = [self._waiting.popleft() for _ in range(number)]
            observations, sessions, answers = zip(*asked, strict=True)
            started = time.perf_counter()
            call = asyncio.ensure_future(self._infer(observations, sessions))
            await asyncio.wait([call])
            infer_ms = (time.perf_counter() - started) * 1e3 / number
            error = call.exception()
            replies = [] if error else [*call.result(), *[None] * number]
            for i, answer in enumerate(answers):
                if answer.done():  # given up
                    continue
                if error is not None:
                    answer.set_exception(error)
                else:
                    answer.set_result(Answer(replies[i], infer_ms))
            await asyncio.sleep(0)
        self._worker = None

    async def _infer(
        self, observations: Sequence[Observation], sessions: Sequence[str]
    ) -> Sequence[PolicyReply | None]:
        if self._executor is None:
            return self._policy.infer(observations, sessions)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._policy.infer, observations, sessions)


class Direct(_OfThisProcess):
    """A policy of this process that answers faster than it could wait for others: an expert, the random policy."""

    async def ask(self, observation: Observation, session: str) -> Answer:
        started = time.perf_counter()
        replies: Sequence[PolicyReply | None] = self._policy.infer([observation], [session])
        return Answer(replies[0] if replies else None, (time.perf_counter() - started) * 1e3)


class Remote:
    """A policy behind a network, which batches by itself: every question goes at once, in a thread of its own.

    patience_s: how long a policy that cannot be reached is asked again before the question fails with ServerError.
    """

    def __init__(self, policy: Policy, patience_s: float, executor: Executor):
        self.spec = policy.spec
        self._policy, self._patience_s, self._executor = policy, patience_s, executor

    async def ask(self, observation: Observation, session: str) -> Answer:
        loop, give_up = asyncio.get_running_loop(), time.monotonic() + self._patience_s
        while True:
            started = time.perf_counter()
            try:
                call = loop.run_in_executor(self._executor, self._policy.infer, [observation], [session])
                replies: Sequence[PolicyReply | None] = await call
            except _FINAL:
                raise
            except (ServerError, BusyError) as error:
                if time.monotonic() >= give_up:
                    raise
                log.warning("%s; asked again", error)
                await asyncio.sleep(_PAUSE_S)
                continue
            return Answer(replies[0] if replies else None, (time.perf_counter() - started) * 1e3)

    def attach(self, session: str, env: SimEnv, episode: Episode) -> None:
        """Nothing here is shown to a network."""

    def renew(self, session: str) -> None:
        self._policy.reset(session)

    def reset(self, session: str) -> None:
        self._policy.reset(session)
