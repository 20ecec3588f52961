"""Small sources of robot data, written by means other than our own readers and writers: protobuf, pyarrow, PyAV."""

from __future__ import annotations

import io
import json
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image

SIZE = 32


def picture(episode: int, step: int, camera: int = 0, size: int = SIZE) -> np.ndarray:
    """A smooth picture (videos and JPEG keep it well) in which a bright square moves: uint8 [size, size, 3]."""
    ramp = np.linspace(40, 160, size, dtype=np.float64)
    image = np.stack([ramp[:, None] + 0 * ramp, 0 * ramp[:, None] + ramp, np.full((size, size), 60.0)], axis=-1)
    at = (4 * step + 3 * episode) % (size - 10)
    image[at : at + 10, 8 * camera : 8 * camera + 10] = (220, 220, 200)
    return image.astype(np.uint8)


def jpeg(image: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, format="JPEG", quality=90)
    return sink.getvalue()


def poses(steps: int, seed: int = 0) -> np.ndarray:
    """x, y, z (m), roll, pitch, yaw (rad) of a smooth motion, float32 [steps, 6]."""
    phase = np.linspace(0, 2, steps)[:, None] + np.arange(6) + seed
    return (np.array([0.1, 0.1, 0.1, 0.5, 0.4, 0.6]) * np.sin(phase) + np.array([0.3, 0, 0.2, 0, 0, 0])).astype(
        np.float32
    )


# --- TFRecord: tf.train.Example as protobuf itself serializes it ---


