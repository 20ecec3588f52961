"""LeRobotDataset folders, v2.0, v2.1 and v3.0: parquet columns, mp4 or embedded images, language columns.

Knows the layout on disk (meta/info.json says most of it), not what the numbers mean (`conventions`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dualvla.errors import DataError
from dualvla.io import dataset, storage
from dualvla_pipelines.sources import conventions, language
from dualvla_pipelines.sources.base import Episode, Recording, Rejected, Unit, build_episode
from dualvla_pipelines.sources.conventions import BRIDGE_LEROBOT, FRACTAL_LEROBOT, Convention, dualvla_lerobot
from dualvla_pipelines.sources.video import FrameEncoding, read_frames

CONVENTIONS = {"dualvla": dualvla_lerobot(1), "bridge": BRIDGE_LEROBOT, "fractal": FRACTAL_LEROBOT}
VERSIONS = ("v2.0", "v2.1", "v3.0")
_FRAMES_PER_UNIT = 2048
_TOLERANCE = 0.25  # of a frame period, between a row's timestamp and its video frame
_INDEX_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
_INDICES_V3 = ("data/chunk_index", "data/file_index")
_DAMAGE = (pa.ArrowInvalid, OSError)
# Facts of an episode that `dualvla export` adds to meta/episodes; `file_path` and `episode_id` are taken from anyone.
OWN_FACTS = {"episode_id": "dualvla/episode_id", "task": "dualvla/task", "split": "dualvla/split"}
LABELLED = "dualvla/labelled"  # whether the steps carry the labels of pruning


@dataclass(frozen=True)
class LeRobotSource:
    """info: meta/info.json. episodes_meta: one row an episode, in order. tasks: task_index -> text.

    The stable key for annotations: what meta/episodes says in `file_path` and `episode_id`, else the folder's name and
    the episode's index.
    """

    folder: str
    info: Mapping[str, Any]
    episodes_meta: pa.Table
    tasks: Mapping[int, str]
    convention: Convention
    encoding: FrameEncoding
    columns_left_out: Sequence[str] = ()
    cameras: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str, convention: str, overrides: tuple[str, ...], encoding: FrameEncoding) -> LeRobotSource:
        """Raises: DataError if metadata is missing, damaged or of another version; UsageError on its convention."""
        info = _json(storage.join(folder, "meta", "info.json"))
        version = info.get("codebase_version")
        if version not in VERSIONS:
            raise DataError(
                f"'{folder}' is LeRobot {version}, which is not read here.",
                f"convert it to one of {', '.join(VERSIONS)}",
            )
        lacking = {"fps", "features", "data_path"} - set(info)
        if lacking:
            raise DataError(f"'{folder}/meta/info.json' has no '{sorted(lacking)[0]}'.", "repair the data set")
        features = info["features"]
        for name, feature in features.items():
            if not {"dtype", "shape"} <= set(feature):
                raise DataError(f"'{folder}/meta/info.json': feature '{name}' has no dtype or shape.", "repair it")
        read = _read_meta_v3 if version == "v3.0" else _read_meta_v2
        episodes, tasks = read(folder)
        found = conventions.load(convention, CONVENTIONS, _recognise(features), overrides)
        _refuse_misfit(found, features)
        cameras = {
            key: found.cameras.get(key, key.rsplit(".", 1)[-1])
            for key, feature in features.items()
            if feature["dtype"] in ("image", "video") and not _is_depth(feature)
            if not found.cameras or key in found.cameras
        }
        specs = [spec for arm in found.arms for spec in vars(arm).values()] + list(found.proprio)
        used = {spec.split("[")[0] for spec in specs} | set(cameras) | {found.instruction}
        left_out = set(features) - used - set(_INDEX_COLUMNS) - set(language.COLUMNS)
        return cls(folder, info, episodes, tasks, found, encoding, tuple(sorted(left_out)), cameras)

    @property
    def passes_images(self) -> bool:
        return any(self.info["features"][key]["dtype"] == "image" for key in self.cameras)

    @property
    def labelled(self) -> bool:
        return LABELLED in self.episodes_meta.column_names and bool(self._row(0)[LABELLED])

    def fingerprint(self) -> str:
        lengths, files = [], set()
        for position in range(len(self.episodes_meta)):
            row = self._row(position)
            lengths.append((row["episode_index"], row["length"]))
            files |= {self._data_url(row), *self._video_urls(row).values()}
        sizes: dict[str, int] = {}
        for folder in sorted({file.rsplit("/", 1)[0] for file in files}):
            sizes |= storage.file_sizes(folder)
        held = [(self._short(url), sizes.get(url)) for url in sorted(files)]  # one that is missing costs its episodes
        return hashlib.sha256(repr((sorted(self.info.items(), key=str), lengths, held)).encode()).hexdigest()

    def units(self) -> Sequence[Unit]:
        """Runs of episodes of one data file, of about `_FRAMES_PER_UNIT` frames."""
        units: list[Unit] = []
        start = frames = 0
        data_url = ""
        for position in range(len(self.episodes_meta)):
            row = self._row(position)
            url = self._data_url(row)
            if position > start and (frames >= _FRAMES_PER_UNIT or (url != data_url and self._is_v3)):
                units.append(self._unit(len(units), start, position))
                start, frames = position, 0
            frames += row["length"]
            data_url = url
        units.append(self._unit(len(units), start, len(self.episodes_meta)))
        return units

    def _unit(self, index: int, start: int, stop: int) -> Unit:
        first, last = (self._row(position)["episode_index"] for position in (start, stop - 1))
        return Unit(index, f"episodes {first} to {last}", {"start": start, "stop": stop})

    def _rows(self, unit: Unit) -> list[dict[str, Any]]:
        return self.episodes_meta.slice(unit.spec["start"], unit.spec["stop"] - unit.spec["start"]).to_pylist()

    def _row(self, position: int) -> dict[str, Any]:
        return self.episodes_meta.slice(position, 1).to_pylist()[0]

    def episodes(self, unit: Unit) -> Iterator[Episode]:
        reader = _EpisodeReader()
        for row in self._rows(unit):
            url = self._data_url(row)
            try:
                table = reader.read(url, row["episode_index"])
            except DataError as error:
                yield self._all_lost(row, error.message, {self._short(url): error.message})
                continue
            except _DAMAGE as error:
                reason = f"'{self._short(url)}' is not a readable parquet file: {error}"
                yield self._all_lost(row, reason, {self._short(url): reason})
                continue
            if not len(table):
                yield self._all_lost(row, f"'{self._short(url)}' holds no row of this episode", {})
                continue
            try:
                yield self._episode(row, table)
            except DataError as error:
                yield self._all_lost(row, error.message, {})

    def lost(self, unit: Unit, reason: str) -> Iterator[Episode]:
        for row in self._rows(unit):
            yield self._all_lost(row, reason, {unit.name: reason})

    def _all_lost(self, row: Mapping[str, Any], reason: str, damaged: Mapping[str, str]) -> Episode:
        name = self._name(row)
        rejected = [
            Rejected({"episode_id": name, "step": step, "domain": "robot"}, "file", reason)
            for step in range(row["length"])
        ]
        return Episode(name, *self._key(row), rejected=rejected, damaged=damaged)

    def _episode(self, row: Mapping[str, Any], table: pa.Table) -> Episode:
        fps = float(self.info["fps"])
        length = len(table)
        timestamps = table["timestamp"].to_numpy().astype(np.float64) if "timestamp" in table.column_names else None
        if timestamps is None:
            timestamps = np.arange(length) / fps
        columns = {
            name: _to_numpy(table[name]) for name in table.column_names if _is_numeric(table.schema.field(name).type)
        }
        images, missing, damaged = self._images(row, table, timestamps)
        absent = row["length"] - length
        recording = Recording(
            self._name(row),
            columns,
            images,
            instructions=self._instructions(table),
            control_hz=self.convention.control_hz or fps,
            split=self._split(row),
            timestamps_s=timestamps,
            texts=self._texts(row, table, timestamps),
            missing=missing,
        )
        converted = conventions.convert(columns, self.convention)
        episode = build_episode(recording, converted, self.convention, *self._key(row), damaged=damaged)
        if absent <= 0:
            return episode
        reason = f"'{self._short(self._data_url(row))}' lacks this row"
        lost = [
            Rejected({"episode_id": episode.episode_id, "step": length + i, "domain": "robot"}, "file", reason)
            for i in range(absent)
        ]
        return Episode(**{**vars(episode), "rejected": [*episode.rejected, *lost]})

    def _images(
        self, row: Mapping[str, Any], table: pa.Table, timestamps: np.ndarray
    ) -> tuple[dict[str, list[bytes | None]], dict[int, str], dict[str, str]]:
        """(camera -> encoded images, step -> why one is missing, damaged file -> why)."""
        images: dict[str, list[bytes | None]] = {}
        missing: dict[int, str] = {}
        damaged: dict[str, str] = {}
        videos = self._video_urls(row)
        for key, name in self.cameras.items():
            if key not in videos:
                images[name] = _embedded(table, key)
                continue
            start_s = row.get(f"videos/{key}/from_timestamp", 0.0)
            images[name] = []
            short = self._short(videos[key])
            if not np.isfinite(timestamps).all():
                raise DataError("a timestamp is not finite: nobody knows the frames of this episode")
            for step, frame in enumerate(self._frames(videos[key], timestamps + start_s)):
                if isinstance(frame, str):
                    images[name].append(None)
                    missing.setdefault(step, f"'{short}': {frame}")
                    damaged.setdefault(short, frame)
                else:
                    images[name].append(self.encoding(frame))
        return images, missing, damaged

    def _frames(self, url: str, times_s: np.ndarray) -> Iterator[np.ndarray | str]:
        try:
            file = storage.open_reader(url)
        except DataError as error:
            yield from (error.message for _ in times_s)
            return
        with file:
            yield from read_frames(file, times_s.tolist(), _TOLERANCE / float(self.info["fps"]))

    def _instructions(self, table: pa.Table) -> list[str]:
        if self.convention.instruction:
            return [text or "" for text in table[self.convention.instruction].to_pylist()]
        if "task_index" not in table.column_names:
            return [""] * len(table)
        return [self.tasks.get(index, "") for index in table["task_index"].to_pylist()]

    def _texts(self, row: Mapping[str, Any], table: pa.Table, timestamps: np.ndarray) -> dict[str, list[Any]]:
        texts: dict[str, list[Any]] = language.read(table, timestamps, self.labelled)
        if row.get(OWN_FACTS["task"]):
            texts["task"] = [row[OWN_FACTS["task"]]] * len(table)
        return texts

    def _split(self, row: Mapping[str, Any]) -> str:
        if row.get(OWN_FACTS["split"]):
            return str(row[OWN_FACTS["split"]])
        for name, span in (self.info.get("splits") or {}).items():
            start, _, stop = str(span).partition(":")
            if start.isdigit() and stop.isdigit() and int(start) <= row["episode_index"] < int(stop):
                return str(name)
        return "train"

    def _name(self, row: Mapping[str, Any]) -> str:
        return str(row.get(OWN_FACTS["episode_id"]) or f"{self._folder_name}/{row['episode_index']:06d}")

    def _key(self, row: Mapping[str, Any]) -> tuple[str, str]:
        number = row.get("episode_id")
        return str(row.get("file_path") or self._folder_name), str(row["episode_index"] if number is None else number)

    @property
    def _folder_name(self) -> str:
        return self.folder.rstrip("/").rsplit("/", 1)[-1]

    @property
    def _is_v3(self) -> bool:
        return self.info["codebase_version"] == "v3.0"

    def _short(self, url: str) -> str:
        return url.removeprefix(self.folder).lstrip("/")

    def _data_url(self, row: Mapping[str, Any]) -> str:
        return self._url(self.info["data_path"], row, "data", "")

    def _video_urls(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Camera key -> file, for the cameras that are video."""
        return {
            key: self._url(self.info["video_path"], row, f"videos/{key}", key)
            for key in self.cameras
            if self.info["features"][key]["dtype"] == "video"
        }

    def _url(self, template: str, row: Mapping[str, Any], where: str, video_key: str) -> str:
        index = row["episode_index"]
        return storage.join(
            self.folder,
            template.format(
                episode_index=index,
                episode_chunk=index // int(self.info.get("chunks_size", 1000)),
                chunk_index=row.get(f"{where}/chunk_index"),
                file_index=row.get(f"{where}/file_index"),
                video_key=video_key,
            ),
        )


