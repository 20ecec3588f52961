"""RLDS / Open-X data sets as TensorFlow Datasets writes them: one episode a record of `*.tfrecord*` files.

Knows the bridge and fractal schemas (`conventions`), and others by a convention file. Encoded images pass untouched.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualvla.errors import DataError, UsageError
from dualvla.io import storage
from dualvla_pipelines.sources import conventions
from dualvla_pipelines.sources.base import Episode, Recording, Rejected, Unit, build_episode
from dualvla_pipelines.sources.conventions import BRIDGE_RLDS, FRACTAL_RLDS, Convention
from dualvla_pipelines.sources.tfrecord import Feature, parse_example, read_records

CONVENTIONS = {"bridge": BRIDGE_RLDS, "fractal": FRACTAL_RLDS}
_SPLIT = re.compile(r"-(?P<split>[A-Za-z0-9]+)\.tfrecord")
_STEPS = "steps/"
_FLAGS = ("is_first", "is_last", "is_terminal", "discount", "reward")  # how RLDS frames an episode: no data of a step


@dataclass(frozen=True)
class RldsSource:
    """One unit a file. An episode is called `{file}/{record}`; its stable key for annotations is what the data set
    says in episode_metadata/file_path and episode_id, else the file's name and the record's number."""

    folder: str
    convention: Convention
    columns_left_out: Sequence[str]

    @classmethod
    def open(cls, folder: str, convention: str, overrides: tuple[str, ...]) -> RldsSource:
        """Raises: DataError if the folder holds no readable TFRecord file, or one without what its convention needs;
        UsageError if its schema is not known or nothing says its control rate."""
        keys: set[str] = set()
        for file in _files(folder):
            try:
                with storage.open_reader(file) as content:
                    keys = set(parse_example(next(read_records(content, file))))
                break
            except (DataError, StopIteration):
                continue  # damaged or empty; its own unit will say so
        if not keys:
            raise DataError(f"No TFRecord file in '{folder}' begins with a readable episode.", "fetch the files again")
        fitting = [candidate for candidate in CONVENTIONS.values() if _needed(candidate) <= keys]
        found = conventions.load(convention, CONVENTIONS, fitting[0] if fitting else None, overrides)
        lacking = sorted(_needed(found) - keys)
        if lacking:
            raise DataError(
                f"'{folder}' has no '{lacking[0]}', which convention '{found.name}' needs.", "pass another --convention"
            )
        if found.control_hz is None:
            raise UsageError("RLDS does not say its control rate.", "pass --set control_hz=...")
        steps = {key.removeprefix(_STEPS) for key in keys if key.startswith(_STEPS)}
        return cls(folder, found, tuple(sorted(steps - _used(found, steps) - set(_FLAGS))))

    @property
    def passes_images(self) -> bool:
        return True

    @property
    def labelled(self) -> bool:
        return False

    def units(self) -> Sequence[Unit]:
        return [Unit(i, file.rsplit("/", 1)[-1], {"file": file}) for i, file in enumerate(_files(self.folder))]

    def fingerprint(self) -> str:
        sizes = storage.file_sizes(self.folder)
        names = [(file.rsplit("/", 1)[-1], sizes[file]) for file in _files(self.folder)]
        return hashlib.sha256(repr(names).encode()).hexdigest()

    def episodes(self, unit: Unit) -> Iterator[Episode]:
        """A record that cannot be read ends the file: it is rejected as one row, and the file is named."""
        record = 0
        with storage.open_reader(unit.spec["file"]) as file:
            try:
                for data in read_records(file, unit.name):
                    yield self._episode(unit, record, data)
                    record += 1
            except DataError as error:
                yield self._damaged(unit, record, error.message)

    def lost(self, unit: Unit, reason: str) -> Iterator[Episode]:
        yield self._damaged(unit, 0, reason)

    def _damaged(self, unit: Unit, record: int, reason: str) -> Episode:
        name = f"{unit.name}/{record:05d}"
        row = {"episode_id": name, "step": 0, "domain": "robot"}
        return Episode(name, rejected=[Rejected(row, "file", reason)], damaged={unit.name: reason})

    def _episode(self, unit: Unit, record: int, data: bytes) -> Episode:
        name = f"{unit.name}/{record:05d}"
        features: Mapping[str, Feature] = {}
        try:
            features = parse_example(data)
            recording = self._recording(name, unit, features)
            converted = conventions.convert(recording.columns, self.convention)
        except DataError as error:  # one record that is not what the others are
            length = _length(features)
            rows = [{"episode_id": name, "step": step, "domain": "robot"} for step in range(max(1, length))]
            return Episode(name, rejected=[Rejected(row, "record", error.message) for row in rows])
        file_path = _text(features, "episode_metadata/file_path") or unit.name
        number = _text(features, "episode_metadata/episode_id") or str(record)
        return build_episode(recording, converted, self.convention, file_path, number)

    def _recording(self, name: str, unit: Unit, features: Mapping[str, Feature]) -> Recording:
        length = _length(features)
        if not length:
            raise DataError("The record is not an RLDS episode: it has no 'steps/is_first'.", "check the format")
        columns: dict[str, np.ndarray] = {}
        encoded: dict[str, list[bytes]] = {}
        for key, values in features.items():
            if not key.startswith(_STEPS):
                continue
            if len(values) % length:
                raise DataError(f"'{key}' holds {len(values)} values for {length} steps.", "check the source")
            if isinstance(values, np.ndarray):
                columns[key.removeprefix(_STEPS)] = values.reshape(length, -1)
            elif len(values) == length:
                encoded[key.removeprefix(_STEPS)] = values
        images = {}
        for camera, ours in _cameras(self.convention, encoded).items():
            if camera not in encoded:
                raise DataError(f"The episode has no camera '{camera}'.", "check the convention")
            images[ours] = encoded[camera]
        said = encoded.get(self.convention.instruction or "language_instruction", [b""] * length)
        match = _SPLIT.search(unit.name)
        return Recording(
            name,
            columns,
            images,
            instructions=[text.decode(errors="replace") for text in said],
            control_hz=self.convention.control_hz or 0.0,
            split=match["split"] if match else "train",
        )


def _files(folder: str) -> list[str]:
    files = [file for file in storage.list_files(folder) if ".tfrecord" in file.rsplit("/", 1)[-1]]
    if not files:
        raise DataError(f"'{folder}' holds no *.tfrecord* files.", "pass the folder that holds them directly")
    return files


def _length(features: Mapping[str, Any]) -> int:
    """Steps of an episode, 0 if the record does not say."""
    return next((len(features[_STEPS + flag]) for flag in _FLAGS if _STEPS + flag in features), 0)


def _needed(convention: Convention) -> set[str]:
    specs = [spec for arm in convention.arms for spec in vars(arm).values()]
    return {_STEPS + key for key in [*(spec.split("[")[0] for spec in specs), *convention.cameras]}


def _cameras(convention: Convention, encoded: Mapping[str, Sequence[bytes]]) -> dict[str, str]:
    if convention.cameras:
        return convention.cameras
    found = [key for key, values in encoded.items() if values and values[0][:3] in (b"\xff\xd8\xff", b"\x89PN")]
    return {key: key.rsplit("/", 1)[-1] for key in sorted(found)}


def _used(convention: Convention, keys: set[str]) -> set[str]:
    specs = [spec for arm in convention.arms for spec in vars(arm).values()]
    used = {spec.split("[")[0] for spec in [*specs, *convention.proprio]}
    used |= set(convention.cameras) | {convention.instruction or "language_instruction"}
    return used & keys if convention.cameras else used | {key for key in keys if "image" in key}


def _text(features: Mapping[str, Feature], key: str) -> str:
    values = features.get(key)
    if values is None or len(values) == 0:
        return ""
    return values[0].decode(errors="replace") if isinstance(values, list) else str(values[0])