def _example_class() -> Any:
    """tf.train.Example, from its public definition (field names and numbers)."""
    file = descriptor_pb2.FileDescriptorProto(name="example_for_tests.proto", package="tf_tests", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(name: str, *fields: tuple[str, int, int, int, str]) -> Any:
        made = file.message_type.add(name=name)
        for field, number, label, kind, type_name in fields:
            made.field.add(name=field, number=number, label=label, type=kind, type_name=type_name or None)
        return made

    repeated, single = kinds.LABEL_REPEATED, kinds.LABEL_OPTIONAL
    message("BytesList", ("value", 1, repeated, kinds.TYPE_BYTES, ""))
    message("FloatList", ("value", 1, repeated, kinds.TYPE_FLOAT, ""))
    message("Int64List", ("value", 1, repeated, kinds.TYPE_INT64, ""))
    feature = message(
        "Feature",
        ("bytes_list", 1, single, kinds.TYPE_MESSAGE, ".tf_tests.BytesList"),
        ("float_list", 2, single, kinds.TYPE_MESSAGE, ".tf_tests.FloatList"),
        ("int64_list", 3, single, kinds.TYPE_MESSAGE, ".tf_tests.Int64List"),
    )
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = message("Features", ("feature", 1, repeated, kinds.TYPE_MESSAGE, ".tf_tests.Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.field.add(name="key", number=1, label=single, type=kinds.TYPE_STRING)
    entry.field.add(name="value", number=2, label=single, type=kinds.TYPE_MESSAGE, type_name=".tf_tests.Feature")
    entry.options.map_entry = True
    message("Example", ("features", 1, single, kinds.TYPE_MESSAGE, ".tf_tests.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tf_tests.Example"))


Example = _example_class()


def serialize(features: dict[str, Any]) -> bytes:
    """Lists of bytes, and float or int arrays, as one tf.train.Example."""
    example = Example()
    for key, values in features.items():
        if isinstance(values, list):
            example.features.feature[key].bytes_list.value.extend(values)
        elif np.asarray(values).dtype.kind == "f":
            example.features.feature[key].float_list.value.extend(np.ravel(values).tolist())
        else:
            example.features.feature[key].int64_list.value.extend(np.ravel(values).astype(int).tolist())
    return example.SerializeToString(deterministic=True)


def crc32c(data: bytes) -> int:
    """Bit by bit, from the definition of the polynomial (Castagnoli)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def tfrecord(records: list[bytes]) -> bytes:
    def masked(data: bytes) -> bytes:
        crc = crc32c(data)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    parts = []
    for record in records:
        length = struct.pack("<Q", len(record))
        parts += [length, masked(length), record, masked(record)]
    return b"".join(parts)


def _flags(steps: int) -> dict[str, Any]:
    first, last = np.arange(steps) == 0, np.arange(steps) == steps - 1
    return {"steps/is_first": first.astype(int), "steps/is_last": last.astype(int), "steps/reward": last * 1.0}


def bridge_episode(episode: int, steps: int, file_path: str) -> dict[str, Any]:
    state = np.concatenate([poses(steps, episode), np.linspace(1, 0, steps)[:, None]], axis=1)
    gripper = np.where(np.arange(steps) < steps // 2, 1.0, 0.0)
    return {
        **_flags(steps),
        "steps/observation/image_0": [jpeg(picture(episode, step)) for step in range(steps)],
        "steps/observation/state": state.astype(np.float32),
        "steps/action": np.concatenate([np.full((steps, 6), 0.01), gripper[:, None]], axis=1).astype(np.float32),
        "steps/language_instruction": [b"put the spoon on the cloth"] * steps,
        "episode_metadata/file_path": [file_path.encode()],
        "episode_metadata/episode_id": np.array([episode]),
    }


def fractal_episode(episode: int, steps: int) -> dict[str, Any]:
    position = poses(steps, episode)[:, :3]
    half = np.linspace(0, 0.4, steps)[:, None]
    quaternion = np.concatenate([0 * half, 0 * half, np.sin(half), np.cos(half)], axis=1)  # turns about z
    closing = np.zeros(steps)
    closing[steps // 2] = 1.0
    return {
        **_flags(steps),
        "steps/observation/image": [jpeg(picture(episode, step)) for step in range(steps)],
        "steps/observation/base_pose_tool_reached": np.concatenate([position, quaternion], axis=1).astype(np.float32),
        "steps/observation/gripper_closed": np.linspace(0, 1, steps).astype(np.float32),
        "steps/observation/natural_language_instruction": [b"pick coke can"] * steps,
        "steps/action/world_vector": np.tile([0.01, 0.0, -0.02], (steps, 1)).astype(np.float32),
        "steps/action/rotation_delta": np.tile([0.0, 0.0, 0.1], (steps, 1)).astype(np.float32),
        "steps/action/gripper_closedness_action": closing.astype(np.float32),
    }


def write_bridge(folder: Path, files: int = 2, episodes: int = 2, steps: int = 8) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        records = [
            serialize(bridge_episode(number * episodes + i, steps, f"/bridge/{number}.npy")) for i in range(episodes)
        ]
        name = f"bridge_dataset-train.tfrecord-{number:05d}-of-{files:05d}"
        (folder / name).write_bytes(tfrecord(records))


# --- LeRobot ---


def write_video(path: Path, frames: list[np.ndarray], fps: int, faststart: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"movflags": "+faststart"} if faststart else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "12", "g": "4"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


BRIDGE_FEATURES = {
    "observation.state": {
        "dtype": "float32",
        "shape": [8],
        "names": ["x", "y", "z", "roll", "pitch", "yaw", "pad", "gripper"],
    },
    "action": {"dtype": "float32", "shape": [7], "names": ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]},
    "next.reward": {"dtype": "float32", "shape": [1], "names": None},
}


def lerobot_frames(episode: int, steps: int, fps: int, first_index: int) -> dict[str, Any]:
    state = np.concatenate([poses(steps, episode), np.zeros((steps, 1)), np.linspace(1, 0, steps)[:, None]], axis=1)
    action = np.concatenate([np.diff(state[:, :6], axis=0, append=state[-1:, :6]), state[:, 7:]], axis=1)
    return {
        "observation.state": pa.array(list(state.astype(np.float32)), type=pa.list_(pa.float32(), 8)),
        "action": pa.array(list(action.astype(np.float32)), type=pa.list_(pa.float32(), 7)),
        "next.reward": pa.array(np.zeros(steps, np.float32)),
        "timestamp": pa.array((np.arange(steps) / fps).astype(np.float32)),
        "frame_index": pa.array(np.arange(steps)),
        "episode_index": pa.array(np.full(steps, episode)),
        "index": pa.array(np.arange(first_index, first_index + steps)),
        "task_index": pa.array(np.full(steps, episode % 2)),
    }


TASKS = ["put the spoon on the cloth", "open the drawer"]


def _info(version: str, fps: int, cameras: list[str], episodes: int, frames: int, **paths: str) -> dict[str, Any]:
    video = {"dtype": "video", "shape": [SIZE, SIZE, 3], "names": ["height", "width", "channels"]}
    return {
        "codebase_version": version, "robot_type": "widowx", "fps": fps, "chunks_size": 1000,
        "total_episodes": episodes, "total_frames": frames, "total_tasks": len(TASKS),
        "splits": {"train": f"0:{episodes}"}, **paths,
        "features": BRIDGE_FEATURES | {f"observation.images.{camera}": video for camera in cameras},
    }  # fmt: skip


def write_lerobot_v21(folder: Path, episodes: int = 3, steps: int = 8, fps: int = 5, cameras: int = 2) -> None:
    """One parquet and one mp4 a camera for each episode."""
    names = [f"image_{i}" for i in range(cameras)]
    (folder / "meta").mkdir(parents=True)
    rows = []
    for episode in range(episodes):
        path = folder / f"data/chunk-000/episode_{episode:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(lerobot_frames(episode, steps, fps, episode * steps)), path)
        for number, camera in enumerate(names):
            write_video(
                folder / f"videos/chunk-000/observation.images.{camera}/episode_{episode:06d}.mp4",
                [picture(episode, step, number) for step in range(steps)],
                fps,
            )
        rows.append({"episode_index": episode, "tasks": [TASKS[episode % 2]], "length": steps})
    info = _info(
        "v2.1", fps, names, episodes, episodes * steps,
        data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        video_path="videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    )  # fmt: skip
    (folder / "meta/info.json").write_text(json.dumps(info))
    (folder / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = [{"task_index": i, "task": task} for i, task in enumerate(TASKS)]
    (folder / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))


def write_lerobot_v3(
    folder: Path, files: int = 2, episodes: int = 2, steps: int = 8, fps: int = 5, cameras: int = 1
) -> None:
    """`files` data files and videos of `episodes` each; the first video also holds the last file's first episode."""
    names = [f"image_{i}" for i in range(cameras)]
    total = files * episodes
    meta: list[dict[str, Any]] = []
    clips: dict[int, list[int]] = {file: [] for file in range(files)}
    for episode in range(total):
        file = episode // episodes
        video = 0 if episode == (files - 1) * episodes else file
        clips[video].append(episode)
        row: dict[str, Any] = {
            "episode_index": episode, "tasks": [TASKS[episode % 2]], "length": steps,
            "data/chunk_index": 0, "data/file_index": file,
            "dataset_from_index": episode * steps, "dataset_to_index": (episode + 1) * steps,
        }  # fmt: skip
        for camera in names:
            start = (len(clips[video]) - 1) * steps / fps
            key = f"videos/observation.images.{camera}"
            row |= {f"{key}/chunk_index": 0, f"{key}/file_index": video}
            row |= {f"{key}/from_timestamp": start, f"{key}/to_timestamp": start + steps / fps}
        meta.append(row)
    for file in range(files):
        tables = [
            pa.table(lerobot_frames(e, steps, fps, e * steps)) for e in range(file * episodes, (file + 1) * episodes)
        ]
        path = folder / f"data/chunk-000/file-{file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(tables), path)
        for number, camera in enumerate(names):
            frames = [picture(episode, step, number) for episode in clips[file] for step in range(steps)]
            write_video(folder / f"videos/observation.images.{camera}/chunk-000/file-{file:03d}.mp4", frames, fps)
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(meta), folder / "meta/episodes/chunk-000/file-000.parquet")
    tasks = pa.table({"task_index": list(range(len(TASKS))), "task": TASKS})
    pq.write_table(tasks, folder / "meta/tasks.parquet")
    info = _info(
        "v3.0", fps, names, total, total * steps,
        data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        video_path="videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    )  # fmt: skip
    (folder / "meta/info.json").write_text(json.dumps(info))
