"""Many robots' observations into few calls of a policy, none of them answered after its deadline. Plain asyncio.

A batch is whatever came in while the one before was worked on, so a lone robot never waits for company. What is nearest
to its deadline goes first; what cannot be answered in time, by what batches of that size have lately taken, is refused
at once. Knows policies and sessions' states; no network, no Ray.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from dualvla.errors import BusyError, DualVLAError, LateError, PolicyError
from dualvla.policy import Policy, SessionPolicy
from dualvla.schema import ACTION_SPACES, Observation, PolicyReply, PolicySpec
from dualvla.wire.messages import check_fits

log = logging.getLogger("dualvla.serve")

PATIENCE_S = 1.0  # an observation without a deadline is as urgent as one that is due this long after it came in


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy and an observation of the kind it expects, to warm up with."""

    policy: Policy
    example: Observation


LoadPolicy = Callable[[], LoadedPolicy]


@dataclass(frozen=True)
class Asked:
    """One call. session: its name (keys the policy's randomness). state: what the policy remembers of it. reasoning: of
    this session, "" for the policy's own. deadline: on `time.monotonic`, None for never."""

    observation: Observation
    session: str
    state: Mapping[str, Any]
    reasoning: str = ""
    deadline: float | None = None


@dataclass(frozen=True)
class Answered:
    """state: what the policy remembers of the session from now on. *_ms: waiting, and in the policy."""

    reply: PolicyReply
    state: dict[str, Any]
    queue_ms: float
    infer_ms: float
    batch_size: int


class BatchCost:
    """What a batch of n observations takes, in seconds: for sizes up to each power of two, mean plus two deviations of
    the last few dozen. A size not seen yet counts as the next larger one seen, or else the largest."""

    def __init__(self) -> None:
        self._mean: dict[int, float] = {}
        self._variance: dict[int, float] = {}

    def add(self, size: int, seconds: float, weight: float = 0.1) -> None:
        bucket = _bucket(size)
        mean = self._mean.get(bucket, seconds)
        off = seconds - mean
        self._mean[bucket] = mean + weight * off
        self._variance[bucket] = (1 - weight) * (self._variance.get(bucket, 0.0) + weight * off * off)

    def estimate(self, size: int) -> float:
        if not self._mean:
            return 0.0
        bucket = _bucket(size)
        known = min((b for b in self._mean if b >= bucket), default=max(self._mean))
        return self._mean[known] + 2 * self._variance[known] ** 0.5


def _bucket(size: int) -> int:
    return 1 << (size - 1).bit_length()


@dataclass(frozen=True, eq=False)  # two are the same only if they are one
class Waiting:
    asked: Asked
    answer: asyncio.Future[Answered]
    since: float

    @property
    def due(self) -> float:
        return self.asked.deadline if self.asked.deadline is not None else self.since + PATIENCE_S


def next_batch(
    waiting: Sequence[Waiting], now: float, cost: BatchCost, most: int
) -> tuple[list[Waiting], list[Waiting]]:
    """The batch to work on, and those that can no longer be answered in time. No session is in a batch twice.

    The batch grows in the order of urgency for as long as that makes nobody in it late.
    """
    late = [one for one in waiting if _misses(one, now + cost.estimate(1))]
    batch: list[Waiting] = []
    sessions: set[str] = set()
    for one in sorted((w for w in waiting if w not in late), key=lambda w: w.due):
        finish = now + cost.estimate(len(batch) + 1)
        if len(batch) == most or any(_misses(other, finish) for other in (*batch, one)):
            break
        if one.asked.session not in sessions:
            batch.append(one)
            sessions.add(one.asked.session)
    return batch, late


def _misses(one: Waiting, finish: float) -> bool:
    return one.asked.deadline is not None and finish > one.asked.deadline


class Meter(Protocol):
    """What a runner tells of its work."""

    def batch(self, size: int, seconds: float) -> None: ...

    def waiting(self, number: int) -> None: ...


