"""How much one key may ask: requests a second and connections at a time. Monotonic clocks; knows no protocol."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dualvla.errors import BusyError

_MOST_KEYS = 4096


@dataclass(frozen=True)
class Limits:
    """Of one replica. requests_per_s: of one key, `burst` of them at once. connections: WebSockets in all and of one
    key. waiting: observations that queue for the policy."""

    requests_per_s: float = 500.0
    burst: int = 500
    connections: int = 1000
    connections_per_key: int = 500
    waiting: int = 512


class RateLimiter:
    """A token bucket a key."""

    def __init__(self, per_s: float, burst: int, clock: Callable[[], float] = time.monotonic):
        self._per_s, self._burst, self._clock = per_s, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # key -> (tokens, at)

    def admit(self, principal: str) -> None:
        """Raises: BusyError."""
        now = self._clock()
        tokens, at = self._buckets.pop(principal, (float(self._burst), now))
        tokens = min(self._burst, tokens + (now - at) * self._per_s)
        admitted = tokens >= 1
        self._buckets[principal] = (tokens - 1 if admitted else tokens, now)
        while len(self._buckets) > _MOST_KEYS:
            self._buckets.popitem(last=False)
        if not admitted:
            raise BusyError(f"More than {self._per_s:g} requests a second.", "ask less often")


class ConnectionCounter:
    def __init__(self, most: int, most_per_key: int):
        self._most, self._most_per_key = most, most_per_key
        self._open: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self._open.total()

    @contextlib.contextmanager
    def one(self, principal: str) -> Iterator[None]:
        """Raises: BusyError."""
        if self.total >= self._most or self._open[principal] >= self._most_per_key:
            raise BusyError("Too many connections.", "close one, or ask another replica")
        self._open[principal] += 1
        try:
            yield
        finally:
            self._open[principal] -= 1
            if not self._open[principal]:
                del self._open[principal]
