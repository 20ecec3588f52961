"""`dualvla export --format lerobot`: a data set folder as a LeRobotDataset v3, of any size, on Ray.

A part of the data set becomes one data file and one video a camera, so parts are written apart from each other; what
they have in common (metadata, tasks, statistics) is written last, `meta/info.json` at the very end: before it, LeRobot
sees no data set. Knows LeRobot's layout; what the language columns hold is in `sources/language.py`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dualvla import config as configs
from dualvla.errors import DataError, UsageError
from dualvla.io import dataset, manifest, storage
from dualvla.schema import ACTION_SPACES
from dualvla_pipelines import lerobot_stats
from dualvla_pipelines.parallel import run_each
from dualvla_pipelines.sources import language
from dualvla_pipelines.sources.lerobot import LABELLED, OWN_FACTS

KIND = "lerobot"
_PROGRESS = "progress"
_CHUNK_FILES = 1000
_EPISODES_PER_META_FILE = 5000
_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_META_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_SCALARS = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
_POSE_NAMES = ("x_m", "y_m", "z_m", "roll_rad", "pitch_rad", "yaw_rad")
_KEYFRAME_EVERY = 2  # frames, as LeRobot itself encodes: random access decodes at most one more
_SAME_TIME_S = 1e-3


@dataclass(frozen=True)
class ExportConfig:
    """images: `video` (H.264, constant rate factor `crf`) or `embedded` (the encoded images as they are)."""

    images: Literal["video", "embedded"] = "video"
    crf: int = 18
    robot_type: str = "unknown"

    def __post_init__(self) -> None:
        if not 0 <= self.crf <= 51:
            raise UsageError(f"crf {self.crf} is not in 0 to 51.", "18 is close to lossless")


def export(source: str, out: str, config: ExportConfig, workers: int | None = None) -> dict[str, Any]:
    """Writes the robot episodes of the data set `source` as a LeRobotDataset v3 to `out`.

    Rows of domain multimodal have no place in LeRobot: they are counted as left out. Returns counts.
    Raises: DataError if episodes differ in rate, cameras, image size, arms or action space: LeRobot has one of each.
    """
    data = dataset.open_dataset(source)
    settings, inputs = configs.to_dict(config), manifest.input_digests({"data": source})
    skipped = not manifest.begin(out, KIND, settings, inputs)
    if not skipped:
        _export(data, out, config, workers, settings, inputs)
    _clear_progress(out)
    found = manifest.require(out, KIND)
    counts = ("episodes", "rows_in", "rows_out", "rows_left_out", "timestamps_made_uniform")
    return {"out": out, "skipped": skipped, **{name: found[name] for name in counts}}


def _export(
    data: dataset.Dataset,
    out: str,
    config: ExportConfig,
    workers: int | None,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> None:
    surveys = dict(run_each(survey_part, data.files, workers, "surveying (parts)", _poison))
    tasks = {text: i for i, text in enumerate(dict.fromkeys(t for url in data.files for t in surveys[url].tasks))}
    jobs: list[Job] = []
    first_episode = first_frame = 0
    for url in data.files:
        survey = surveys[url]
        if survey.episodes:
            jobs.append(Job(len(jobs), url, first_episode, first_frame, {text: tasks[text] for text in survey.tasks}))
        first_episode += survey.episodes
        first_frame += survey.robot_rows
    if not jobs:
        raise DataError(f"'{data.folder}' holds no robot episodes.", "LeRobot has no place for questions alone")
    shape = describe(next(_episodes(dataset.read_table(jobs[0].url))), config)

    work = PartExport(out, config, shape)
    for _ in run_each(work, jobs, workers, "exporting (parts)", work.give_up):
        pass
    made_uniform = _write_meta(out, work, [job.file for job in jobs], tasks, shape, first_episode, first_frame)
    manifest.finish(
        out, KIND, settings, inputs,
        episodes=first_episode, rows_in=data.manifest["rows_out"], rows_out=first_frame,
        rows_left_out=data.manifest["rows_out"] - first_frame, timestamps_made_uniform=made_uniform,
    )  # fmt: skip


@dataclass(frozen=True)
class Survey:
    episodes: int
    robot_rows: int
    tasks: Sequence[str]


def survey_part(url: str) -> Survey:
    """What must be known of a part before any other can be numbered. Reads three columns."""
    table = _read_columns(url, ["episode_id", "domain", "instruction"])
    robot = table.filter(pc.equal(table["domain"], "robot"))
    tasks = pc.fill_null(robot["instruction"], "").unique().to_pylist()
    return Survey(len(robot["episode_id"].unique()), len(robot), tasks)


def _read_columns(url: str, columns: list[str]) -> pa.Table:
    try:
        with storage.open_reader(url) as file:
            return pq.ParquetFile(file).read(columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"'{url}' is not a readable parquet file: {error}.", "make the data set again") from error


def _poison(item: Any, reason: str) -> Any:
    raise DataError(f"'{item}' cannot be exported: {reason}.", "run `dualvla validate` on the data set")


@dataclass(frozen=True)
class Shape:
    """What all episodes of a LeRobot data set have in common. sizes: camera -> (height, width) of its images."""

    hz: float
    arms: int
    proprio: int
    action_space: str
    sizes: Mapping[str, tuple[int, int]]
    images: Literal["video", "embedded"]

    @property
    def fps(self) -> int | float:
        return int(self.hz) if float(self.hz).is_integer() else self.hz

    @property
    def numbers(self) -> dict[str, tuple[str, str, list[str]]]:
        """LeRobot column -> (step column, dtype, names)."""
        arms = [""] if self.arms == 1 else ["left_", "right_"]
        pose = [arm + name for arm in arms for name in _POSE_NAMES]
        return {
            "observation.state": ("proprio", "float32", [f"state_{i}" for i in range(self.proprio)]),
            "observation.ee_pose": ("ee_pose", "float64", pose),
            "observation.gripper": ("gripper", "float64", [f"{arm}gripper_open" for arm in arms]),
            "action": ("action", "float32", list(ACTION_SPACES[self.action_space].dimensions)),
        }

    def features(self) -> dict[str, Any]:
        """For meta/info.json."""
        kind = "video" if self.images == "video" else "image"
        found: dict[str, Any] = {
            name: {"dtype": dtype, "shape": [len(names)], "names": names}
            for name, (_, dtype, names) in self.numbers.items()
        }
        for camera, (height, width) in self.sizes.items():
            found[camera_key(camera)] = {
                "dtype": kind,
                "shape": [height, width, 3],
                "names": ["height", "width", "channels"],
            }
            if kind == "video":
                found[camera_key(camera)]["info"] = {
                    "video.height": height, "video.width": width, "video.channels": 3, "video.fps": self.fps,
                    "video.codec": "h264", "video.pix_fmt": _pixel_format(height, width), "has_audio": False,
                    "is_depth_map": False,
                }  # fmt: skip
        scalars = {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in _SCALARS.items()}
        return found | language.FEATURES | scalars


def camera_key(camera: str) -> str:
    return f"observation.images.{camera}"


def describe(rows: Sequence[Mapping[str, Any]], config: ExportConfig) -> Shape:
    """The shape of one episode, by its first row. Raises: DataError if it lacks what LeRobot needs."""
    row = rows[0]
    if row["action_space"] not in ACTION_SPACES or not row["ee_pose"] or not row["control_hz"]:
        raise DataError(
            f"Episode '{row['episode_id']}' has no pose, rate or known action space.", "run `dualvla validate` on it"
        )
    return Shape(
        row["control_hz"],
        len(row["ee_pose"]) // 6,
        len(row["proprio"] or ()),
        row["action_space"],
        {name: dataset.decode_image(data).shape[:2] for name, data in row["images"]},
        config.images,
    )


@dataclass(frozen=True)
class Job:
    """One part: its number among the files, the numbers its first episode and frame get, and its tasks' numbers."""

    file: int
    url: str
    first_episode: int
    first_frame: int
    tasks: Mapping[str, int]

    @property
    def place(self) -> dict[str, int]:
        return {"chunk_index": self.file // _CHUNK_FILES, "file_index": self.file % _CHUNK_FILES}


@dataclass(frozen=True)
class PartExport:
    """Writes one data file with its videos, then their record to `out/progress`: that marks the part as done."""

    out: str
    config: ExportConfig
    shape: Shape

    def __call__(self, job: Job) -> None:
        if storage.exists(self.record(job.file)):
            return
        tables, rows = [], []
        videos = {name: Video(self.shape.hz, size, self.config.crf) for name, size in self.shape.sizes.items()}
        moved, frame = 0, job.first_frame
        for number, steps in enumerate(_episodes(dataset.read_table(job.url))):
            self._check(steps)
            episode = job.first_episode + number
            table = self._table(steps, job, episode, frame)
            starts_s = {name: video.seconds for name, video in videos.items()}
            stats = lerobot_stats.of_episode(table, self.shape.numbers)
            for name in self.shape.sizes:
                images = _decoded(steps, name, self.shape.sizes[name])
                if self.config.images == "video":
                    images = [videos[name].add(image) for image in images]
                stats[camera_key(name)] = lerobot_stats.of_images(images)
            tables.append(table)
            rows.append(self._meta(steps, job, episode, frame, starts_s, stats))
            moved += _moved(steps, self.shape.hz)
            frame += len(steps)
        sink = io.BytesIO()
        with pq.ParquetWriter(sink, tables[0].schema, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table)  # one row group an episode, as LeRobot does
        storage.write_bytes(storage.join(self.out, _DATA_PATH.format(**job.place)), sink.getvalue())
        for name, video in videos.items() if self.config.images == "video" else ():
            path = _VIDEO_PATH.format(video_key=camera_key(name), **job.place)
            storage.write_bytes(storage.join(self.out, path), video.close())
        record = {"rows": rows, "timestamps_made_uniform": moved}
        storage.write_bytes(self.record(job.file), json.dumps(record, sort_keys=True).encode())

    def give_up(self, job: Job, reason: str) -> None:
        _poison(job.url, reason)

    def record(self, file: int) -> str:
        return storage.join(self.out, _PROGRESS, f"file-{file:06d}.json")

    def _check(self, steps: Sequence[Mapping[str, Any]]) -> None:
        for row in steps:
            widths = (len(row["ee_pose"] or ()), len(row["gripper"] or ()), len(row["proprio"] or ()))
            wanted = (6 * self.shape.arms, self.shape.arms, self.shape.proprio)
            cameras = tuple(name for name, _ in row["images"])
            for what, found, needed in (
                ("control_hz", row["control_hz"], self.shape.hz),
                ("action space", row["action_space"], self.shape.action_space),
                ("sizes of ee_pose, gripper and proprio", widths, wanted),
                ("cameras", cameras, tuple(self.shape.sizes)),
            ):
                if found != needed:
                    raise DataError(
                        f"Episode '{row['episode_id']}', step {row['step']}: {what} {found} where the first "
                        f"episode has {needed}, and a LeRobot data set has one.",
                        "export such episodes as data sets of their own",
                    )

    def _table(self, steps: Sequence[Mapping[str, Any]], job: Job, episode: int, first_frame: int) -> pa.Table:
        count = len(steps)
        columns: dict[str, pa.Array] = {}
        for name, (ours, dtype, names) in self.shape.numbers.items():
            kind = pa.float32() if dtype == "float32" else pa.float64()
            flat = pa.array([value for row in steps for value in row[ours]], type=kind)
            columns[name] = flat if len(names) == 1 else pa.FixedSizeListArray.from_arrays(flat, len(names))
        if self.config.images == "embedded":
            for camera in self.shape.sizes:
                values = [{"bytes": dict(row["images"])[camera], "path": None} for row in steps]
                columns[camera_key(camera)] = pa.array(values, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        times = (np.arange(count) / self.shape.hz).astype(np.float32)
        columns["timestamp"] = pa.array(times)
        columns["frame_index"] = pa.array(np.arange(count))
        columns["episode_index"] = pa.array(np.full(count, episode))
        columns["index"] = pa.array(np.arange(first_frame, first_frame + count))
        columns["task_index"] = pa.array([job.tasks[row["instruction"] or ""] for row in steps], type=pa.int64())
        return pa.table(columns | language.write(steps, times.tolist()))

    def _meta(
        self,
        steps: Sequence[Mapping[str, Any]],
        job: Job,
        episode: int,
        frame: int,
        starts_s: Mapping[str, float],
        stats: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, Any]:
        count = len(steps)
        row: dict[str, Any] = {
            "episode_index": episode,
            "tasks": list(dict.fromkeys(step["instruction"] or "" for step in steps)),
            "length": count,
            "dataset_from_index": frame,
            "dataset_to_index": frame + count,
            **{f"data/{name}": value for name, value in job.place.items()},
            **{ours: steps[0][name] for name, ours in OWN_FACTS.items()},
            LABELLED: "keep_reasoning" in steps[0],
        }
        for camera, start_s in starts_s.items() if self.config.images == "video" else ():
            key = f"videos/{camera_key(camera)}"
            row |= {f"{key}/{name}": value for name, value in job.place.items()}
            row |= {f"{key}/from_timestamp": start_s, f"{key}/to_timestamp": start_s + count / self.shape.hz}
        return row | {
            f"stats/{feature}/{name}": value for feature, values in stats.items() for name, value in values.items()
        }


def _episodes(table: pa.Table) -> Iterator[list[dict[str, Any]]]:
    """The robot episodes of a part in order, each as its rows."""
    robot = table.filter(pc.equal(table["domain"], "robot"))
    codes = robot["episode_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    borders = np.flatnonzero(np.diff(codes)) + 1
    for start, stop in zip([0, *borders], [*borders, len(codes)], strict=True):
        if stop > start:
            yield robot.slice(start, stop - start).to_pylist()


def _decoded(steps: Sequence[Mapping[str, Any]], camera: str, size: tuple[int, int]) -> list[np.ndarray]:
    images = []
    for row in steps:
        image = dataset.decode_image(dict(row["images"])[camera])
        if image.shape[:2] != size:
            raise DataError(
                f"Episode '{row['episode_id']}', step {row['step']}: '{camera}' is {image.shape[:2]}, not {size}.",
                "a LeRobot camera has one size: export such episodes as data sets of their own",
            )
        images.append(image)
    return images


def _moved(steps: Sequence[Mapping[str, Any]], hz: float) -> int:
    """Steps whose own timestamps are not on the grid of frames that LeRobot requires."""
    start = steps[0]["timestamp_s"] or 0.0
    return sum(abs((row["timestamp_s"] or 0.0) - start - i / hz) > _SAME_TIME_S for i, row in enumerate(steps))


def _pixel_format(height: int, width: int) -> str:
    """4:2:0 is what every player reads, but it needs even sizes."""
    return "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"


class Video:
    """One mp4 in memory. Equal frames give equal bytes: one thread, no times or versions inside."""

    def __init__(self, hz: float, size: tuple[int, int], crf: int):
        self._hz, self._frames = hz, 0
        self._sink = io.BytesIO()
        self._container = av.open(self._sink, "w", format="mp4", options={"fflags": "+bitexact"})
        rate = Fraction(hz).limit_denominator(1001)
        # without x264's macroblock tree: it reads memory nobody wrote, so equal pictures now and then gave other bytes;
        # with a keyframe at every second frame it has next to nothing to look ahead to
        options = {"crf": str(crf), "g": str(_KEYFRAME_EVERY), "bf": "0", "threads": "1", "mbtree": "0"}
        self._stream: Any = self._container.add_stream("libx264", rate=rate, options=options)
        self._stream.height, self._stream.width = size
        self._stream.pix_fmt = _pixel_format(*size)

    @property
    def seconds(self) -> float:
        return self._frames / self._hz

    def add(self, image: np.ndarray) -> np.ndarray:
        """Returns the image, so that one pass serves statistics too."""
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        self._frames += 1
        return image

    def close(self) -> bytes:
        self._container.mux(self._stream.encode())
        self._container.close()
        return self._sink.getvalue()


def _write_meta(
    out: str,
    work: PartExport,
    files: Sequence[int],
    tasks: Mapping[str, int],
    shape: Shape,
    episodes: int,
    frames: int,
) -> int:
    """Everything under `meta/`, info.json last. Returns how many timestamps were moved."""
    moved = written = 0
    total = lerobot_stats.Total()
    splits: list[str] = []
    held: list[dict[str, Any]] = []
    for number in files:
        record = json.loads(storage.read_bytes(work.record(number)))
        moved += record["timestamps_made_uniform"]
        for row in record["rows"]:
            total.add(row)
            splits.append(row[OWN_FACTS["split"]] or "train")
            held.append(row)
        while len(held) >= _EPISODES_PER_META_FILE or (held and number == files[-1]):
            _write_episodes(out, written, held[:_EPISODES_PER_META_FILE])
            held, written = held[_EPISODES_PER_META_FILE:], written + 1
    import pandas as pd

    sink = io.BytesIO()  # LeRobot reads the task texts as the index of a pandas frame
    pd.DataFrame({"task_index": list(tasks.values())}, index=pd.Index(list(tasks), name="task")).to_parquet(sink)
    storage.write_bytes(storage.join(out, "meta/tasks.parquet"), sink.getvalue())
    storage.write_bytes(storage.join(out, "meta/stats.json"), _json(total.result()))
    info = {
        "codebase_version": "v3.0", "robot_type": work.config.robot_type, "fps": shape.fps,
        "total_episodes": episodes, "total_frames": frames, "total_tasks": len(tasks),
        "chunks_size": _CHUNK_FILES, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200,
        "data_path": _DATA_PATH, "video_path": _VIDEO_PATH if work.config.images == "video" else None,
        "splits": _spans(splits), "features": shape.features(),
    }  # fmt: skip
    storage.write_bytes(storage.join(out, "meta/info.json"), _json(info))
    return moved


def _write_episodes(out: str, number: int, rows: Sequence[Mapping[str, Any]]) -> None:
    place = {"chunk_index": number // _CHUNK_FILES, "file_index": number % _CHUNK_FILES}
    table = pa.Table.from_pylist([{**row, **{f"meta/episodes/{k}": v for k, v in place.items()}} for row in rows])
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    storage.write_bytes(storage.join(out, _META_PATH.format(**place)), sink.getvalue())


def _spans(splits: Sequence[str]) -> dict[str, str]:
    """LeRobot's splits are ranges of episodes: those that are not one range are left to `dualvla/split`."""
    spans: dict[str, str] = {}
    for name in dict.fromkeys(splits):
        places = [i for i, split in enumerate(splits) if split == name]
        if places[-1] - places[0] + 1 == len(places):
            spans[name] = f"{places[0]}:{places[-1] + 1}"
    return spans


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=4) + "\n").encode()


def _clear_progress(out: str) -> None:
    for file in storage.list_files(storage.join(out, _PROGRESS)):
        storage.remove(file)
