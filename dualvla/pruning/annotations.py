"""Boundaries that people marked: one JSON file of `dualvla annotate`, read and written whole.

    {"version": 1, "data": {"folder": ..., "manifest": sha256}, "episodes": {episode_id: {"boundaries": [frame, ...],
     "frames": N, "by": ..., "at": ISO 8601, UTC}}}

An episode that is listed has been looked at, also when nothing happens in it. Knows files only; nothing of the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dualvla.errors import DataError
from dualvla.io import storage

VERSION = 1


@dataclass(frozen=True)
class Annotation:
    """boundaries: sorted frame numbers, 0 .. frames - 1. by: who; at: when (ISO 8601, UTC)."""

    boundaries: tuple[int, ...]
    frames: int
    by: str
    at: str

    def __post_init__(self) -> None:
        if list(self.boundaries) != sorted(set(self.boundaries)):
            raise DataError(f"Boundaries {list(self.boundaries)} are not in order.", "mark each frame once")
        if any(not 0 <= frame < self.frames for frame in self.boundaries):
            raise DataError(f"Boundaries {list(self.boundaries)} are not all among {self.frames} frames.")


def read_annotations(url: str) -> tuple[dict[str, str], dict[str, Annotation]]:
    """(the data set they belong to: folder and manifest, episode_id -> annotation).

    Raises: DataError if the file is missing, not of this form, or breaks it somewhere, naming the episode.
    """
    try:
        values = json.loads(storage.read_bytes(url))
        version = values["version"]
        if version != VERSION:
            raise DataError(f"'{url}' has version {version!r}, not {VERSION}.", "annotate with this version")
        data = {name: str(values["data"][name]) for name in ("folder", "manifest")}
        episodes = dict(values["episodes"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"'{url}' is not a file of annotations: {error!r}.", "make it with `dualvla annotate`"
        ) from error
    return data, {str(name): _annotation(url, name, value) for name, value in episodes.items()}


def write_annotations(url: str, data: Mapping[str, str], episodes: Mapping[str, Annotation]) -> None:
    """Atomic; equal annotations give equal bytes."""
    values = {"version": VERSION, "data": dict(data), "episodes": {name: asdict(a) for name, a in episodes.items()}}
    storage.write_bytes(url, (json.dumps(values, indent=1, sort_keys=True) + "\n").encode())


def _annotation(url: str, name: str, value: Any) -> Annotation:
    try:
        marks = value["boundaries"]
        if not all(type(mark) is int for mark in [*marks, value["frames"]]):
            raise TypeError("frame numbers must be integers")
        return Annotation(tuple(marks), value["frames"], str(value["by"]), str(value["at"]))
    except (KeyError, TypeError, DataError) as error:
        raise DataError(f"'{url}', episode '{name}': {error}.", "repair or remove that entry") from error
