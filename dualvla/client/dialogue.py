"""What a client says on a connection and makes of the answers: addresses, headers, messages. Knows no socket."""

from __future__ import annotations

import logging
import os
import uuid
from dataclasses import dataclass
from typing import Any, TypedDict
from urllib.parse import parse_qsl, urlencode, urlsplit

import numpy as np

from dualvla.client import images
from dualvla.client.options import ClientOptions
from dualvla.errors import ServerError, UsageError, WireError
from dualvla.schema import Observation, PolicySpec
from dualvla.wire import messages
from dualvla.wire.openpi import WireLimits, pack, unpack

log = logging.getLogger("dualvla.client")

KEY_VARIABLE = "DUALVLA_API_KEY"
_SCHEMES = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}
_LOCAL = ("127.0.0.1", "localhost", "::1")


class Reply(TypedDict):
    """What `infer` returns. actions: float32 [H, D] in the units of the action space; timings in milliseconds.

    seq: the session's answers so far, this one included. model: {"name", "version"} of what answered. interventions:
    what the safety layer changed in the actions. fault: {"kind", "id", "message"} where actions are the server's safe
    hold (`on_fault=hold`), else None.
    """

    actions: np.ndarray
    reasoning: str | None
    keyframe: bool
    reasoning_tokens: int
    id: str
    seq: int
    model: dict[str, str]
    interventions: list[str]
    fault: dict[str, str] | None
    policy_timing: dict[str, float]
    server_timing: dict[str, float]
    round_trip_ms: float


@dataclass(frozen=True)
class Greeting:
    """What the server said first. resumed: it still had this session's state. listener: where its replica listens."""

    spec: PolicySpec
    resumed: bool
    listener: str | None


class Dialogue:
    """One session's words. Raises: UsageError for a bad URL or session name."""

    def __init__(self, url: str, key: str | None, session: str | None, options: ClientOptions):
        self.url = _websocket_url(url)
        self.session = messages.session_name(session) if session is not None else uuid.uuid4().hex
        self.options = options
        self.limits = WireLimits()
        self._key = key or os.environ.get(KEY_VARIABLE)
        images.require_encoder(options)
        parts = urlsplit(self.url)
        if self._key and parts.scheme == "ws" and parts.hostname not in _LOCAL:
            log.warning("the key travels to %s unencrypted: use wss:// outside a trusted network", parts.hostname)

    @property
    def headers(self) -> dict[str, str]:
        """Of the upgrade, but for the session's name."""
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def address(self, url: str, resume_after: int | None) -> str:
        """`url`, asking to go on with this session after answer number `resume_after` (None: to start it clean)."""
        if resume_after is None:
            return url
        parts = urlsplit(url)
        query = [*parse_qsl(parts.query), ("resume", str(resume_after))]
        return parts._replace(query=urlencode(query)).geturl()

    def greeting(self, frame: bytes | str) -> Greeting:
        message = self._message(frame)
        session = message.get("session") or {}
        return Greeting(
            messages.spec_from_metadata(message),
            bool(session.get("resumed")),
            self._listener(message.get("listener")),
        )

    def request(self, observation: Observation, deadline_s: float | None, age_s: float | None) -> tuple[bytes, str]:
        """The frame to send, and the id that its answer must carry."""
        message = messages.observation_to_wire(observation)
        message |= {f"images/{name}": images.encode(image, self.options) for name, image in observation.images.items()}
        message["id"] = observation.id or uuid.uuid4().hex
        if deadline_s is not None:
            message["deadline_ms"] = deadline_s * 1000
        if age_s is not None:
            message["age_ms"] = age_s * 1000
        return pack(message), message["id"]

    def reply(self, frame: bytes | str, expected: str, observation: Observation, round_trip_ms: float) -> Reply:
        """Raises: ServerError if the endpoint failed or answered another observation; WireError if it refused this."""
        message = self._message(frame)
        if message.get("id") != expected:
            raise ServerError(f"The endpoint answered observation {message.get('id')!r}, not {expected!r}.")
        reply = messages.reply_from_wire(message)
        return Reply(
            actions=reply.actions,
            reasoning=reply.reasoning,
            keyframe=reply.keyframe,
            reasoning_tokens=reply.reasoning_tokens,
            id=observation.id,
            seq=int(message.get("seq") or 0),
            model=dict(message.get("model") or {}),
            interventions=list(message.get("interventions") or ()),
            fault=message.get("fault"),
            policy_timing=message.get("policy_timing") or {},
            server_timing=message.get("server_timing") or {},
            round_trip_ms=round_trip_ms,
        )

    def confirmation(self, frame: bytes | str) -> None:
        """The answer to a reset. Raises: ServerError if it was refused."""
        if not messages.is_reset(self._message(frame)):
            raise ServerError(f"{self.url} did not confirm the reset.")

    def refusal(self, status: int) -> ServerError:
        """The error that an HTTP status in place of the upgrade stands for."""
        if status in (401, 403):
            return ServerError(
                f"{self.url} refused the key (HTTP {status}).",
                f"pass a key of the server's keys file, or set {KEY_VARIABLE}",
            )
        return ServerError(
            f"{self.url} refused the connection (HTTP {status}).", "check the URL and that the policy is ready"
        )

    def _listener(self, url: Any) -> str | None:
        """Only as safe as the address we were given: the key goes there."""
        if not isinstance(url, str):
            return None
        listener = _websocket_url(url)
        if urlsplit(self.url).scheme == "wss" and urlsplit(listener).scheme != "wss":
            raise WireError(f"{self.url} names a listener without TLS, {listener}.", "serve it with certificates")
        return urlsplit(listener)._replace(path=urlsplit(self.url).path, query=urlsplit(self.url).query).geturl()

    def _message(self, frame: bytes | str) -> dict[str, Any]:
        if isinstance(frame, str):
            raise messages.error_from_text(frame)
        message = unpack(frame, self.limits)
        if not isinstance(message, dict):
            raise WireError(f"The endpoint answered with {type(message).__name__}, not a map.")
        return message


def _websocket_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES or not parts.hostname:
        raise UsageError(
            f"'{url}' is no address of a policy endpoint.", "write it as ws://HOST:PORT or wss://HOST:PORT"
        )
    return parts._replace(scheme=_SCHEMES[parts.scheme]).geturl()
