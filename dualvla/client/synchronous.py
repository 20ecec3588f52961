"""The same client without asyncio: its connection lives in a background thread, its calls block.

So the connection answers pings while the robot's own program is busy, and `submit` asks without waiting.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

from dualvla.client.asynchronous import AsyncPolicyClient
from dualvla.client.dialogue import Reply
from dualvla.client.options import ClientOptions
from dualvla.schema import Observation, PolicySpec

T = TypeVar("T")


class PolicyClient:
    """One robot's connection to a policy. Calls from several threads take turns.

    Arguments, errors and behaviour are those of AsyncPolicyClient.
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
        self._client = AsyncPolicyClient(url, key, session=session, options=options, tls=tls)

    @property
    def session(self) -> str:
        return self._client.session

    @property
    def spec(self) -> PolicySpec:
        """What the endpoint's policy expects and answers."""
        return wait_for(in_background(self._client.spec()))

    def infer(self, observation: Observation, *, deadline_s: float | None = None, age_s: float | None = None) -> Reply:
        """One observation, one reply: {"actions": float32 [H, D], "reasoning", "keyframe", "reasoning_tokens", "id",
        "server_timing" and "policy_timing" in ms, "round_trip_ms"}. See AsyncPolicyClient.infer."""
        return wait_for(self.submit(observation, deadline_s=deadline_s, age_s=age_s))

    def submit(
        self, observation: Observation, *, deadline_s: float | None = None, age_s: float | None = None
    ) -> Future[Reply]:
        """As `infer`, without waiting: the future has the reply or the error."""
        return in_background(self._client.infer(observation, deadline_s=deadline_s, age_s=age_s))

    def reset(self) -> None:
        """The policy forgets this session's past, as at the start of an episode."""
        wait_for(in_background(self._client.reset()))

    def close(self) -> None:
        """Ends the session: the server forgets it. The client can be used again, with a session that starts anew."""
        wait_for(in_background(self._client.close()))

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def in_background(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Runs it in the one background loop of this process."""
    return asyncio.run_coroutine_threadsafe(work, _BACKGROUND.loop())


def wait_for(future: Future[T]) -> T:
    """Ctrl-C while waiting gives the work up, too."""
    try:
        return future.result()
    except KeyboardInterrupt:
        future.cancel()
        raise


class _Background:
    """The one event loop of this process, in a thread; a fork inherits the loop but not the thread that runs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = 0

    def loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or self._process != os.getpid():
                self._loop, self._process = asyncio.new_event_loop(), os.getpid()
                threading.Thread(target=self._loop.run_forever, name="dualvla-client", daemon=True).start()
            return self._loop


_BACKGROUND = _Background()
