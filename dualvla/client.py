"""The robot's side of a served policy: ask it, get actions back. Knows numpy, msgpack, websockets; no torch, no Ray.

    with PolicyClient("ws://127.0.0.1:8000", key="...") as client:
        reply = client.infer(Observation(images={"main": image}, instruction="pick up the red cube", step=0, id="0"))
        robot.execute(reply["actions"])

One client is one session: the policy behind it remembers what this robot saw until `reset` or `close`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

from dualvla.errors import ServerError, UsageError, WireError
from dualvla.schema import Observation, PolicyReply, PolicySpec
from dualvla.wire import messages
from dualvla.wire.openpi import WireLimits, pack, unpack

log = logging.getLogger(__name__)

T = TypeVar("T")

KEY_VARIABLE = "DUALVLA_API_KEY"
_SCHEMES = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}
_REFUSED = (401, 403)
_MOST_PARALLEL = 32


@dataclass(frozen=True)
class ClientOptions:
    """How long to wait and how often to try again. A dropped connection is opened `attempts` times in all, with pauses
    of first_pause_s, doubled each time up to longest_pause_s."""

    connect_timeout_s: float = 10.0
    reply_timeout_s: float = 30.0
    attempts: int = 5
    first_pause_s: float = 0.1
    longest_pause_s: float = 2.0

    def pause_s(self, attempt: int) -> float:
        return min(self.longest_pause_s, self.first_pause_s * 2**attempt)


class PolicyClient:
    """A synchronous connection to one policy endpoint, opened at first use and again whenever it drops.

    url: ws://, wss://, http:// or https://. key: sent as `Authorization: Bearer`, never in the URL (default: the
    environment's DUALVLA_API_KEY, if any). session: names the policy's state of this robot, and keys its randomness:
    the same name and observations get the same actions (default: a fresh name). Calls from several threads take turns.

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
    ):
        self._url = _websocket_url(url)
        key = key or os.environ.get(KEY_VARIABLE)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        if session is not None:
            self._headers[messages.SESSION_HEADER] = messages.session_name(session)
        self._options = options
        self._limits = WireLimits()
        self._lock = threading.Lock()
        self._open = contextlib.ExitStack()
        self._connection: ClientConnection | None = None
        self._spec: PolicySpec | None = None

    @property
    def spec(self) -> PolicySpec:
        """What the endpoint's policy expects and answers."""
        with self._lock:
            if self._spec is None:
                self._retrying(lambda: None)
            assert self._spec is not None
            return self._spec

    def infer(self, observation: Observation) -> dict[str, Any]:
        """One observation, one reply: {"actions": float32 [H, D], "reasoning", "keyframe", "reasoning_tokens", "id",
        "server_timing" and "policy_timing" in ms, "round_trip_ms"}.

        The reply's id is checked: a late answer to an earlier observation is never taken for this one's. After a
        dropped connection the observation is sent again, to a session that starts anew.
        """
        message = messages.observation_to_wire(observation)
        message["id"] = observation.id or uuid.uuid4().hex
        started = time.perf_counter()
        reply = self._ask(message)
        if reply.get("id") != message["id"]:
            self.close()
            raise ServerError(f"The endpoint answered observation {reply.get('id')!r}, not {message['id']!r}.")
        return {**reply, "id": observation.id, "round_trip_ms": (time.perf_counter() - started) * 1000}

    def reset(self) -> None:
        """The policy forgets this session's past, as at the start of an episode."""
        self._ask(dict(messages.RESET))

    def close(self) -> None:
        with self._lock:
            self._drop()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        frame = pack(message)
        with self._lock:
            answer = self._retrying(lambda: self._exchange(frame))
        if isinstance(answer, str):
            raise messages.error_from_text(answer)
        reply = unpack(answer, self._limits)
        if not isinstance(reply, dict):
            raise WireError(f"The endpoint answered with {type(reply).__name__}, not a map.")
        return reply

    def _exchange(self, frame: bytes) -> bytes | str:
        assert self._connection is not None
        self._connection.send(frame)
        return self._connection.recv(timeout=self._options.reply_timeout_s)

    def _retrying(self, action: Callable[[], T]) -> T:
        """Runs `action` on an open connection; opens it again when it is refused or drops. Held under the lock."""
        lost: Exception | None = None
        for attempt in range(self._options.attempts):
            if lost is not None:
                log.warning("connection to %s lost: %s", self._url, lost)
                time.sleep(self._options.pause_s(attempt - 1))
            try:
                if self._connection is None:
                    self._connect()
            except (ConnectionClosed, InvalidHandshake, OSError) as error:  # a time-out is an OSError, too
                self._drop()
                lost = error
                continue
            try:
                return action()
            except TimeoutError as error:
                self._drop()  # a late reply must find nobody
                raise ServerError(f"No answer from {self._url} in {self._options.reply_timeout_s:g} s.") from error
            except (ConnectionClosed, OSError) as error:
                self._drop()
                lost = error
        raise ServerError(
            f"No connection to {self._url} after {self._options.attempts} attempts: {lost}.",
            "start it with `dualvla serve CHECKPOINT`, and check host and port",
        ) from lost

    def _connect(self) -> None:
        try:
            connection = self._open.enter_context(
                connect(
                    self._url,
                    additional_headers=self._headers,
                    open_timeout=self._options.connect_timeout_s,
                    max_size=self._limits.max_message_bytes,
                    compression=None,  # images are the bulk, and deflate costs more time than it saves on a LAN
                )
            )
        except InvalidStatus as error:
            if error.response.status_code >= 500:  # not ready yet
                raise
            raise _refusal(self._url, error.response.status_code) from error
        except InvalidURI as error:
            raise UsageError(f"{self._url} is no WebSocket address: {error}.", "check the URL") from error
        greeting = connection.recv(timeout=self._options.connect_timeout_s)
        if isinstance(greeting, str):
            self._drop()
            raise messages.error_from_text(greeting)
        self._connection, self._spec = connection, messages.spec_from_metadata(unpack(greeting, self._limits))

    def _drop(self) -> None:
        self._connection = None
        self._open.close()


