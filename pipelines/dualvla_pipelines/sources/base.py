"""What every source of robot data offers to `ingest`: units of work, and the episodes of each. Knows no format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from dualvla_pipelines.sources.conventions import Convention, Converted


@dataclass(frozen=True)
class Unit:
    """One piece of work, small enough to be held in memory piece by piece: `spec` (JSON-ready) says what to read."""

    index: int
    name: str
    spec: Mapping[str, Any]


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used: as much of it as is known, and why.

    check: the kind of reason, for counting. `convention`: dropped on purpose, which is no fault of the episode.
    """

    row: Mapping[str, Any]
    check: str
    reason: str


@dataclass(frozen=True)
class Episode:
    """One episode, converted. rows: step columns of dualvla/schema.py; source_steps: the source's number of each.

    length: rows and rejected rows together, that is what the source holds. file_path, number: the stable key that
    annotations are joined by. damaged: files that could not be read to the end -> why.
    """

    episode_id: str
    file_path: str = ""
    number: str = ""
    rows: Sequence[dict[str, Any]] = ()
    source_steps: Sequence[int] = ()
    rejected: Sequence[Rejected] = ()
    damaged: Mapping[str, str] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.rows) + len(self.rejected)


class Source(Protocol):
    """Picklable: it travels to the workers."""

    @property
    def convention(self) -> Convention: ...

    @property
    def columns_left_out(self) -> Sequence[str]:
        """Columns of the source that have no place in a data set folder."""

    @property
    def passes_images(self) -> bool:
        """Some images are the source's own bytes, which nobody has decoded yet."""

    @property
    def labelled(self) -> bool:
        """Its steps carry the labels of pruning."""

    def units(self) -> Sequence[Unit]:
        """In a fixed order. The same source gives the same units."""

    def episodes(self, unit: Unit) -> Iterator[Episode]:
        """In a fixed order; at most one is held in memory at a time."""

    def lost(self, unit: Unit, reason: str) -> Iterator[Episode]:
        """What is known of the rows of a unit that cannot be read at all, every one rejected."""

    def fingerprint(self) -> str:
        """Changes when the source does: file names and sizes, and the contents of small metadata files."""


@dataclass(frozen=True)
class Recording:
    """An episode before conversion. columns: name -> [T] or [T, D]; images: our camera name -> T encoded images.

    timestamps_s: [T], or None where the source has none. texts: step columns that hold one value a step.
    missing: step -> why it has no usable image or row.
    """

    episode_id: str
    columns: Mapping[str, np.ndarray]
    images: Mapping[str, Sequence[bytes | None]]
    instructions: Sequence[str]
    control_hz: float
    split: str
    timestamps_s: np.ndarray | None = None
    texts: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    missing: Mapping[int, str] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.instructions)


def build_episode(
    recording: Recording, converted: Converted, convention: Convention, file_path: str, number: str, **facts: Any
) -> Episode:
    """Step rows of a recording: steps from 0 without gap over what the convention keeps, times from its first step.

    A kept step in `recording.missing` is rejected; rows that a convention drops carry no images into the quarantine.
    """
    kept = [t for t in range(recording.length) if t not in converted.dropped]
    first = kept[0] if kept else 0
    rows: list[dict[str, Any]] = []
    rejected = [
        Rejected(
            {"episode_id": recording.episode_id, "step": t, "split": recording.split, "domain": "robot"},
            "convention",
            reason,
        )
        for t, reason in sorted(converted.dropped.items())
    ]
    steps = []
    for t in kept:
        row = {
            "episode_id": recording.episode_id,
            "step": t - first,
            "timestamp_s": _time(recording, t, first),
            "control_hz": recording.control_hz,
            "split": recording.split,
            "domain": "robot",
            "task": convention.name,
            "instruction": recording.instructions[t],
            "images": {name: images[t] for name, images in sorted(recording.images.items()) if images[t] is not None},
            "ee_pose": converted.pose[t],
            "gripper": converted.gripper[t],
            "proprio": converted.proprio[t],
            "action": converted.action[t],
            "action_space": convention.action_space,
            "events": [],
            **{name: values[t] for name, values in recording.texts.items()},
        }
        if t in recording.missing:
            rejected.append(Rejected(row, "image", recording.missing[t]))
        else:
            rows.append(row)
            steps.append(t)
    return Episode(recording.episode_id, file_path, number, rows=rows, source_steps=steps, rejected=rejected, **facts)


def _time(recording: Recording, step: int, first: int) -> float:
    if recording.timestamps_s is None:
        return (step - first) / recording.control_hz
    return float(recording.timestamps_s[step] - recording.timestamps_s[first])
