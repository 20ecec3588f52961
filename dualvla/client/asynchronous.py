"""A policy endpoint from asyncio: one session, opened at first use and again whenever its connection drops.

The words are in dialogue.py; this file sends and receives them, in time and in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from dualvla.client.dialogue import Dialogue, Greeting, Reply
from dualvla.client.options import ClientOptions
from dualvla.errors import LateError, ServerError, SessionLostError, UsageError
from dualvla.schema import Observation, PolicySpec
from dualvla.wire import messages
from dualvla.wire.openpi import pack

log = logging.getLogger("dualvla.client")

_RESET_FRAME = pack(dict(messages.RESET))


class AsyncPolicyClient:
    """One robot's connection to a policy; use it from one event loop. Calls that overlap take turns.

    url: ws://, wss://, http:// or https://. key: sent as `Authorization: Bearer`, never in the URL (default: the
    environment's DUALVLA_API_KEY, if any). session: names the policy's state of this robot, and keys its randomness:
    the same name and observations get the same actions (default: a fresh name). After a dropped connection the session
    goes on where it was, if the server still has it. tls: for wss://, where the system's certificates do not do.

    Raises, from every call: ServerError if the endpoint cannot be reached, refuses the key, fails, or does not answer
    in time; WireError if it refuses the message. After either, the client can be used again.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        session: str | None = None,
        options: ClientOptions = ClientOptions(),
        tls: ssl.SSLContext | None = None,
    ):
        self._dialogue = Dialogue(url, key, session, options)
        self._options = options
        self._tls = tls
        self._lock = asyncio.Lock()
        self._connection: ClientConnection | None = None
        self._greeting: Greeting | None = None
        self._named = {messages.SESSION_HEADER: self._dialogue.session}
        self._answers = 0  # the number of the last answer that came, as the server counts them
        self._sent_at: deque[float] = deque()  # of every message whose answer has not come yet, oldest first

    @property
    def session(self) -> str:
        return self._dialogue.session

    async def spec(self) -> PolicySpec:
        """What the endpoint's policy expects and answers."""
        if self._greeting is None:
            async with self._lock:
                await self._retrying(None)
        assert self._greeting is not None
        return self._greeting.spec

    async def infer(
        self, observation: Observation, *, deadline_s: float | None = None, age_s: float | None = None
    ) -> Reply:
        """One observation, one reply, whose id is checked: a late answer to an earlier one is never taken for this.

        deadline_s: an answer is of no use after this long, everything included. The server is told, and refuses at once
        what it cannot answer in time. Raises then: LateError, and the connection stays. age_s: how old the images are;
        the server refuses what is too old to act on.
        """
        frame, expected = self._dialogue.request(observation, deadline_s, age_s)
        started = time.perf_counter()
        answer = await self._ask(frame, deadline_s)
        round_trip_ms = (time.perf_counter() - started) * 1000
        reply = self._dialogue.reply(answer, expected, observation, round_trip_ms)
        self._answers = reply["seq"]
        return reply

    async def reset(self) -> None:
        """The policy forgets this session's past, as at the start of an episode."""
        self._dialogue.confirmation(await self._ask(_RESET_FRAME, None))

    async def close(self) -> None:
        """Ends the session: the server forgets it. The client can be used again, with a session that starts anew."""
        async with self._lock:
            connection, self._connection, self._greeting = self._connection, None, None
            if connection is not None:
                await connection.close()

    async def __aenter__(self) -> AsyncPolicyClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask(self, frame: bytes, deadline_s: float | None) -> bytes | str:
        try:
            async with asyncio.timeout(deadline_s), self._lock:
                answer = await self._retrying(frame)
        except TimeoutError as error:
            raise LateError(f"No answer from {self._dialogue.url} within {deadline_s:g} s.") from error
        assert answer is not None
        return answer

    async def _retrying(self, frame: bytes | None) -> bytes | str | None:
        """Sends on an open connection and returns the answer; opens it again when it drops. Held under the lock."""
        lost: Exception | None = None
        for attempt in range(self._options.attempts):
            if lost is not None:
                log.warning("connection to %s lost: %s", self._dialogue.url, lost)
                await asyncio.sleep(self._options.pause_s(attempt - 1))
            try:
                connection = await self._connected()
            except (ConnectionClosed, InvalidHandshake, OSError) as error:  # a time-out is an OSError, too
                lost = error
                continue
            try:
                return None if frame is None else await self._exchange(connection, frame)
            except (ConnectionClosed, OSError) as error:
                await self._drop()
                lost = error
                if isinstance(error, ConnectionClosed) and error.rcvd and error.rcvd.code == messages.TAKEN_OVER:
                    raise SessionLostError(
                        f"Another connection took session '{self.session}' over.", "give every robot its own session"
                    ) from error
                if isinstance(error, TimeoutError):
                    raise ServerError(
                        f"No answer from {self._dialogue.url} in {self._options.reply_timeout_s:g} s."
                    ) from error
        raise ServerError(
            f"No connection to {self._dialogue.url} after {self._options.attempts} attempts: {lost}.",
            "start it with `dualvla serve CHECKPOINT`, and check host and port",
        ) from lost

    async def _exchange(self, connection: ClientConnection, frame: bytes) -> bytes | str:
        """Answers come in the order of the messages: first those that nobody waits for any more, which are let go."""
        self._sent_at.append(time.monotonic())
        async with asyncio.timeout(self._options.reply_timeout_s):
            await connection.send(frame)
            while True:
                answer = await connection.recv()
                self._sent_at.popleft()
                if not self._sent_at:
                    return answer

    async def _connected(self) -> ClientConnection:
        if self._sent_at and time.monotonic() - self._sent_at[0] > self._options.reply_timeout_s:
            await self._drop()  # silent since a call that was given up: half open, most likely
        if self._connection is None:
            resume_after = self._answers if self._greeting is not None else None
            connection, greeting = await self._open_session(resume_after)
            if not greeting.resumed:
                self._answers = 0
                if resume_after:
                    log.warning("session %s was lost with its connection: it begins anew", self.session)
            self._connection, self._greeting = connection, greeting
        return self._connection

    async def _open_session(self, resume_after: int | None) -> tuple[ClientConnection, Greeting]:
        if self._options.direct:
            probe, found = await self._greeted(self._dialogue.url, {})
            await probe.close()
            if found.listener is not None:
                try:
                    return await self._greeted(self._dialogue.address(found.listener, resume_after), self._named)
                except (ConnectionClosed, InvalidHandshake, OSError) as error:
                    log.warning("no direct connection to %s (%s): going through the proxy", found.listener, error)
        return await self._greeted(self._dialogue.address(self._dialogue.url, resume_after), self._named)

    async def _greeted(self, url: str, headers: Mapping[str, str]) -> tuple[ClientConnection, Greeting]:
        """A new connection, and what the server said first."""
        try:
            connection = await connect(
                url,
                additional_headers={**self._dialogue.headers, **headers},
                open_timeout=self._options.connect_timeout_s,
                max_size=self._dialogue.limits.max_message_bytes,
                compression=None,  # images are the bulk, and deflate costs more time than it saves on a LAN
                close_timeout=1.0,
                ssl=self._tls,
            )
        except InvalidStatus as error:
            if error.response.status_code >= 500:  # not ready yet
                raise
            raise self._dialogue.refusal(error.response.status_code) from error
        except InvalidURI as error:
            raise UsageError(f"{url} is no WebSocket address: {error}.", "check the URL") from error
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(connection.close)
            async with asyncio.timeout(self._options.connect_timeout_s):
                greeting = self._dialogue.greeting(await connection.recv())
            undo.pop_all()
        return connection, greeting

    async def _drop(self) -> None:
        """Away with the connection, at once and without the closing handshake: the session is to be resumed."""
        connection, self._connection = self._connection, None
        self._sent_at.clear()
        if connection is not None:
            connection.transport.abort()
