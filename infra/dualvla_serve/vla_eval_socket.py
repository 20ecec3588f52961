"""The WebSocket protocol of the vla-eval harness (dualvla.wire.vla_eval): the client greets, and gets one action at a
time of the chunks that the policy gives. A connection is a session, EPISODE_START begins it anew.

Its client cannot set headers: a key goes into its URL, ws://any:KEY@HOST:PORT/vla-eval. Knows one replica.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import Any

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from dualvla.errors import DualVLAError, SessionLostError, WireError
from dualvla.wire import messages, vla_eval
from dualvla.wire.options import SESSION, options_from_query
from dualvla.wire.vla_eval import Frame
from dualvla_serve.failures import failure_of
from dualvla_serve.gate import identity_of
from dualvla_serve.line import EXPIRED, TRY_AGAIN, Line
from dualvla_serve.replica import Arrival, Replica
from dualvla_serve.sessions import Session

log = logging.getLogger("dualvla.serve")

PROTOCOL = "vla-eval"


class VlaEvalSocket:
    """One connection, from upgrade to end."""

    def __init__(self, replica: Replica, websocket: WebSocket):
        self._replica = replica
        self._websocket = websocket
        self._line = Line(websocket, replica.config.send_timeout_s)

    async def serve(self) -> None:
        await self._websocket.accept()
        principal = identity_of(self._websocket.scope).id
        try:
            with self._replica.connections.one(principal):
                await self._serve(principal)
        except DualVLAError as error:
            await self._tell(error, 0)
            await self._line.close(EXPIRED if isinstance(error, SessionLostError) else TRY_AGAIN)
        except (WebSocketDisconnect, TimeoutError):
            log.debug("a vla-eval client left, or did not read")
            await self._line.close(TRY_AGAIN)

    async def _serve(self, principal: str) -> None:
        query = dict(self._websocket.query_params)
        name = messages.session_name(query.get(SESSION) or uuid.uuid4().hex)
        options = options_from_query(query, self._replica.config.session)
        session, _ = await self._replica.open(name, principal, options, PROTOCOL, None, self._line.evict)
        try:
            await self._converse(session)
        finally:
            await self._replica.leave(session, forget=True)

    async def _converse(self, session: Session) -> None:
        while self._line.open:
            event = await self._line.receive(self._replica.config.lifetimes.idle_s)
            if event["type"] == "websocket.disconnect":
                return
            arrived = time.monotonic()
            seq = 0
            try:
                self._replica.rate.admit(session.principal)
                data = event.get("bytes")
                if data is None:
                    raise WireError("Text is refused.", "send binary msgpack frames")
                frame = await asyncio.to_thread(vla_eval.unpack, data, self._replica.config.wire)  # it decodes PNG
                seq = frame.seq
                await self._handle(frame, session, arrived)
            except SessionLostError:
                raise
            except DualVLAError as error:
                await self._tell(error, seq)

    async def _handle(self, frame: Frame, session: Session, arrived: float) -> None:
        model = self._replica.models.get(session.options.model)
        if frame.type == vla_eval.HELLO:
            await self._line.send(
                vla_eval.pack(vla_eval.HELLO, vla_eval.hello(model.runner.spec, model.name), frame.seq)
            )
        elif frame.type == vla_eval.EPISODE_START:
            self._replica.reset(session)
        elif frame.type == vla_eval.OBSERVATION:
            action = await self._act(frame, session, arrived)
            await self._line.send(vla_eval.pack(vla_eval.ACTION, action, frame.seq))
        elif frame.type == vla_eval.ERROR:
            log.info("a vla-eval client told of an error of its own in session %s", session.name)

    async def _act(self, frame: Frame, session: Session, arrived: float) -> dict[str, Any]:
        """The next action of the last chunk, or the first of a new one."""
        replica = self._replica
        spec = replica.models.get(session.options.model).runner.spec
        if session.queue is not None and len(session.queue):
            replica.stop_view.check()
            action, session.queue = session.queue[0], session.queue[1:]
            session.steps += 1
            return {"actions": action}
        own = vla_eval.observation_from_payload(frame.payload, spec.cameras, session.steps)
        request = messages.request_from_wire(own)
        arrival = Arrival(arrived, (time.monotonic() - arrived) * 1000, foreign=True)
        reply = await replica.answer(session, request, arrival)
        chunk = np.asarray(reply["actions"], np.float32)
        told: dict[str, Any] = {
            name: reply[name] for name in ("reasoning", "keyframe", "interventions", "fault") if name in reply
        }
        session.queue = None if "fault" in reply else chunk[1 : spec.execute_steps]
        session.steps += 1
        return told | {"actions": chunk[0]}

    async def _tell(self, error: DualVLAError, seq: int) -> None:
        failure = failure_of(error, "vla-eval")
        payload = {"error": f"{failure.kind}: {failure.message} (error {failure.id})"}
        await self._line.send(vla_eval.pack(vla_eval.ERROR, payload, seq))
