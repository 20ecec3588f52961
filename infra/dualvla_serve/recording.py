"""Sessions as a data set of contract.md, so that what robots did flows back into training.

A row for every answered observation: what was seen, the first action of the answer as it was commanded, the reasoning.
Encoding and writing happen in one thread of their own behind a bounded queue; what does not fit is counted, never
waited for. Each replica writes a data set folder of its own, finished when it closes. Knows schema and io only.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualvla.errors import DualVLAError
from dualvla.io import dataset, manifest, storage
from dualvla.schema import ACTION_SPACES, Observation, PolicySpec

log = logging.getLogger("dualvla.serve")

_MOST_WAITING = 512
_ROWS_PER_FILE = 512
_MOST_STEPS = 512  # of an episode, which is held in memory until it ends


@dataclass(frozen=True)
class Step:
    """episode: names it. action: [D] as commanded, previous: the one before it, in our own units. at_s: since the
    session began."""

    episode: str
    observation: Observation
    spec: PolicySpec
    action: np.ndarray
    reasoning: str | None
    previous: np.ndarray | None
    at_s: float


class Recorder:
    """dropped: called for every step that is lost."""

    def __init__(self, folder: str, replica: str, model: str, dropped: Callable[[], None] = lambda: None):
        """Raises: OutputError if the folder cannot be written."""
        self._folder = storage.join(folder, replica)
        self._config = {"recorded_by": "dualvla serve", "replica": replica, "model": model}
        self._dropped = dropped
        self._waiting: queue.Queue[Step | str | None] = queue.Queue(_MOST_WAITING)
        self._open: dict[str, list[dict[str, Any]]] = {}
        self._done: list[dict[str, Any]] = []
        self._parts = 0
        self._written = 0
        manifest.begin(self._folder, dataset.KIND, self._config, {})
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def add(self, step: Step) -> None:
        try:
            self._waiting.put_nowait(step)
        except queue.Full:
            self._dropped()

    def end(self, episode: str) -> None:
        """No step of it will follow. (Where the queue is full it ends with the recording.)"""
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(episode)

    def close(self) -> None:
        """Writes what is left and finishes the data set. Blocks until then."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            if isinstance(item, str):
                self._end(item)
                continue
            rows = self._open.setdefault(item.episode, [])
            rows.append(_row(item, rows))
            if len(rows) >= _MOST_STEPS:
                self._end(item.episode)
        for episode in list(self._open):
            self._end(episode)
        self._write()
        if not self._written:
            return
        try:
            dataset.finish_dataset(self._folder, self._config, {}, rows_in=self._written)
        except (DualVLAError, OSError) as error:
            log.error("the recording in %s could not be finished: %s", self._folder, error)

    def _end(self, episode: str) -> None:
        self._done += self._open.pop(episode, [])
        if len(self._done) >= _ROWS_PER_FILE:
            self._write()

    def _write(self) -> None:
        if not self._done:
            return
        rows = sorted(self._done, key=lambda row: (row["episode_id"], row["step"]))
        self._done = []
        url = dataset.part_url(self._folder, self._parts)
        try:
            dataset.write_table(url, dataset.rows_to_table(rows))
        except (DualVLAError, OSError) as error:
            log.error("%d recorded steps could not be written to %s: %s", len(rows), url, error)
            for _ in rows:
                self._dropped()
            return
        self._parts += 1
        self._written += len(rows)


def _row(step: Step, earlier: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A long episode is recorded in pieces, each an episode of its own: their names differ by when they began."""
    space = ACTION_SPACES[step.spec.action_space]
    commanded = step.action if step.previous is None else step.previous
    seen = step.observation
    return {
        "episode_id": earlier[0]["episode_id"] if earlier else f"{step.episode}/{uuid.uuid4().hex[:8]}",
        "step": len(earlier),
        "timestamp_s": step.at_s,
        "control_hz": step.spec.control_hz,
        "split": "train",
        "domain": "robot",
        "instruction": seen.instruction,
        "images": {name: dataset.encode_png(image) for name, image in seen.images.items()},
        "ee_pose": None if seen.ee_pose is None else [float(x) for x in seen.ee_pose],
        "gripper": [float(commanded[g]) for g in space.gripper_dims],
        "proprio": None if seen.proprio is None else [float(x) for x in seen.proprio],
        "action": [float(x) for x in step.action],
        "action_space": space.name,
        "reasoning": step.reasoning,
    }
