"""`dualvla annotate`: people mark event boundaries in some episodes of a data set, in their browser.

Which episodes are offered, their pictures, and the file that marks are kept in; the page is `pages/annotate.html`.
Knows the data set format and `dualvla.webpage`; nothing of detectors.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import pyarrow as pa

from dualvla.errors import DataError, OutputError, UsageError
from dualvla.io import dataset, storage
from dualvla.pruning.annotations import Annotation, read_annotations, write_annotations
from dualvla.webpage import Content, Page
from dualvla_pipelines.clips import data_digest

_COLUMNS = ("episode_id", "step", "domain", "task", "instruction")
_EPISODES_A_FILE = 5  # at first: files are often of one task, and a sample should have all of them
_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass(frozen=True)
class Offered:
    """One episode that can be annotated. first: its first row in `file`; frames: its number of rows."""

    episode_id: str
    task: str
    instruction: str
    file: str
    first: int
    frames: int


class Annotator:
    """The state behind the page: `page.get` and `page.post` are its methods.

    out: the file of annotations; what it holds already is gone on with. by: who annotates. count: episodes to offer.
    Raises: OutputError if `out` belongs to another data set, DataError if there is no robot episode.
    """

    def __init__(self, folder: str, out: str, by: str, count: int):
        if count < 1:
            raise UsageError(f"--episodes {count} is less than 1.", "offer 1 episode or more")
        self._out, self._by = out, by
        self._data = {"folder": folder, "manifest": data_digest(folder)}
        self._annotations: dict[str, Annotation] = {}
        if storage.exists(out):
            data, self._annotations = read_annotations(out)
            if data["manifest"] != self._data["manifest"]:
                raise OutputError(f"'{out}' annotates another data set ('{data['folder']}').", "pass another --out")
        self.offered = list(itertools.islice(offered_episodes(folder), count))
        if not self.offered:
            raise DataError(f"'{folder}' has no robot episode.", "pass a data set of demonstrations")
        self._opened: tuple[Offered, list[bytes]] | None = None

    def page(self) -> Page:
        html = (resources.files("dualvla_pipelines") / "pages" / "annotate.html").read_bytes()
        return Page(html, get={"state": self.state, "frame": self.frame}, post={"save": self.save})

    def state(self, query: Mapping[str, Any]) -> dict[str, Any]:
        """Everything but the pictures."""
        return {
            "data": self._data["folder"],
            "out": self._out,
            "by": self._by,
            "episodes": [
                {
                    "id": episode.episode_id,
                    "task": episode.task,
                    "instruction": episode.instruction,
                    "frames": episode.frames,
                    "boundaries": self._marks(episode.episode_id),
                }
                for episode in self.offered
            ],
        }

    def frame(self, query: Mapping[str, Any]) -> Content:
        """The picture of `query["frame"]` of `query["episode"]` (a number in the list), as it is stored."""
        episode = self._episode(query)
        images = self._images(episode)
        number = _whole(query, "frame", len(images))
        kinds = [kind for signature, kind in _SIGNATURES.items() if images[number].startswith(signature)]
        if not kinds:
            raise DataError(
                f"Frame {number} of '{episode.episode_id}' is neither PNG nor JPEG.", "see `dualvla validate`"
            )
        return Content(images[number], kinds[0])

    def save(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Keeps `payload["boundaries"]` of `payload["episode"]`, at once and for good."""
        episode = self._episode(payload)
        marks = payload.get("boundaries")
        if not isinstance(marks, list) or not all(type(mark) is int for mark in marks):
            raise DataError(f"Boundaries {marks!r} are not a list of frame numbers.")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        made = Annotation(tuple(marks), episode.frames, self._by, now)
        annotations = {**self._annotations, episode.episode_id: made}
        write_annotations(self._out, self._data, annotations)
        self._annotations = annotations  # only what is on the disk counts as saved
        return {"boundaries": marks, "at": now}

    @property
    def done(self) -> int:
        return sum(episode.episode_id in self._annotations for episode in self.offered)

    def _marks(self, episode_id: str) -> list[int] | None:
        found = self._annotations.get(episode_id)
        return None if found is None else list(found.boundaries)

    def _episode(self, values: Mapping[str, Any]) -> Offered:
        return self.offered[_whole(values, "episode", len(self.offered))]

    def _images(self, episode: Offered) -> list[bytes]:
        """Of the first camera. Those of one episode are held: the page asks for one after the other."""
        if self._opened is not None and self._opened[0] == episode:
            return self._opened[1]
        rows = dataset.read_table(episode.file, ["images"])["images"].slice(episode.first, episode.frames)
        pictures = [row[0][1] for row in rows.to_pylist() if row and row[0][1] is not None]
        if len(pictures) != episode.frames:
            raise DataError(f"A step of '{episode.episode_id}' has no picture.", "see `dualvla validate`")
        self._opened = (episode, pictures)
        return pictures


def offered_episodes(folder: str) -> Iterator[Offered]:
    """The robot episodes in an order of their own: mixed, the same every time, and a few of every file first.

    Reads a file only when its turn has come.
    """
    files = sorted(dataset.open_dataset(folder).files, key=lambda file: _mix(file.rsplit("/", 1)[-1]))
    rest: list[Offered] = []
    for file in files:
        episodes = sorted(_episodes_of(file), key=lambda episode: _mix(episode.episode_id))
        yield from episodes[:_EPISODES_A_FILE]
        rest += episodes[_EPISODES_A_FILE:]
    yield from rest


def _episodes_of(file: str) -> Iterator[Offered]:
    table: pa.Table = dataset.read_table(file, _COLUMNS)
    rows = enumerate(table.to_pylist())
    for episode_id, numbered in itertools.groupby(rows, key=lambda row: row[1]["episode_id"]):
        steps = list(numbered)
        first, row = steps[0]
        if row["domain"] == "robot":
            yield Offered(episode_id, row["task"] or "", row["instruction"] or "", file, first, len(steps))


def _mix(name: str) -> str:
    return hashlib.sha256(f"annotate/{name}".encode()).hexdigest()  # another order than that of `Shares`


def _whole(values: Mapping[str, Any], name: str, count: int) -> int:
    """A number from 0 to count - 1, which a query holds as text."""
    text = str(values.get(name))
    if not text.isdecimal() or int(text) >= count:
        raise DataError(f"{name} {text!r} is not one of 0 to {count - 1}.")
    return int(text)