def _recognise(features: Mapping[str, Any]) -> Convention | None:
    """Only what `dualvla export` wrote says by its columns what its numbers mean."""
    if {"observation.ee_pose", "observation.gripper", "observation.state", "action"} <= set(features):
        return dualvla_lerobot(int(features["observation.gripper"]["shape"][0]))
    return None


def _refuse_misfit(convention: Convention, features: Mapping[str, Any]) -> None:
    """A convention that no episode can meet, found before any is read. Raises: DataError naming the column."""
    numbers = {
        name: np.zeros((1, int(np.prod(feature["shape"]))))
        for name, feature in features.items()
        if feature["dtype"] not in ("image", "video", "string", "language")
    }
    conventions.convert(numbers, convention)


def _is_depth(feature: Mapping[str, Any]) -> bool:
    info = feature.get("info") or feature.get("video_info") or {}
    return bool(info.get("is_depth_map") or info.get("video.is_depth_map"))


def _read_meta_v3(folder: str) -> tuple[pa.Table, dict[int, str]]:
    parts = []
    for chunk in storage.list_folders(storage.join(folder, "meta", "episodes")):
        for url in storage.list_files(chunk, ".parquet"):
            with storage.open_reader(url) as content:
                file = _parquet(url, content)
                kept = [name for name in file.schema_arrow.names if not name.startswith("stats/")]
                parts.append(file.read(columns=kept))
    if not sum(len(part) for part in parts):
        raise DataError(f"'{folder}/meta/episodes' holds no episodes.", "fetch the folder again")
    table = dataset.read_table(storage.join(folder, "meta", "tasks.parquet"))
    text = next((name for name in ("task", "__index_level_0__") if name in table.column_names), None)
    if text is None or "task_index" not in table.column_names:
        raise DataError(f"'{folder}/meta/tasks.parquet' has no task texts.", "fetch the folder again")
    tasks = dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))
    return _sorted(folder, pa.concat_tables(parts, promote_options="default"), _INDICES_V3), tasks


