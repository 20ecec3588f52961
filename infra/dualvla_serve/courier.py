"""Takes the states of sessions to the hub behind the answers: soon, in order, many at a time, never waited for."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict

from dualvla.errors import ServerError
from dualvla_serve.hub import HubLink, Saved
from dualvla_serve.sessions import Session, dump

log = logging.getLogger("dualvla.serve")

_MOST_AT_ONCE = 64


class Courier:
    """Of one replica. A session that changes again before it has left travels once, as it is then."""

    def __init__(self, link: HubLink, replica: str):
        self._link, self._replica = link, replica
        self._waiting: OrderedDict[str, Session] = OrderedDict()
        self._way: asyncio.Task[None] | None = None

    def soon(self, session: Session) -> None:
        """On its way with the event loop's next turn, unless others are; then right after them."""
        self._waiting[session.name] = session
        if self._way is None or self._way.done():
            self._way = asyncio.create_task(self._carry())

    async def now(self, session: Session) -> None:
        """Returns once the hub has it. Raises: ServerError."""
        await self._link.save([self._saved(session)])

    async def rest(self) -> None:
        """Returns once nothing is left to carry."""
        if self._way is not None and not self._way.done():
            await asyncio.wait([self._way])
        await self._carry()

    async def _carry(self) -> None:
        while self._waiting:
            number = min(_MOST_AT_ONCE, len(self._waiting))
            batch = [self._waiting.popitem(last=False)[1] for _ in range(number)]
            try:
                await self._link.save([self._saved(session) for session in batch])
            except ServerError as error:
                log.error("%d sessions could not be saved: %s", len(batch), error)
                return

    def _saved(self, session: Session) -> Saved:
        return Saved(session.name, session.principal, self._replica, session.epoch, session.seq, dump(session))