class RemotePolicy:
    """A served policy as a local `Policy`: each session has a connection of its own, batches go out together."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        options: ClientOptions = ClientOptions(),
    ):
        self._url, self._key, self._options = url, key, options
        self._clients: dict[str, PolicyClient] = {}
        self._threads = ThreadPoolExecutor(_MOST_PARALLEL, thread_name_prefix="remote-policy")
        with PolicyClient(url, key, options=options) as client:
            self.spec = client.spec

    def infer(self, observations: Sequence[Observation], sessions: Sequence[str]) -> list[PolicyReply]:
        by_session: dict[str, list[int]] = {}
        for index, session in enumerate(sessions):
            by_session.setdefault(session, []).append(index)

        def ask(session: str) -> list[dict[str, Any]]:
            return [self._client(session).infer(observations[i]) for i in by_session[session]]

        for session in by_session:
            self._client(session)  # created here, in one thread
        replies: dict[int, PolicyReply] = {}
        for indices, answers in zip(by_session.values(), self._threads.map(ask, by_session), strict=True):
            replies |= {i: messages.reply_from_wire(answer) for i, answer in zip(indices, answers, strict=True)}
        return [replies[i] for i in range(len(observations))]

    def reset(self, session: str) -> None:
        client = self._clients.pop(session, None)
        if client is not None:
            client.close()  # the server forgets a session whose connection closes

    def close(self) -> None:
        for session in list(self._clients):
            self.reset(session)
        self._threads.shutdown()

    def _client(self, session: str) -> PolicyClient:
        if session not in self._clients:
            self._clients[session] = PolicyClient(self._url, self._key, session=session, options=self._options)
        return self._clients[session]


def _websocket_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES or not parts.hostname:
        raise UsageError(
            f"'{url}' is no address of a policy endpoint.", "write it as ws://HOST:PORT or wss://HOST:PORT"
        )
    return parts._replace(scheme=_SCHEMES[parts.scheme]).geturl()


def _refusal(url: str, status: int) -> ServerError:
    if status in _REFUSED:
        return ServerError(
            f"{url} refused the key (HTTP {status}).", f"pass a key of the server's keys file, or set {KEY_VARIABLE}"
        )
    return ServerError(f"{url} refused the connection (HTTP {status}).", "check the URL and that the policy is ready")