def _read_meta_v2(folder: str) -> tuple[pa.Table, dict[int, str]]:
    episodes = _json_lines(storage.join(folder, "meta", "episodes.jsonl"))
    tasks = _json_lines(storage.join(folder, "meta", "tasks.jsonl"))
    if not episodes:
        raise DataError(f"'{folder}/meta/episodes.jsonl' holds no episodes.", "fetch the folder again")
    if not all({"task_index", "task"} <= set(row) for row in tasks):
        raise DataError(f"'{folder}/meta/tasks.jsonl' has no task texts.", "fetch the folder again")
    return _sorted(folder, pa.Table.from_pylist(episodes), ()), {row["task_index"]: row["task"] for row in tasks}


def _sorted(folder: str, episodes: pa.Table, needed: Sequence[str]) -> pa.Table:
    lacking = sorted({"episode_index", "length", *needed} - set(episodes.column_names))
    if lacking:
        raise DataError(f"The episodes of '{folder}/meta' have no '{lacking[0]}'.", "repair the data set")
    return episodes.sort_by("episode_index")


def _json(url: str) -> dict[str, Any]:
    try:
        return json.loads(storage.read_bytes(url))
    except ValueError as error:
        raise DataError(f"'{url}' is not valid JSON: {error}.", "fetch the folder again") from error


