"""The files of an evaluation folder (contract.md): what is written of each episode, and reading it back.

    episodes.parquet               one row an episode, sorted, never two for one key
    trajectories/<episode>.parquet one row a step, and a closing row without action
    videos/<episode>.mp4
    frames/<episode>.parquet       pictures that a judge has taken out of a film
    summary.json                   rates, means, pairs, termination rule, conventions, versions
    parts/<episode>.parquet        its row of episodes.parquet: the sweep's durable progress
    machines/*.json                what simulated: versions and drivers

<episode> is <policy>-<task>[-<variant>]-<number>[-s<seed>].

Knows the records of a rollout and files; knows nothing of Ray or of judges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dualvla.io import dataset, storage
from dualvla_eval.frames import Frames
from dualvla_eval.rollout import EpisodeResult
from dualvla_eval.suites import Episode

EPISODES = "episodes.parquet"
ANSWERS = "answers.parquet"
SUMMARY = "summary.json"
KIND = "evaluation"
_READERS = 16  # at once, of small files that may be in an object store
_STATE_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"))

EPISODE_SCHEMA = pa.schema(
    [
        ("suite", pa.string()),
        ("task", pa.string()),
        ("variant", pa.string()),
        ("episode_id", pa.int64()),
        ("seed", pa.int64()),  # of the policy's randomness
        ("scene_seed", pa.int64()),
        ("policy", pa.string()),
        ("policy_kind", pa.string()),
        ("instruction", pa.string()),
        ("success", pa.bool_()),  # by the sweep's termination rule
        ("first_success", pa.int32()),  # steps until success first held, null: never
        ("steps", pa.int32()),
        ("stop_reason", pa.string()),
        ("failure", pa.string()),
        ("reasoning_steps", pa.int32()),  # steps at which text was newly generated
        ("reasoning_tokens", pa.int32()),
        ("replies", pa.int32()),  # how often the policy was asked
        ("infer_ms", pa.float64()),  # mean over the replies, amortised over the batch
        ("wall_s", pa.float64()),
        ("wait_s", pa.float64()),  # of it: waiting for the policy
        ("video", pa.string()),
    ]
)
EPISODE_KEY = ("policy", "task", "variant", "episode_id", "seed")

TRAJECTORY_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("action", pa.list_(pa.float32())),  # null on the closing row
        ("ee_pose", pa.list_(pa.float64())),
        ("gripper", pa.list_(pa.float64())),
        ("reasoning", pa.string()),
        ("keyframe", pa.bool_()),
        ("reasoning_tokens", pa.int32()),
        ("events", pa.list_(pa.string())),
        ("state", pa.string()),  # JSON of the simulator's privileged state before the action
        ("infer_ms", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Trajectory:
    """A recorded episode: its row of episodes.parquet and its T steps.

    actions: float32 [T, D]. Poses and states have one more entry, where the last action led: ee_pose float64 [T + 1, 6]
    (m, rad), gripper float64 [T + 1, arms], states T + 1 dicts. reasoning, keyframe, events: T entries. frames: its
    film, None if it was not filmed.
    """

    row: Mapping[str, Any]
    actions: np.ndarray
    ee_pose: np.ndarray
    gripper: np.ndarray
    states: tuple[Mapping[str, Any], ...]
    reasoning: tuple[str | None, ...]
    keyframe: tuple[bool, ...]
    events: tuple[tuple[str, ...], ...]
    frames: Frames | None = None

    @property
    def num_steps(self) -> int:
        return len(self.actions)


def stem(policy: str, task: str, variant: str, episode_id: int, seed: int) -> str:
    """File name, without its ending, of what belongs to one episode."""
    middle = task if variant == "base" else f"{task}-{variant}"
    return f"{policy}-{middle}-{episode_id:04d}" + (f"-s{seed}" if seed else "")


def trajectory_url(folder: str, row: Mapping[str, Any]) -> str:
    return storage.join(folder, "trajectories", f"{row_stem(row)}.parquet")


def row_stem(row: Mapping[str, Any]) -> str:
    return stem(*(row[name] for name in EPISODE_KEY))


def part_url(folder: str, name: str) -> str:
    return storage.join(folder, "parts", f"{name}.parquet")


def episode_row(result: EpisodeResult, policy: str, kind: str, seed: int, video: str | None) -> dict[str, Any]:
    waits = [s.infer_ms for s in result.steps if s.infer_ms is not None]
    return _row(
        result.episode, policy, kind, seed,
        instruction=result.instruction,
        success=result.success,
        first_success=result.first_success,
        steps=result.num_steps,
        stop_reason=result.stop_reason,
        failure=result.failure,
        reasoning_steps=sum(s.keyframe for s in result.steps),
        reasoning_tokens=sum(s.reasoning_tokens for s in result.steps),
        replies=len(waits),
        infer_ms=float(np.mean(waits)) if waits else None,
        wall_s=result.wall_s,
        wait_s=result.wait_s,
        video=video,
    )  # fmt: skip


def crashed_row(episode: Episode, policy: str, seed: int, stop_reason: str, failure: str) -> dict[str, Any]:
    """The row of an episode that took its process along: counted as not solved, with nothing recorded."""
    return _row(
        episode, policy, "unknown", seed,
        instruction="", success=False, first_success=None, steps=0, stop_reason=stop_reason, failure=failure,
        reasoning_steps=0, reasoning_tokens=0, replies=0, infer_ms=None, wall_s=0.0, wait_s=0.0, video=None,
    )  # fmt: skip


def _row(episode: Episode, policy: str, kind: str, seed: int, **columns: Any) -> dict[str, Any]:
    return {
        "suite": episode.suite,
        "task": episode.task,
        "variant": episode.variant,
        "episode_id": episode.episode_id,
        "seed": seed,
        "scene_seed": episode.seed,
        "policy": policy,
        "policy_kind": kind,
        **columns,
    }


def trajectory_table(result: EpisodeResult) -> pa.Table:
    rows = [
        {
            "step": s.step,
            "action": s.action,
            "ee_pose": s.ee_pose,
            "gripper": s.gripper,
            "reasoning": s.reasoning,
            "keyframe": s.keyframe,
            "reasoning_tokens": s.reasoning_tokens,
            "events": s.events,
            "state": _STATE_JSON.encode(s.state),
            "infer_ms": s.infer_ms,
        }
        for s in result.steps
    ]
    return pa.Table.from_pylist(rows, schema=TRAJECTORY_SCHEMA)


def read_trajectory(folder: str, row: Mapping[str, Any]) -> Trajectory:
    """Raises: DataError if its file is missing or damaged."""
    frames = None
    if row["video"] is not None:
        kept = storage.join(folder, "frames", f"{row_stem(row)}.parquet")
        frames = Frames(storage.join(folder, row["video"]), kept)
    return load_trajectory(trajectory_url(folder, row), row, frames)


def load_trajectory(url: str, row: Mapping[str, Any], frames: Frames | None) -> Trajectory:
    """Raises: DataError if the file is missing or damaged."""
    steps = dataset.read_table(url, TRAJECTORY_SCHEMA.names).to_pylist()
    acted = steps[:-1]
    return Trajectory(
        row=row,
        actions=np.array([s["action"] for s in acted], dtype=np.float32).reshape(len(acted), -1),
        ee_pose=np.array([s["ee_pose"] for s in steps], dtype=np.float64),
        gripper=np.array([s["gripper"] for s in steps], dtype=np.float64),
        states=tuple(json.loads(s["state"]) for s in steps),
        reasoning=tuple(s["reasoning"] for s in acted),
        keyframe=tuple(s["keyframe"] for s in acted),
        events=tuple(tuple(s["events"]) for s in acted),
        frames=frames,
    )


def merge_parts(folder: str, names: Sequence[str], schema: pa.Schema, key: Sequence[str]) -> pa.Table:
    """The rows of all parts, sorted by `key`. Equal parts give an equal table, whoever wrote them in whatever order."""
    with ThreadPoolExecutor(_READERS) as readers:
        table = pa.concat_tables(
            readers.map(lambda name: dataset.read_table(part_url(folder, name), schema.names), names)
        )
    return table.sort_by([(name, "ascending") for name in key])


def write_rows(url: str, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    dataset.write_table(url, rows_table(rows, schema))


def rows_table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist([dict(r) for r in rows], schema=schema)


def write_json(url: str, value: Mapping[str, Any]) -> None:
    storage.write_bytes(url, (json.dumps(value, indent=2) + "\n").encode())


def read_json(url: str) -> dict[str, Any]:
    return json.loads(storage.read_bytes(url))


def read_machines(folder: str) -> list[dict[str, Any]]:
    """What the episodes were simulated on, each kind of machine once."""
    return [read_json(url) for url in sorted(storage.list_files(storage.join(folder, "machines"), ".json"))]


def has_trajectory(row: Mapping[str, Any]) -> bool:
    """False for an episode that took its process along: nothing of it was recorded."""
    return row["stop_reason"] not in ("crashed", "stalled")


def read_episodes(folder: str) -> list[dict[str, Any]]:
    return dataset.read_table(storage.join(folder, EPISODES), EPISODE_SCHEMA.names).to_pylist()
