"""The emergency stop: latched, kept in a file, and read by every replica before it lets an action out.

`Latch` is the one truth, in the hub; `StopView` is a replica's knowledge of it, which counts as a stop once it is too
old. A state that cannot be read is a stop. Knows storage and clocks only.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from dualvla.config import from_dict
from dualvla.errors import DualVLAError, StoppedError
from dualvla.io import storage

log = logging.getLogger("dualvla.serve")


@dataclass(frozen=True)
class StopState:
    """version: grows with every change. at: when it changed (UTC, ISO 8601). by: id of the key, "" on this machine."""

    stopped: bool
    reason: str = ""
    by: str = ""
    at: str = ""
    version: int = 0


class Latch:
    """Stops take effect before they are written, clearances only after: whatever fails, fails closed."""

    def __init__(self, url: str | None, restarted: bool = False):
        """url: of the file; None keeps the stop for as long as this process lives. restarted: a latch before this one
        died with its process; without a file nobody knows what it held."""
        self._url = url
        self._restarted = restarted
        self.state = self._load()

    def stop(self, reason: str, by: str) -> StopState:
        """Raises: DualVLAError or OSError if it could not be written; it is in force all the same."""
        self.state = self._next(True, reason, by)
        log.critical("EMERGENCY STOP by %s: %s", by or "this machine", reason)
        self._save(self.state)
        return self.state

    def clear(self, reason: str, by: str) -> StopState:
        """Raises: DualVLAError or OSError if it could not be written; the stop then stays in force."""
        cleared = self._next(False, reason, by)
        self._save(cleared)
        self.state = cleared
        log.critical("emergency stop cleared by %s: %s", by or "this machine", reason)
        return cleared

    def _next(self, stopped: bool, reason: str, by: str) -> StopState:
        now = datetime.now(UTC)
        return StopState(stopped, reason, by, now.isoformat(timespec="milliseconds"), next_version(self.state.version))

    def _save(self, state: StopState) -> None:
        if self._url is not None:
            storage.write_bytes(self._url, json.dumps(asdict(state)).encode())

    def _load(self) -> StopState:
        try:
            if self._url is None and self._restarted:
                return StopState(True, "its keeper was restarted, and kept no file", version=next_version(0))
            if self._url is None or not storage.exists(self._url):
                return StopState(stopped=False)
            return from_dict(StopState, json.loads(storage.read_bytes(self._url)), "emergency stop")
        except (DualVLAError, OSError, ValueError, TypeError, AttributeError) as error:
            log.critical("the emergency stop's file %s cannot be read, so everything stands: %s", self._url, error)
            return StopState(stopped=True, reason="its state could not be read")


def next_version(version: int) -> int:
    """Beyond `version`, and beyond what a latch of an earlier process gave out."""
    return max(version + 1, int(time.time() * 1000))


class StopView:
    """A replica's view. Unknown, or not confirmed for max_silence_s, is a stop."""

    def __init__(self, max_silence_s: float, clock: Callable[[], float] = time.monotonic):
        self._max_silence_s = max_silence_s
        self._clock = clock
        self._state: StopState | None = None
        self._confirmed = clock()

    @property
    def version(self) -> int:
        return -1 if self._state is None else self._state.version

    def confirm(self, state: StopState) -> None:
        """What the hub said just now. An older version never replaces a newer one."""
        if self._state is None or state.version >= self._state.version:
            self._state = state
            self._confirmed = self._clock()

    def stop_alone(self, reason: str, by: str) -> None:
        """A stop that could not be told to anybody else; the next change at the hub ends it."""
        self._state = StopState(True, reason, by, version=next_version(self.version))

    def stopped(self) -> StopState | None:
        """The stop that is in force, or None."""
        if self._state is None:
            return StopState(stopped=True, reason="its state is not known yet")
        if self._state.stopped:
            return self._state
        if self._clock() - self._confirmed > self._max_silence_s:
            return StopState(stopped=True, reason="its state could not be confirmed")
        return None

    def check(self) -> None:
        """Raises: StoppedError."""
        state = self.stopped()
        if state is not None:
            raise StoppedError(f"Emergency stop: {state.reason}.", "an operator with the admin scope clears it")
