"""What training writes down as it goes: a line a step in `metrics.jsonl`, and the same figures to trackers.

The loop waits for neither a store nor a tracker: a thread feeds each of them, and one that fails or lags costs a
warning and figures, not the run. `metrics.jsonl` itself is complete at every `settle`. Knows nothing of what the
figures mean.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from dualvla.errors import DataError
from dualvla.io import storage
from dualvla.io.tracking import open_tracker

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
_PUT_EVERY_S = 10.0
_LONGEST_QUEUE = 256  # calls; a tracker slower than the loop loses figures, not memory


class Record:
    """The record of one run in folder `out`, from step `first` on: lines of steps that will be repeated are dropped.

    trackers: settings of `dualvla.io.tracking`. A context manager. Raises: OutputError, StorageError.
    """

    def __init__(self, out: str, first: int, trackers: Sequence[str], run: str):
        self._url = storage.join(out, METRICS)
        kept = _lines(self._url)[:first]
        self._trackers = [_Behind(s, functools.partial(open_tracker, s, run, first)) for s in trackers]
        storage.write_bytes(self._url, "".join(kept).encode())
        self._store: _Behind | None = None
        if storage.is_local(out):
            self._file = open(self._url, "a", buffering=1)  # noqa: SIM115  # closed in `__exit__`
        else:  # objects cannot grow: it is written anew, now and then
            self._store, self._kept, self._put_s = _Behind(self._url, lambda: None), kept, time.monotonic()

    def add(self, line: Mapping[str, float]) -> None:
        """line: step and figures; those that are not finite are left out."""
        finite = {name: value for name, value in line.items() if math.isfinite(value)}
        text = json.dumps(finite) + "\n"
        if self._store is None:
            with storage.writing(self._url):
                self._file.write(text)
        else:
            self._kept.append(text)
            if time.monotonic() - self._put_s > _PUT_EVERY_S:
                self._put_s = time.monotonic()
                content = "".join(self._kept).encode()
                self._store.call(lambda _: storage.write_bytes(self._url, content))
        step = int(finite.pop("step"))
        for tracker in self._trackers:
            tracker.call(lambda opened: opened.log(finite, step))

    def settle(self) -> None:
        """All lines are where they belong. Raises: StorageError."""
        if self._store is not None:
            self._store.finish()
            storage.write_bytes(self._url, "".join(self._kept).encode())
        for tracker in self._trackers:
            tracker.call(lambda opened: opened.flush())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in self._trackers:
            tracker.finish()  # or the last call might be one too many
            tracker.call(lambda opened: opened.close())
            tracker.finish()
        if self._store is None:
            self._file.close()
        elif error is None:
            self.settle()


class _Behind:
    """Calls with what `opening` returns, in a thread of their own, one after the other. The first failure is logged."""

    def __init__(self, name: str, opening: Callable[[], Any]):
        self._name, self._failed = name, False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="record")
        self._opened: Future[Any] = self._pool.submit(opening)
        self._waiting: deque[Future[Any]] = deque([self._opened])

    def call(self, function: Callable[[Any], Any]) -> None:
        """Returns at once. Left out where too many wait."""
        self._look()
        if len(self._waiting) < _LONGEST_QUEUE:
            self._waiting.append(self._pool.submit(lambda: function(self._opened.result())))

    def finish(self) -> None:
        """All calls have ended."""
        for waiting in self._waiting:
            waiting.exception()
        self._look()

    def _look(self) -> None:
        while self._waiting and self._waiting[0].done():
            error = self._waiting.popleft().exception()
            if error is not None and not self._failed:
                self._failed = True
                log.warning("'%s' lacks figures, %s has all of them: %s", self._name, METRICS, error)


def _lines(url: str) -> list[str]:
    try:
        return storage.read_bytes(url).decode().splitlines(keepends=True)
    except DataError:
        return []


def tracker_settings(settings: Sequence[str] | None, out: str) -> tuple[str, ...]:
    """What `--track` means: TensorBoard's files in the run's own folder by default, nothing for "none"."""
    if settings is None:
        return (f"tensorboard:{storage.join(out, 'tensorboard')}",)
    return tuple(setting for setting in settings if setting != "none")
