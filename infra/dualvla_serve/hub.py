"""What all replicas of an endpoint share: the emergency stop, the states of their sessions, and who is there.

One small object in one process (a Ray actor where there are several replicas; deploy.py). A replica reports to it and
waits at it for news (`exchange`), writes sessions behind its answers (`save`), and asks it whose a session is
(`claim`). States are bytes to it. If it dies, it comes back with the emergency stop from its file and without the
sessions that nobody is connected to. Knows neither Ray nor policies.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dualvla.errors import SessionLostError
from dualvla_serve.estop import Latch, StopState

WATCH_S = 10.0  # how long after a request for its frame a session's frames are sent here
_GONE_S = 15.0  # a replica not heard of for this long is gone
_MOST_SESSIONS = 10_000


@dataclass(frozen=True)
class Report:
    """What a replica tells of itself, about once a second. sessions: a line each, JSON-ready. metrics: Prometheus text.
    frames: session -> (seq, reasoning, camera -> PNG) of those that were asked for."""

    listener: str | None = None
    sessions: Sequence[Mapping[str, Any]] = ()
    models: Sequence[Mapping[str, Any]] = ()
    metrics: str = ""
    frames: Mapping[str, tuple[int, str, Mapping[str, bytes]]] = field(default_factory=dict)


@dataclass(frozen=True)
class News:
    """What a replica must know. lost: claims (session, epoch) that another connection has taken over. closing: the
    endpoint ends; finish what there is. models: (which order this is, name -> source) of the models that were ordered
    last, None before any order."""

    stop: StopState
    lost: tuple[tuple[str, int], ...] = ()
    watched: tuple[str, ...] = ()
    closing: bool = False
    models: tuple[int, Mapping[str, str]] | None = None


@dataclass(frozen=True)
class Claim:
    """epoch: of the new claim. saved: the state to go on from, None to start clean."""

    epoch: int
    saved: bytes | None = None


@dataclass(frozen=True)
class Saved:
    """A state on its way to the hub."""

    session: str
    principal: str
    replica: str
    epoch: int
    seq: int
    state: bytes


class HubLink(Protocol):
    """How a replica reaches the hub, in this process or another. Every call may raise ServerError: it is not there."""

    async def exchange(self, replica: str, report: Report | None, version: int, wait_s: float) -> News: ...
    async def claim(self, session: str, principal: str, replica: str, resume: int | None) -> Claim: ...
    async def save(self, states: Sequence[Saved]) -> None: ...
    async def release(self, session: str, epoch: int, forget: bool) -> None: ...
    async def stop(self, reason: str, by: str) -> StopState: ...
    async def clear(self, reason: str, by: str) -> StopState: ...
    async def reports(self) -> dict[str, Report]: ...
    async def frame(self, session: str) -> tuple[int, str, Mapping[str, bytes]] | None: ...
    async def gone(self, replica: str) -> None: ...


ANY = -1  # resume from whatever was saved last (HTTP: every request is a claim of its own)


@dataclass
class _Known:
    principal: str
    epoch: int
    replica: str
    seq: int = 0
    state: bytes | None = None
    used: float = 0.0
    watched_until: float = 0.0


class Hub:
    """Implements `HubLink`. idle_s: how long the state of a session that nobody uses is kept."""

    def __init__(self, latch: Latch, idle_s: float, clock: Callable[[], float] = time.monotonic):
        self._latch = latch
        self._idle_s = idle_s
        self._clock = clock
        self._sessions: OrderedDict[str, _Known] = OrderedDict()
        self._reports: dict[str, tuple[float, Report]] = {}
        self._lost: dict[str, list[tuple[str, int]]] = {}
        self._frames: dict[str, tuple[int, str, Mapping[str, bytes]]] = {}
        self._changed = asyncio.Condition()
        self._closing = False
        self._models: tuple[int, Mapping[str, str]] | None = None
        self._epoch = int(time.time() * 1000)  # beyond every claim that a hub before this one gave out

    async def exchange(self, replica: str, report: Report | None, version: int, wait_s: float) -> News:
        """Takes the report and answers at once if there are news for this replica, else after wait_s."""
        now = self._clock()
        if report is not None:
            self._reports[replica] = (now, report)
            self._frames.update(report.frames)
        self._forget_the_old(now)

        def news() -> bool:
            return bool(self._lost.get(replica)) or self._latch.state.version != version or self._closing

        async with self._changed:
            if not news() and wait_s > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait_for(news), wait_s)
        watched = tuple(name for name, known in self._sessions.items() if known.watched_until > self._clock())
        return News(self._latch.state, tuple(self._lost.pop(replica, ())), watched, self._closing, self._models)

    async def claim(self, session: str, principal: str, replica: str, resume: int | None) -> Claim:
        """The session is this replica's from now on; whoever had it is told that it is lost.

        resume: the last answer (seq) that the client has; None to start clean. The saved state is given if it is that
        of this answer, or of the next one (which was then lost on its way and can be given again).
        Raises: SessionLostError if the session belongs to another key.
        """
        now = self._clock()
        self._forget_the_old(now)
        known = self._sessions.get(session)
        if known is not None and known.principal != principal:
            raise SessionLostError("This session belongs to another key.", "choose another name")
        self._epoch += 1
        saved = None
        if known is not None:
            await self._tell(known.replica, (session, known.epoch))
            if resume is not None and resume in (ANY, known.seq, known.seq - 1):
                saved = known.state
        seq = known.seq if known is not None and saved is not None else 0
        watched = known.watched_until if known is not None else 0.0
        self._sessions[session] = _Known(principal, self._epoch, replica, seq, saved, now, watched)
        self._sessions.move_to_end(session)
        while len(self._sessions) > _MOST_SESSIONS:
            self._sessions.popitem(last=False)
        return Claim(self._epoch, saved)

    async def save(self, states: Sequence[Saved]) -> None:
        """A state of a claim that is over is ignored. One that is not known here is of a claim that outlived a hub."""
        now = self._clock()
        for one in states:
            known = self._sessions.setdefault(one.session, _Known(one.principal, one.epoch, one.replica))
            if known.principal != one.principal or known.epoch != one.epoch or one.seq < known.seq:
                continue
            known.seq, known.state, known.used = one.seq, one.state, now
            self._sessions.move_to_end(one.session)

    async def release(self, session: str, epoch: int, forget: bool) -> None:
        known = self._sessions.get(session)
        if known is not None and known.epoch == epoch:
            known.replica = ""
            if forget:
                del self._sessions[session]
                self._frames.pop(session, None)

    async def stop(self, reason: str, by: str) -> StopState:
        try:
            return self._latch.stop(reason, by)
        finally:
            await self._notify()

    async def clear(self, reason: str, by: str) -> StopState:
        state = self._latch.clear(reason, by)
        await self._notify()
        return state

    async def reports(self) -> dict[str, Report]:
        self._forget_the_old(self._clock())
        return {replica: report for replica, (_, report) in self._reports.items()}

    async def frame(self, session: str) -> tuple[int, str, Mapping[str, bytes]] | None:
        """The last frame that was sent here, if any; from now on the session's replica sends them for a while."""
        known = self._sessions.get(session)
        if known is None:
            return None
        fresh = known.watched_until > self._clock()
        known.watched_until = self._clock() + WATCH_S
        await self._notify()
        return self._frames.get(session, (0, "", {})) if fresh else (0, "", {})

    async def gone(self, replica: str) -> None:
        """This replica has closed."""
        self._reports.pop(replica, None)
        self._lost.pop(replica, None)

    async def order(self, models: Mapping[str, str]) -> None:
        """Has all replicas look at these sources again, and load what is new. They hear of it with their next news."""
        number = 0 if self._models is None else self._models[0]
        self._models = (number + 1, dict(models))

    async def retire(self) -> None:
        """Tells all replicas that the endpoint ends."""
        self._closing = True
        await self._notify()

    async def _tell(self, replica: str, claim: tuple[str, int]) -> None:
        if replica:
            self._lost.setdefault(replica, []).append(claim)
            await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _forget_the_old(self, now: float) -> None:
        for replica in [r for r, (at, _) in self._reports.items() if now - at > _GONE_S]:
            del self._reports[replica]
            self._lost.pop(replica, None)
        while self._sessions:
            name, known = next(iter(self._sessions.items()))
            if now - known.used <= self._idle_s:
                break
            del self._sessions[name]
            self._frames.pop(name, None)