class PolicyRunner:
    """One policy, asked by one thread: calls never overlap, and OpenMP keeps a single team of threads.

    A `SessionPolicy` remembers nothing between two calls: what it knew of a session comes with the question and leaves
    with the answer. Of any other policy the state stays inside, under the session's name, until `forget`.
    """

    def __init__(self, load: LoadPolicy, max_batch_size: int, most_waiting: int = 512, meter: Meter | None = None):
        """Loads and warms up: seconds to minutes. Raises: what `load` raises; PolicyError."""
        loaded = load()
        self._policy, self._example = loaded.policy, loaded.example
        self.spec: PolicySpec = self._policy.spec
        self.portable = isinstance(self._policy, SessionPolicy)
        self._max_batch_size, self._most_waiting = max_batch_size, most_waiting
        self._meter = meter
        self._cost = BatchCost()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._waiting: list[Waiting] = []
        self._busy_until = 0.0
        self._worker: asyncio.Task[None] | None = None
        self._thread.submit(self._warm_up).result()

    @property
    def example(self) -> Observation:
        return self._example

    @property
    def queue_length(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        return self._worker is None or self._worker.done()

    def estimated_s(self, size: int = 1) -> float:
        return self._cost.estimate(size)

    async def infer(self, asked: Asked) -> Answered:
        """Raises: WireError for an observation that does not fit; LateError; BusyError; PolicyError."""
        check_fits(asked.observation, self.spec, self._example)  # one misfit would spoil a whole batch
        if len(self._waiting) >= self._most_waiting:
            raise BusyError(f"{len(self._waiting)} observations are waiting already.", "ask again later")
        now = time.monotonic()
        waiting = Waiting(asked, asyncio.get_running_loop().create_future(), now)
        if _misses(waiting, self._earliest_finish(waiting, now)):
            raise _late(waiting)
        self._waiting.append(waiting)
        if self.idle:
            self._worker = asyncio.create_task(self._work())
        if asked.deadline is None:
            return await waiting.answer
        try:
            return await asyncio.wait_for(waiting.answer, max(0.0, asked.deadline - time.monotonic()))
        except TimeoutError:
            raise _late(waiting) from None

    def forget(self, session: str) -> None:
        """Drops what a policy that is no `SessionPolicy` keeps of a session."""
        if not self.portable:
            self._thread.submit(self._policy.reset, session)

    def close(self) -> None:
        """Ends the thread once it has done what it was given."""
        self._thread.shutdown(wait=False)

    def _earliest_finish(self, waiting: Waiting, now: float) -> float:
        """When `waiting` would be answered if everything more urgent goes first, in full batches."""
        ahead = sum(one.due <= waiting.due for one in self._waiting)
        full, rest = divmod(ahead, self._max_batch_size)
        start = max(now, self._busy_until) + full * self._cost.estimate(self._max_batch_size)
        return start + self._cost.estimate(rest + 1)

    async def _work(self) -> None:
        while self._waiting:
            batch, late = next_batch(self._waiting, time.monotonic(), self._cost, self._max_batch_size)
            taken = {id(one) for one in (*batch, *late)}
            self._waiting = [one for one in self._waiting if id(one) not in taken]
            for one in late:
                if not one.answer.done():
                    one.answer.set_exception(_late(one))
            if self._meter is not None:
                self._meter.waiting(len(self._waiting))
            await self._answer([one for one in batch if not one.answer.done()])  # who gave up is not worked for

    async def _answer(self, batch: list[Waiting]) -> None:
        if not batch:
            return
        started = time.monotonic()
        self._busy_until = started + self._cost.estimate(len(batch))
        call = asyncio.get_running_loop().run_in_executor(self._thread, self._infer, [one.asked for one in batch])
        await asyncio.wait([call])
        seconds = time.monotonic() - started
        self._busy_until = 0.0
        error = call.exception()
        if error is not None and len(batch) > 1:
            log.warning("a batch of %d failed (%s): each is asked alone", len(batch), type(error).__name__)
            for one in batch:
                await self._answer([one])
            return
        self._cost.add(len(batch), seconds)
        if self._meter is not None:
            self._meter.batch(len(batch), seconds)
        outcomes = [_as_policy_error(error)] if error is not None else call.result()
        for one, outcome in zip(batch, outcomes, strict=True):
            if one.answer.done():
                continue
            if isinstance(outcome, DualVLAError):
                one.answer.set_exception(outcome)
            else:
                reply, state = outcome
                waited_ms = (started - one.since) * 1000
                one.answer.set_result(Answered(reply, state, waited_ms, seconds * 1000, len(batch)))

    def _infer(self, batch: Sequence[Asked]) -> list[tuple[PolicyReply, dict[str, Any]] | PolicyError]:
        """A reply that is no action comes back as its PolicyError, and spoils nobody else's."""
        for asked in batch:
            self._give(asked)
        started = time.perf_counter()
        try:
            replies = self._policy.infer([a.observation for a in batch], [a.session for a in batch])
            took_ms = (time.perf_counter() - started) * 1000
            states = [self._take(asked) for asked in batch]
        finally:
            if self.portable:
                for asked in batch:
                    self._policy.reset(asked.session)
        if len(replies) != len(batch):
            raise PolicyError(f"The policy gave {len(replies)} replies to {len(batch)} observations.")
        timing = {"infer_ms": took_ms, "batch_size": float(len(replies))}
        out: list[tuple[PolicyReply, dict[str, Any]] | PolicyError] = []
        for reply, asked, state in zip(replies, batch, states, strict=True):
            checked = replace(reply, id=asked.observation.id, timing={**timing, **reply.timing})
            fault = _fault(checked, self.spec)
            out.append(fault or (checked, state))
        return out

    def _give(self, asked: Asked) -> None:
        if isinstance(self._policy, SessionPolicy):
            if asked.reasoning:
                self._policy.configure(asked.session, asked.reasoning)
            self._policy.restore(asked.session, asked.state)

    def _take(self, asked: Asked) -> dict[str, Any]:
        return self._policy.state_of(asked.session) if isinstance(self._policy, SessionPolicy) else {}

    def _warm_up(self) -> None:
        """Twice: the first call pays for what is built on first use, the second is what a call takes."""
        for _ in range(2):
            started = time.perf_counter()
            (outcome,) = self._infer([Asked(self._example, "warm-up", {})])
            if isinstance(outcome, PolicyError):
                raise outcome
        self._cost.add(1, time.perf_counter() - started)
        self._policy.reset("warm-up")


def _fault(reply: PolicyReply, spec: PolicySpec) -> PolicyError | None:
    actions = np.asarray(reply.actions)
    width = ACTION_SPACES[spec.action_space].size
    if actions.ndim != 2 or actions.shape[0] < 1 or actions.shape[1] != width:
        return PolicyError(f"The policy answered actions of shape {actions.shape}, not [H, {width}].")
    if not np.isfinite(actions).all():
        return NotFiniteError("The policy answered an action that is not finite.")
    return None


class NotFiniteError(PolicyError):
    """NaN or infinity among a policy's actions."""


def _late(waiting: Waiting) -> LateError:
    assert waiting.asked.deadline is not None
    given_ms = (waiting.asked.deadline - waiting.since) * 1000
    return LateError(f"No answer is possible within {given_ms:.0f} ms.", "give it more time, or serve more replicas")


def _as_policy_error(error: BaseException) -> DualVLAError:
    """The traceback stays in this process's log: nobody beyond it needs to see it."""
    if isinstance(error, DualVLAError):
        return error
    log.error("the policy raised", exc_info=error)
    return PolicyError(f"The policy raised {type(error).__name__}.")
