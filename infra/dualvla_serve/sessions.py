"""A session: everything that is remembered of one robot between two of its observations, and how it travels.

The state is explicit and belongs to one session; the policy's own part of it is put into the policy for one call and
taken out again. `dump` and `load` carry it to another process as plain msgpack. Knows no network and no policy.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dualvla.config import from_dict
from dualvla.errors import DualVLAError, SessionLostError, WireError
from dualvla.wire.openpi import pack, unpack
from dualvla.wire.options import SessionOptions
from dualvla_serve.chunks import Chunk
from dualvla_serve.safety import Watch

FORMAT = 1


@dataclass(frozen=True)
class Lifetimes:
    """idle_s: without an observation, connected or not. longest_s: in all."""

    idle_s: float = 300.0
    longest_s: float = 12 * 3600.0


@dataclass
class Session:
    """epoch: which claim of the name this is (hub.py); a state of an earlier claim is never taken. seq: answers given.

    actions are in our own units: what was commanded, before the gripper's convention. version: of the model that
    `policy` and `chunks` come from. queue: actions of the last chunk not yet handed out (vla-eval takes one at a time).
    may_repeat: the last answer was lost on its way and is given again if it is asked for first.
    """

    name: str
    principal: str
    options: SessionOptions
    protocol: str
    epoch: int = 0
    seq: int = 0
    steps: int = 0
    policy: dict[str, Any] = field(default_factory=dict)
    version: str = ""
    chunks: list[Chunk] = field(default_factory=list)
    queue: np.ndarray | None = None
    last_action: np.ndarray | None = None
    watch: Watch = field(default_factory=Watch)
    last_id: str = ""
    last_reply: bytes = b""
    interventions: int = 0
    episode: int = 0
    created: float = field(default_factory=time.monotonic)
    used: float = field(default_factory=time.monotonic)
    may_repeat: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def reset(self) -> None:
        """Forgets the episode, as if the session had just begun; the count of its answers goes on."""
        self.policy, self.chunks, self.queue, self.last_action = {}, [], None, None
        self.watch, self.last_id, self.last_reply, self.steps = Watch(), "", b"", 0
        self.episode += 1

    def use(self, lifetimes: Lifetimes, clock: Callable[[], float] = time.monotonic) -> None:
        """Marks the session as used now. Raises: SessionLostError if a lifetime is over."""
        now = clock()
        if now - self.used > lifetimes.idle_s:
            raise SessionLostError(f"The session was idle for more than {lifetimes.idle_s:g} s.", "connect again")
        if now - self.created > lifetimes.longest_s:
            raise SessionLostError(f"The session is older than {lifetimes.longest_s:g} s.", "connect again")
        self.used = now


def dump(session: Session) -> bytes:
    """Ages instead of times: clocks of two processes have nothing to do with each other."""
    now = time.monotonic()
    state: dict[str, Any] = {
        "format": FORMAT,
        "options": asdict(session.options),
        "protocol": session.protocol,
        "age_s": now - session.created,
        "watch": {"seen": {k: list(v) for k, v in session.watch.seen.items()}, "state": list(session.watch.state)},
        "chunks": [[step, actions] for step, actions in session.chunks],
        "last_reply": session.last_reply,
    }
    for name in _PLAIN:
        state[name] = getattr(session, name)
    return pack(state)


def load(name: str, principal: str, epoch: int, data: bytes) -> Session | None:
    """None if another version of this package wrote it, or it is damaged: the session then starts anew."""
    try:
        state = unpack(data)
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            return None
        now = time.monotonic()
        seen = {k: (int(v[0]), int(v[1])) for k, v in state["watch"]["seen"].items()}
        return Session(
            name=name,
            principal=principal,
            epoch=epoch,
            options=from_dict(SessionOptions, state["options"], "session"),
            protocol=state["protocol"],
            created=now - state["age_s"],
            used=now,
            watch=Watch(seen, tuple(state["watch"]["state"])),
            chunks=[(int(step), actions) for step, actions in state["chunks"]],
            last_reply=state["last_reply"],
            **{field: state[field] for field in _PLAIN},
        )
    except (WireError, DualVLAError, KeyError, TypeError, ValueError, IndexError, AttributeError):
        return None


_PLAIN = (
    "seq", "steps", "policy", "version", "queue", "last_action", "last_id", "interventions", "episode",
)  # fmt: skip
