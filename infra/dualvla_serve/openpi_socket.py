"""The WebSocket protocol of openpi and its superset, ours (dualvla.wire.messages): a connection is a session.

The server greets, then answers observation after observation. Knows one replica and Starlette's WebSocket.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from dualvla.errors import DualVLAError, SessionLostError, WireError
from dualvla.wire import images, mapping, messages
from dualvla.wire.openpi import pack, unpack
from dualvla.wire.options import SESSION, options_from_query, resume_from_query
from dualvla_serve.failures import failure_of
from dualvla_serve.gate import identity_of
from dualvla_serve.line import EXPIRED, TRY_AGAIN, Line
from dualvla_serve.replica import Arrival, Replica
from dualvla_serve.sessions import Session

log = logging.getLogger("dualvla.serve")

_ENDED_ON_PURPOSE = (1000, 1001)
PROTOCOL = "openpi"


class OpenpiSocket:
    """One connection, from upgrade to end."""

    def __init__(self, replica: Replica, websocket: WebSocket):
        self._replica = replica
        self._websocket = websocket
        self._line = Line(websocket, replica.config.send_timeout_s)
        self._previous_ms: float | None = None

    async def serve(self) -> None:
        await self._websocket.accept()
        principal = identity_of(self._websocket.scope).id
        try:
            with self._replica.connections.one(principal):
                await self._serve(principal)
        except DualVLAError as error:
            await self._tell(error, "greeting")
            await self._line.close(TRY_AGAIN)
        except (WebSocketDisconnect, TimeoutError):
            log.debug("a client left in the middle of a message, or did not read")
            await self._line.close(TRY_AGAIN)

    async def _serve(self, principal: str) -> None:
        query = dict(self._websocket.query_params)
        named = self._websocket.headers.get(messages.SESSION_HEADER) or query.get(SESSION)
        name = messages.session_name(named or uuid.uuid4().hex)
        options = options_from_query(query, self._replica.config.session)
        session, resumed = await self._replica.open(
            name, principal, options, PROTOCOL, resume_from_query(query), self._line.evict
        )
        forget = False
        try:
            await self._line.send(pack(self._greeting(session, resumed)))
            forget = await self._converse(session)
        except SessionLostError as error:
            forget = True
            await self._tell(error, "session")
            await self._line.close(EXPIRED)
        finally:
            await self._replica.leave(session, forget)

    def _greeting(self, session: Session, resumed: bool) -> dict[str, Any]:
        replica = self._replica
        model = replica.models.get(session.options.model)
        return messages.metadata(
            model.runner.spec,
            session={"id": session.name, "seq": session.seq, "resumed": resumed},
            model={"name": model.name, "version": model.version},
            models=replica.models.names,
            listener=replica.listener,
            limits={"max_message_bytes": replica.config.wire.max_message_bytes},
        )

    async def _converse(self, session: Session) -> bool:
        """Whether the client ended it on purpose."""
        idle_s = self._replica.config.lifetimes.idle_s
        while self._line.open:
            event = await self._line.receive(idle_s)
            if event["type"] == "websocket.disconnect":
                return event.get("code") in _ENDED_ON_PURPOSE
            started = time.monotonic()
            try:
                frame = await self._answer(event.get("bytes"), session, started)
            except SessionLostError:
                raise
            except DualVLAError as error:
                await self._tell(error, f"session {session.name}")
            else:
                await self._line.send(frame)
            self._previous_ms = (time.monotonic() - started) * 1000
        return False

    async def _answer(self, frame: bytes | None, session: Session, started: float) -> bytes:
        replica = self._replica
        replica.rate.admit(session.principal)
        if frame is None:
            raise WireError("Text is refused.", "send one binary msgpack message per observation")
        message = unpack(frame, replica.config.wire)
        if messages.is_reset(message):
            replica.reset(session)
            return pack(dict(messages.RESET))
        cameras = replica.models.get(session.options.model).runner.spec.cameras
        own, keys = mapping.translate(message, session.options.keys, cameras, replica.config.observation_keys)
        foreign = keys != mapping.OWN
        if foreign:
            own.setdefault("step", session.steps)
        if any(images.is_encoded(value) for value in own.values()):
            request = await asyncio.to_thread(messages.request_from_wire, own)  # takes milliseconds
        else:
            request = messages.request_from_wire(own)
        decode_ms = (time.monotonic() - started) * 1000
        reply = await replica.answer(session, request, Arrival(started, decode_ms, self._previous_ms, foreign))
        session.steps += replica.models.get(session.options.model).runner.spec.execute_steps
        return pack(reply)

    async def _tell(self, error: DualVLAError, where: str) -> None:
        await self._line.send(failure_of(error, where).to_json())
