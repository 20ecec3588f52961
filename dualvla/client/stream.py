"""One action at every control period, whatever the network does. Knows the client, chunks.py and the safe hold.

    with PolicyClient(url) as client, ActionStream(client) as actions:
        while True:
            command = actions.step(robot.observe())
            robot.execute(command.action)

The next chunk is asked for in the background while the present one is executed; see chunks.py for how they are joined.
Pacing is the robot's: call `step` once a control period.
"""

from __future__ import annotations

import json
import logging
import time
from concurrent import futures
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import numpy as np

from dualvla.client.chunks import ChunkBuffer
from dualvla.client.dialogue import Reply
from dualvla.client.synchronous import PolicyClient
from dualvla.errors import LateError, ServerError, StoppedError, UnsafeError, UsageError
from dualvla.hold import hold_action
from dualvla.schema import ACTION_SPACES, Observation
from dualvla.wire import messages

log = logging.getLogger("dualvla.client")

_AT_ONCE = (StoppedError, UnsafeError)  # what is left of the chunk is not to be trusted, either


@dataclass(frozen=True)
class StreamOptions:
    """deadline_s: how long `step` may wait for an action when none is left. on_silence, when nothing came by then or
    the server failed: "hold" answers the safe action (no motion, gripper unchanged), "raise" raises the error.
    refill_at: the next chunk is asked for when so many actions are left, or fewer (None: as many as the policy does not
    want executed of each chunk, but at least one, so that the robot need not wait).
    """

    deadline_s: float = 0.5
    on_silence: Literal["hold", "raise"] = "hold"
    refill_at: int | None = None

    def __post_init__(self) -> None:
        if self.deadline_s <= 0:
            raise UsageError(f"deadline_s = {self.deadline_s} must be above 0.", "give the seconds that step may wait")


@dataclass(frozen=True)
class Command:
    """What to execute now. action: float32 [D] in the units of the action space. held: it is the safe hold, because of
    `error`. reply: the server's newest, if it came in at this step."""

    action: np.ndarray
    held: bool = False
    error: ServerError | None = None
    reply: Reply | None = None


@dataclass(frozen=True)
class _Asked:
    step: int
    future: futures.Future[Reply]


class ActionStream:
    """Actions of one session, one a call. Not for several threads."""

    def __init__(self, client: PolicyClient, options: StreamOptions = StreamOptions()):
        self._client = client
        self._options = options
        spec = client.spec
        self._space = ACTION_SPACES[spec.action_space]
        self._buffer = ChunkBuffer(self._space)
        tail = max(1, spec.horizon - spec.execute_steps)
        self._refill_at = tail if options.refill_at is None else options.refill_at
        # A chunk is of no use once all of it has elapsed.
        self._request_deadline_s = max(options.deadline_s, spec.horizon / spec.control_hz)
        self._step = 0  # actions executed so far
        self._asked: _Asked | None = None
        self._last: np.ndarray | None = None
        self._holding = False

    def step(self, observation: Observation) -> Command:
        """The action for this control period; `observation` is what the robot sees now.

        Raises: WireError if the server refuses the observation; ServerError with on_silence="raise".
        """
        until = time.monotonic() + self._options.deadline_s
        reply, error = self._collect(wait_s=0.0)
        self._ask_if_low(observation)
        while self._buffer.remaining(self._step) == 0 and error is None:
            reply, error = self._collect(wait_s=max(0.0, until - time.monotonic()))
            if reply is None and error is None:
                error = LateError(f"No action within {self._options.deadline_s:g} s.")
            self._ask_if_low(observation)
        action = self._buffer.action(self._step)
        if action is None:
            assert error is not None
            return self._hold(error)
        if self._holding:
            log.info("moving again")
        self._holding = False
        self._step += 1
        self._last = action
        return Command(action, reply=reply)

    def reset(self) -> None:
        """A new episode: nothing is left of this one, here or at the server."""
        self._give_up()
        self._buffer.clear()
        self._step = 0
        self._client.reset()

    def close(self) -> None:
        """Gives up what was asked for; the client stays open."""
        self._give_up()

    def __enter__(self) -> ActionStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask_if_low(self, observation: Observation) -> None:
        if self._asked is None and self._buffer.remaining(self._step) <= self._refill_at:
            future = self._client.submit(observation, deadline_s=self._request_deadline_s)
            self._asked = _Asked(self._step, future)

    def _collect(self, wait_s: float) -> tuple[Reply | None, ServerError | None]:
        """The answer to what was asked for, if it comes within wait_s; its actions into the buffer."""
        if self._asked is None:
            return None, None
        asked = self._asked
        done, _ = futures.wait([asked.future], wait_s)
        if not done:
            return None, None
        self._asked = None
        try:
            reply = asked.future.result()
            if reply["fault"] is not None:
                raise messages.error_from_text(json.dumps({"error": reply["fault"]}))
        except ServerError as error:
            if isinstance(error, _AT_ONCE):
                self._buffer.clear()
                self._step = 0
            return None, error
        self._buffer.add(reply["actions"], asked.step, self._step)
        return reply, None

    def _hold(self, error: ServerError) -> Command:
        if self._options.on_silence == "raise":
            raise error
        if not self._holding:
            log.warning("holding still: %s", error)
        self._holding = True
        return Command(hold_action(self._space, self._last), held=True, error=error)

    def _give_up(self) -> None:
        if self._asked is not None:
            self._asked.future.cancel()
            self._asked = None
