"""Robot episodes of a data set as pictures with boundaries, one at a time: what the event detector learns from.

Boundaries come from the data set's `events`, or from people's annotations in their place. Knows the data set format;
nothing of networks.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dualvla.errors import DataError
from dualvla.io import dataset, manifest, storage
from dualvla.pruning.annotations import Annotation, read_annotations
from dualvla.pruning.boundaries import merge_frames

Split = Literal["train", "validation", "test"]
_COLUMNS = ("episode_id", "step", "domain", "task", "images", "events")


@dataclass(frozen=True)
class Clip:
    """frames: uint8 [N, H, W, 3] of the first camera. boundaries: int [B], sorted."""

    episode_id: str
    task: str
    frames: np.ndarray
    boundaries: np.ndarray


@dataclass(frozen=True)
class BoundaryRule:
    """What of a data set's `events` counts as a boundary, and when two are one.

    kinds: what stands before the colon ("contact:red cube"); empty: all. gap: events at most this many frames after
    the one before belong to the same boundary, see `merge_frames`. What is there in the first frame is no event.
    """

    kinds: tuple[str, ...] = ()
    gap: int = 2

    def __call__(self, events: Sequence[Sequence[str] | None]) -> np.ndarray:
        """Events of each frame of one episode -> boundaries, int [B]."""
        counted = [
            frame
            for frame, names in enumerate(events)
            if frame and any(not self.kinds or name.split(":")[0] in self.kinds for name in names or ())
        ]
        return merge_frames(counted, self.gap)


@dataclass(frozen=True)
class Shares:
    """How many of the episodes are held out: to choose the threshold on, and for `detector eval`."""

    validation: float = 0.15
    test: float = 0.15

    def split(self, episode_ids: Sequence[str]) -> list[Split]:
        """Which share each episode belongs to: exact numbers, chosen by a hash of the names and not by their order."""
        ranked = sorted(episode_ids, key=lambda name: hashlib.sha256(name.encode()).digest())
        test = round(self.test * len(ranked))
        held_out = test + round(self.validation * len(ranked))
        place = {name: i for i, name in enumerate(ranked)}
        return [
            "test" if place[name] < test else "validation" if place[name] < held_out else "train"
            for name in episode_ids
        ]


def data_digest(folder: str) -> str:
    """What a data set is recognised by, wherever it lies. Raises: DataError if it is missing or unfinished."""
    manifest.require(folder, dataset.KIND)
    return manifest.file_digest(storage.join(folder, manifest.NAME))


def annotations_for(folder: str, urls: Sequence[str]) -> dict[str, Annotation] | None:
    """The annotations of this data set among the files `urls`; None if there are no files: its events count.

    Raises: DataError if no file belongs to it.
    """
    if not urls:
        return None
    found: dict[str, Annotation] = {}
    for url in urls:
        data, episodes = read_annotations(url)
        if data["manifest"] == data_digest(folder):
            found |= episodes
    if not found:
        raise DataError(
            f"No annotation in {', '.join(urls)} belongs to '{folder}'.", "annotate that data set, or leave it out"
        )
    return found


def read_clips(
    folder: str,
    rule: BoundaryRule,
    annotations: dict[str, Annotation] | None = None,
    wanted: Callable[[str], bool] = lambda episode_id: True,
) -> Iterator[Clip]:
    """The episodes in file order that are `wanted`; of an annotated data set, only those that are annotated.

    Raises: DataError naming an episode whose pictures cannot be used or whose annotation has another length.
    """
    for file in dataset.open_dataset(folder).files:
        rows = dataset.read_table(file, _COLUMNS).to_pylist()
        for episode_id, steps in itertools.groupby(rows, key=lambda row: row["episode_id"]):
            episode = [row for row in steps if row["domain"] == "robot"]
            if not episode or (annotations is not None and episode_id not in annotations):
                continue
            if wanted(episode_id):
                yield _clip(folder, episode, rule, annotations)


def _clip(
    folder: str, episode: list[dict[str, Any]], rule: BoundaryRule, annotations: dict[str, Annotation] | None
) -> Clip:
    name = episode[0]["episode_id"]
    frames = _decode(f"'{folder}', episode '{name}'", [row["images"] for row in episode])
    if annotations is None:
        boundaries = rule([row["events"] for row in episode])
    elif annotations[name].frames != len(frames):
        raise DataError(
            f"'{folder}', episode '{name}' has {len(frames)} frames, its annotation {annotations[name].frames}.",
            "annotate it again",
        )
    else:
        boundaries = np.array(annotations[name].boundaries, dtype=np.int64)
    return Clip(name, episode[0]["task"] or "", frames, boundaries)


def _decode(where: str, images: Sequence[Sequence[tuple[str, bytes]] | None]) -> np.ndarray:
    """uint8 [N, H, W, 3] of the first camera."""
    try:
        frames = [dataset.decode_image(cameras[0][1]) if cameras else None for cameras in images]
    except DataError as error:
        raise DataError(f"{where}: {error.message}", error.fix) from error
    if any(frame is None for frame in frames) or len({frame.shape for frame in frames if frame is not None}) > 1:
        raise DataError(f"{where}: a picture is missing, or their size changes.", "`dualvla validate` lists such rows")
    return np.stack([frame for frame in frames if frame is not None])
