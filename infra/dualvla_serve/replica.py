"""One serving process: sessions, safety and models around a request, and the link to what replicas share.

Protocols (openpi_socket.py, vla_eval_socket.py, app.py) turn bytes into a `Request` and an answer into bytes; this is
everything between. Plain asyncio; knows no web framework and no Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from dualvla.errors import DualVLAError, ServerError, UnsafeError
from dualvla.schema import Observation, PolicyReply
from dualvla.wire import images, messages
from dualvla.wire.messages import Request
from dualvla.wire.openpi import pack, unpack
from dualvla.wire.options import SessionOptions
from dualvla_serve import chunks, safety
from dualvla_serve.batching import Asked, NotFiniteError, PolicyRunner
from dualvla_serve.config import EndpointConfig
from dualvla_serve.courier import Courier
from dualvla_serve.estop import StopState, StopView
from dualvla_serve.failures import failure_of, kind_of
from dualvla_serve.hub import ANY, HubLink, News, Report
from dualvla_serve.limits import ConnectionCounter, RateLimiter
from dualvla_serve.metrics import Metrics
from dualvla_serve.models import Model, Models, ModelSource
from dualvla_serve.recording import Recorder, Step
from dualvla_serve.sessions import Session, load

log = logging.getLogger("dualvla.serve")

Evict = Callable[[str], Awaitable[None]]  # why -> closes the session's connection

REPORT_EVERY_S = 1.0
_WAIT_S = 0.4


@dataclass
class Live:
    """A session with a connection (or an HTTP request) at this replica, and what there is to show of it."""

    session: Session
    evict: Evict | None
    last_ms: float = 0.0
    instruction: str = ""
    reasoning: str = ""
    seen: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Arrival:
    """When a message came in (time.monotonic) and what taking it apart took. foreign: by another project's protocol,
    whose clients do not know the size of image that a policy was trained with."""

    at: float
    decode_ms: float = 0.0
    previous_ms: float | None = None
    foreign: bool = False


class Replica:
    def __init__(
        self,
        config: EndpointConfig,
        link: HubLink,
        name: str = "local",
        exchange: Callable[[Mapping[str, str]], Awaitable[None]] | None = None,
    ):
        """exchange: what to do when other models (name -> source) are ordered at the hub."""
        self._exchange = exchange
        self._order = 0
        self._exchanging: asyncio.Task[None] | None = None
        self.config, self.link, self.name = config, link, name
        self.listener: str | None = None
        self.metrics = Metrics()
        self.stop_view = StopView(config.max_silence_s)
        self.rate = RateLimiter(config.limits.requests_per_s, config.limits.burst)
        self.connections = ConnectionCounter(config.limits.connections, config.limits.connections_per_key)
        self.models = Models(self._new_runner, lambda model: self._begins(model))
        self.ready = False
        self._limits = safety.embodiment(config.embodiment)
        self._live: dict[str, Live] = {}
        self._courier = Courier(link, name)
        self._listening: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._watched: tuple[str, ...] = ()
        self._http_locks: dict[str, asyncio.Lock] = {}
        self._recorder: Recorder | None = None
        self._updating = asyncio.Lock()

    # -- life

    async def start(self, sources: Mapping[str, ModelSource]) -> None:
        """Loads and warms up. Raises: PolicyError if a model has no version that loads."""
        if self._listening is None:
            self._listening = asyncio.create_task(self._listen())
        await self.update(sources)
        if self.config.record is not None and self._recorder is None:
            self._recorder = Recorder(
                self.config.record, self.name, ",".join(self.models.names), self.metrics.recording_dropped.inc
            )
        self.ready = True

    async def update(self, sources: Mapping[str, ModelSource]) -> None:
        """Other models, or other versions of them, without a pause for anybody."""
        async with self._updating:
            await self.models.want(sources)

    async def close(self, why: str = "shutting down") -> None:
        """Lets every request finish, tells connected robots to go elsewhere, and writes down what there is."""
        self.ready = False
        for live in list(self._live.values()):
            async with live.session.lock:
                if live.evict is not None:
                    await live.evict(why)
        await self._courier.rest()
        if self._listening is not None:
            self._listening.cancel()
        if self._recorder is not None:
            await asyncio.to_thread(self._recorder.close)
            self._recorder = None
        with contextlib.suppress(ServerError):
            await self.link.gone(self.name)

    def _new_runner(self, load: Callable[[], Any]) -> PolicyRunner:
        return PolicyRunner(load, self.config.max_batch_size, self.config.limits.waiting, self.metrics)

    def _begins(self, model: Model) -> None:
        for known in self.models.all():
            self.metrics.model(known.name, known.version, known is model or known.name != model.name)
        self.metrics.model(model.name, model.version, True)
        self.metrics.estimated_batch.set(model.runner.estimated_s())

    @property
    def queue_length(self) -> int:
        return sum(model.runner.queue_length for model in self.models.all())

    # -- sessions

    async def open(
        self, name: str, principal: str, options: SessionOptions, protocol: str, resume: int | None, evict: Evict
    ) -> tuple[Session, bool]:
        """A connection's session, and whether it goes on from an earlier one.

        Raises: WireError for a model that is not there; SessionLostError if the name is another key's; ServerError.
        """
        model = self.models.get(options.model)
        claim = await self.link.claim(name, principal, self.name, resume if model.runner.portable else None)
        await self._lose(name)  # a ghost of this robot at this very replica
        saved = load(name, principal, claim.epoch, claim.saved) if claim.saved is not None else None
        session = saved or Session(name, principal, options, protocol, claim.epoch)
        session.options, session.protocol = options, protocol
        session.may_repeat = saved is not None and resume == session.seq - 1
        if saved is None:
            model.runner.forget(name)
        self._live[name] = Live(session, evict)
        self.metrics.sessions.set(len(self._live))
        return session, saved is not None

    async def leave(self, session: Session, forget: bool) -> None:
        """The connection is over. forget: for good; else the session can be resumed while its idle lifetime lasts."""
        live = self._live.get(session.name)
        if live is not None and live.session is session:
            del self._live[session.name]
            self.metrics.sessions.set(len(self._live))
            for model in self.models.all():
                model.runner.forget(session.name)
        self._end_recording(session)
        with contextlib.suppress(ServerError):  # the hub forgets by itself in the end
            await self._courier.rest()
            await self.link.release(session.name, session.epoch, forget)

    @contextlib.asynccontextmanager
    async def http_session(self, name: str | None, principal: str, options: SessionOptions) -> AsyncIterator[Session]:
        """The session of one HTTP request, wherever the one before it was answered; a nameless one lasts no longer."""
        if name is None:
            session = Session(uuid.uuid4().hex, principal, options, "http")
            yield session
            self._forget_inside(session)
            return
        lock = self._http_locks.setdefault(name, asyncio.Lock())
        async with lock:
            claim = await self.link.claim(name, principal, "", ANY)
            saved = load(name, principal, claim.epoch, claim.saved) if claim.saved is not None else None
            session = saved or Session(name, principal, options, "http", claim.epoch)
            session.options = options
            yield session
            await self._courier.now(session)
        if not lock.locked():
            self._http_locks.pop(name, None)

    async def forget(self, name: str, principal: str) -> None:
        """HTTP's reset. Raises: SessionLostError if the name is another key's."""
        claim = await self.link.claim(name, principal, "", None)
        await self.link.release(name, claim.epoch, forget=True)
        for model in self.models.all():
            model.runner.forget(name)

    def reset(self, session: Session) -> None:
        """The episode is over; the session goes on."""
        self._end_recording(session)
        session.reset()
        self._forget_inside(session)
        self._save_soon(session)

    def _forget_inside(self, session: Session) -> None:
        for model in self.models.all():
            model.runner.forget(session.name)

    async def _lose(self, name: str, epoch: int | None = None) -> None:
        live = self._live.get(name)
        if live is None or (epoch is not None and live.session.epoch != epoch):
            return
        del self._live[name]
        if live.evict is not None:
            await live.evict("taken over")

    # -- a request

    async def answer(self, session: Session, request: Request, arrival: Arrival) -> dict[str, Any]:
        """The reply of messages.py.

        Raises: DualVLAError; but a session that asked for holds gets one as its reply, with the fault in it.
        """
        async with session.lock:
            try:
                session.use(self.config.lifetimes)
                again = self._answered_already(session, request)
                if again is not None:
                    return again
                message = await self._infer(session, request, arrival)
            except DualVLAError as error:
                return self._fault(session, request, error)
        self.metrics.outcome(session.protocol, "ok")
        self._save_soon(session)
        await asyncio.sleep(0)  # the state is on its way before the answer is
        return message

    async def _infer(self, session: Session, request: Request, arrival: Arrival) -> dict[str, Any]:
        self.stop_view.check()
        options, model = session.options, self.models.get(session.options.model)
        if session.version != model.version:  # thoughts and plans of another checkpoint mean nothing to this one
            session.policy, session.chunks, session.queue, session.version = {}, [], None, model.version
        resize = options.resize or ("fit" if arrival.foreign else "refuse")
        observation = _fitted(request.observation, model) if resize == "fit" else request.observation
        session.watch = safety.check_observation(observation, request.age_ms, self._limits, session.watch)
        asked = Asked(
            observation, session.name, session.policy, options.reasoning, self._deadline(request, options, arrival)
        )
        answered = await model.runner.infer(asked)
        self.stop_view.check()
        checking = time.perf_counter()
        spec = model.runner.spec
        actions = np.asarray(answered.reply.actions, np.float32)
        if options.ensemble_rate is not None:
            blended = chunks.ensemble(
                session.chunks, observation.step, actions, options.ensemble_rate, spec.action_space
            )
            session.chunks = chunks.remember(session.chunks, observation.step, actions)
            actions = blended
        checked = safety.check_actions(actions, spec, self._limits, session.last_action, observation.ee_pose)
        self._count(session, checked.interventions, observation.id)
        safety_ms = _ms_since(checking)
        self._record(session, observation, answered.reply, checked.actions, model)
        session.policy = answered.state
        session.last_action = checked.actions[min(spec.execute_steps, len(checked.actions)) - 1].copy()
        session.seq += 1
        session.last_id = observation.id
        told = chunks.to_convention(checked.actions, options.gripper, spec.action_space)
        total_ms = (time.monotonic() - arrival.at) * 1000
        timing = {
            "decode_ms": arrival.decode_ms,
            "queue_ms": answered.queue_ms,
            "infer_ms": answered.infer_ms,
            "safety_ms": safety_ms,
            "total_ms": total_ms,
        }
        for stage, took in timing.items():
            self.metrics.stage(stage.removesuffix("_ms"), took)
        if arrival.previous_ms is not None:
            timing["prev_total_ms"] = arrival.previous_ms
        message = self._message(
            session, replace(answered.reply, actions=told), timing, model, list(checked.interventions)
        )
        session.last_reply = pack(message) if observation.id else b""
        self._show(session, observation, answered.reply, total_ms)
        return message

    def _deadline(self, request: Request, options: SessionOptions, arrival: Arrival) -> float | None:
        for given in (request.deadline_ms, options.deadline_ms, self.config.deadline_ms):
            if given is not None:
                return arrival.at + given / 1000
        return None

    def _message(
        self, session: Session, reply: PolicyReply, timing: Mapping[str, float], model: Model, made: list[str]
    ) -> dict[str, Any]:
        named = {"name": model.name, "version": model.version}
        return messages.reply_to_wire(
            reply, timing, session=session.name, seq=session.seq, model=named, interventions=made
        )

    def _answered_already(self, session: Session, request: Request) -> dict[str, Any] | None:
        """After a resume only: the answer that was lost on its way, if this is the observation it answered."""
        may_repeat, session.may_repeat = session.may_repeat, False
        asked = request.observation.id
        if not may_repeat or not asked or asked != session.last_id or not session.last_reply:
            return None
        self.stop_view.check()
        return unpack(session.last_reply)

    def _fault(self, session: Session, request: Request, error: DualVLAError) -> dict[str, Any]:
        """A hold with the fault in it, if that was asked for and is known. Raises: the error itself, otherwise."""
        kind = kind_of(error)
        self.metrics.outcome(session.protocol, kind)
        if isinstance(error, safety.FrozenError):
            session.watch = error.watch
        if isinstance(error, UnsafeError | NotFiniteError) or kind == "stopped":
            self._count(session, (_fault_name(error, kind),), request.observation.id)
        session.queue = None
        if session.options.on_fault != "hold" or kind == "expired":
            raise error
        model = self.models.get(session.options.model)
        spec = model.runner.spec
        still = safety.hold(spec, self._limits, session.last_action, request.observation)
        if still is None:
            raise error
        session.last_action = still[0].copy()
        failure = failure_of(error, f"session {session.name}", request.observation.id)
        self._count(session, ("hold",), request.observation.id)
        told = chunks.to_convention(still, session.options.gripper, spec.action_space)
        reply = PolicyReply(told, id=request.observation.id)
        return {**self._message(session, reply, {}, model, ["hold"]), "fault": asdict(failure)}

    def _count(self, session: Session, made: tuple[str, ...], observation_id: str) -> None:
        for kind in made:
            session.interventions += 1
            self.metrics.intervention(kind)
            details = {"session": session.name, "observation": observation_id, "intervention": kind, "seq": session.seq}
            log.warning("intervention %s in session %s", kind, session.name, extra=details)

    # -- what others see

    def listing(self) -> list[dict[str, Any]]:
        """A line of JSON-ready values for each live session."""
        now = time.monotonic()
        return [
            {
                "id": name,
                "replica": self.name,
                "model": live.session.options.model or next(iter(self.models.names), ""),
                "protocol": live.session.protocol,
                "connected": True,
                "seq": live.session.seq,
                "age_s": now - live.session.created,
                "idle_s": now - live.session.used,
                "interventions": live.session.interventions,
                "last_ms": live.last_ms,
                "instruction": live.instruction,
                "reasoning": live.reasoning,
                "options": asdict(live.session.options),
            }
            for name, live in self._live.items()
        ]

    def model_lines(self) -> list[dict[str, Any]]:
        return [
            {"name": m.name, "version": m.version, "source": m.source, "state": m.state, "message": m.message}
            for m in self.models.all()
        ]

    async def reports(self) -> dict[str, Report]:
        """Of all replicas; this one's own is as of now."""
        return {**await self.link.reports(), self.name: self._report({})}

    async def stop(self, reason: str, by: str) -> StopState:
        """Raises: ServerError if the hub does not answer; this replica stops all the same."""
        try:
            return self._confirmed(await self.link.stop(reason, by))
        except ServerError:
            self.stop_view.stop_alone(reason, by)
            raise

    async def clear(self, reason: str, by: str) -> StopState:
        return self._confirmed(await self.link.clear(reason, by))

    def _confirmed(self, state: StopState) -> StopState:
        self.stop_view.confirm(state)
        return state

    def _show(self, session: Session, observation: Observation, reply: PolicyReply, total_ms: float) -> None:
        live = self._live.get(session.name)
        if live is None:
            return
        live.last_ms, live.instruction, live.reasoning = total_ms, observation.instruction, reply.reasoning or ""
        live.seen = observation.images if session.name in self._watched else {}

    def _report(self, frames: Mapping[str, tuple[int, str, Mapping[str, bytes]]]) -> Report:
        self.metrics.waiting(self.queue_length)
        self.metrics.connections.set(self.connections.total)
        self.metrics.emergency_stop.set(1 if self.stop_view.stopped() else 0)
        if self.models.all():
            self.metrics.estimated_batch.set(self.models.get("").runner.estimated_s())
        return Report(self.listener, self.listing(), self.model_lines(), self.metrics.page(), frames)

    # -- the hub

    async def _listen(self) -> None:
        """Reports, and takes the news: for as long as the replica lives."""
        reported = -REPORT_EVERY_S
        while True:
            now = time.monotonic()
            report = None
            if now - reported >= REPORT_EVERY_S or self._watched:
                reported = now
                report = self._report(await self._frames())
            try:
                news = await self.link.exchange(self.name, report, self.stop_view.version, _WAIT_S)
            except ServerError as error:
                log.error("the hub does not answer: %s", error)
                await asyncio.sleep(0.2)
                continue
            if news.closing:
                self._closing = asyncio.create_task(self.close("the endpoint ends"))
                return
            self.stop_view.confirm(news.stop)
            self._watched = news.watched
            self._follow(news)
            for name, epoch in news.lost:
                await self._lose(name, epoch)

    def _follow(self, news: News) -> None:
        """Loading takes long, and must not keep the replica from hearing of a stop."""
        if news.models is None or self._exchange is None or not self.ready or news.models[0] == self._order:
            return
        self._order, models = news.models
        self._exchanging = asyncio.ensure_future(self._exchange(models))

    async def _frames(self) -> dict[str, tuple[int, str, Mapping[str, bytes]]]:
        out: dict[str, tuple[int, str, Mapping[str, bytes]]] = {}
        for name in self._watched:
            live = self._live.get(name)
            if live is not None and live.seen:
                pictures = await asyncio.to_thread(_as_png, live.seen)
                out[name] = (live.session.seq, live.reasoning, pictures)
        return out

    def _save_soon(self, session: Session) -> None:
        live = self._live.get(session.name)
        if live is not None and live.session is session:
            self._courier.soon(session)

    # -- recording

    def _record(
        self, session: Session, observation: Observation, reply: PolicyReply, actions: np.ndarray, model: Model
    ) -> None:
        if self._recorder is None:
            return
        at_s = time.monotonic() - session.created
        self._recorder.add(
            Step(
                _episode(session),
                observation,
                model.runner.spec,
                actions[0],
                reply.reasoning,
                session.last_action,
                at_s,
            )
        )

    def _end_recording(self, session: Session) -> None:
        if self._recorder is not None:
            self._recorder.end(_episode(session))


def _fitted(observation: Observation, model: Model) -> Observation:
    example = model.runner.example.images
    fitted = {
        name: images.fit(image, *example[name].shape[:2]) if name in example else image
        for name, image in observation.images.items()
    }
    return replace(observation, images=fitted)


def _episode(session: Session) -> str:
    return f"served/{session.name}/{session.epoch}-{session.episode}"


def _fault_name(error: DualVLAError, kind: str) -> str:
    if isinstance(error, safety.FrozenError):
        return "frozen"
    if isinstance(error, UnsafeError):
        return "stale"
    return "not_finite" if isinstance(error, NotFiniteError) else kind


def _as_png(seen: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    from PIL import Image

    out = {}
    for camera, image in seen.items():
        sink = io.BytesIO()
        Image.fromarray(image).save(sink, "PNG", compress_level=1)
        out[camera] = sink.getvalue()
    return out


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000