def _json_lines(url: str) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in storage.read_bytes(url).splitlines() if line.strip()]
    except ValueError as error:
        raise DataError(f"'{url}' is not valid JSON: {error}.", "fetch the folder again") from error


def _parquet(url: str, file: Any) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except _DAMAGE as error:
        raise DataError(f"'{url}' is not a readable parquet file: {error}.", "fetch it again") from error


class _EpisodeReader:
    """Reads the rows of one episode after the other, and of a file only the row groups that may hold them.

    What was read last is held: where a row group holds many episodes it is read once, not once for each.
    """

    def __init__(self) -> None:
        self._held: tuple[str, list[int]] | None = None
        self._table: pa.Table | None = None

    def read(self, url: str, episode_index: int) -> pa.Table:
        """In frame order. Raises: DataError, ArrowInvalid or OSError if the file is missing or damaged."""
        with storage.open_reader(url) as content:
            file = pq.ParquetFile(content)
            groups = _row_groups(url, file, episode_index)
            if self._table is None or self._held != (url, groups):
                self._table, self._held = file.read_row_groups(groups), (url, groups)
        table = self._table.filter(pc.equal(self._table["episode_index"], episode_index))
        return table.sort_by("frame_index") if "frame_index" in table.column_names else table


def _row_groups(url: str, file: pq.ParquetFile, episode_index: int) -> list[int]:
    """Those that may hold rows of the episode."""
    leaves = [file.schema.column(i).path for i in range(len(file.schema))]
    if "episode_index" not in leaves:
        raise DataError(f"'{url}' has no column 'episode_index'.", "repair the data set")
    groups = []
    for group in range(file.num_row_groups):
        statistics = file.metadata.row_group(group).column(leaves.index("episode_index")).statistics
        known = statistics is not None and statistics.has_min_max
        if not known or statistics.min <= episode_index <= statistics.max:
            groups.append(group)
    return groups


def _is_numeric(kind: pa.DataType) -> bool:
    while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """float64 [T] or [T, D]; a null is NaN. Raises: DataError if the rows differ in length."""
    try:
        return np.array(column.to_pylist(), dtype=np.float64)
    except ValueError as error:
        raise DataError(f"A column's rows differ in length: {error}.", "repair the source") from error


def _embedded(table: pa.Table, key: str) -> list[bytes | None]:
    """The bytes of an image column as they are ({bytes, path} of Hugging Face, or plain binary)."""
    if key not in table.column_names:
        raise DataError(f"There is no image column '{key}'.", "check meta/info.json")
    values = table[key].to_pylist()
    return [value["bytes"] if isinstance(value, dict) else value for value in values]
