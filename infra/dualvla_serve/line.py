"""One WebSocket between a robot and a replica: sends that cannot hang, and one close, whoever wants it first.

Knows no protocol: openpi_socket.py and vla_eval_socket.py talk over it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from dualvla.errors import SessionLostError
from dualvla.wire.messages import TAKEN_OVER

log = logging.getLogger("dualvla.serve")

EXPIRED, TRY_AGAIN, RESTARTING = 4002, 1013, 1012  # WebSocket close codes, beside TAKEN_OVER


class Line:
    """send_timeout_s: a client that does not read for that long is gone."""

    def __init__(self, websocket: WebSocket, send_timeout_s: float):
        self._websocket = websocket
        self._send_timeout_s = send_timeout_s
        self.open = True

    async def receive(self, idle_s: float) -> Mapping[str, Any]:
        """The next ASGI event. Raises: SessionLostError if none comes for `idle_s`."""
        try:
            async with asyncio.timeout(idle_s):
                return await self._websocket.receive()
        except TimeoutError:
            raise SessionLostError(f"The session was idle for more than {idle_s:g} s.") from None

    async def send(self, frame: bytes | str) -> None:
        """Raises: TimeoutError if the client does not read."""
        if self.open:
            async with asyncio.timeout(self._send_timeout_s):
                if isinstance(frame, bytes):
                    await self._websocket.send_bytes(frame)
                else:
                    await self._websocket.send_text(frame)

    async def close(self, code: int) -> None:
        if self.open and self._websocket.application_state is not WebSocketState.DISCONNECTED:
            self.open = False
            try:
                async with asyncio.timeout(1.0):
                    await self._websocket.close(code)
            except (TimeoutError, RuntimeError, WebSocketDisconnect):
                log.debug("the connection was gone before it was closed")

    async def evict(self, why: str) -> None:
        """Ends it for a session that goes on elsewhere, or a replica that goes."""
        await self.close(TAKEN_OVER if why == "taken over" else RESTARTING)
