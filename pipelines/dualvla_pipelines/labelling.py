"""Pruning one table of steps: which rows are fit to be labelled, their labels, and what that does to the text.

Pure: Arrow tables in and out. Knows no files, no Ray, and no rule of pruning itself (`dualvla.pruning` has those).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dualvla.errors import DataError
from dualvla.io.dataset import decode_image
from dualvla.pruning import POSE_DIMS, SceneEventDetector, action_labels_ragged, combine, statistics
from dualvla.schema import DOMAINS, step_schema

_COLUMNS = step_schema().names
_LABELS = [name for name in step_schema(labels=True).names if name not in _COLUMNS]
TALLIED = ("episode_id", "domain", "task", "reasoning", *_LABELS)  # what `tally` reads of the labelled rows
TALLIED_BAD = ("episode_id", "domain", "reason")  # and of the quarantined ones
_FINITE = ("ee_pose", "gripper", "proprio", "action")
_DECODED_BYTES = 64 << 20  # whole episodes are decoded until they fill this: bounds memory, whatever the size of a part


@dataclass(frozen=True)
class Runs:
    """The rows of a table as runs that are kept or quarantined whole: a robot episode, or one multimodal row.

    starts, lengths: int [E]; is_robot: bool [E]; ids: the episode of each run.
    """

    starts: np.ndarray
    lengths: np.ndarray
    is_robot: np.ndarray
    ids: list[str]

    @classmethod
    def of(cls, table: pa.Table) -> Runs:
        ids = pc.fill_null(table["episode_id"], "").combine_chunks()
        codes = pc.dictionary_encode(ids).indices.to_numpy()
        is_robot = _is(table, "domain", "robot")
        opens = ~is_robot
        opens[:1] = True
        opens[1:] |= (codes[1:] != codes[:-1]) | (is_robot[1:] != is_robot[:-1])
        starts = np.flatnonzero(opens)
        return cls(starts, np.diff(starts, append=len(table)), is_robot[starts], ids.take(starts).to_pylist())

    def of_row(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def rows(self, run: int) -> slice:
        return slice(int(self.starts[run]), int(self.starts[run] + self.lengths[run]))

    def to_rows(self, per_run: np.ndarray) -> np.ndarray:
        return np.repeat(per_run, self.lengths)


@dataclass(frozen=True)
class SceneSource:
    """Where scene labels come from. camera: whose images the detector sees (default: each step's first). at_least: how
    large they must be, px to a side (default: as they are; see `decode_image`)."""

    detector: SceneEventDetector
    camera: str | None = None
    at_least: int | None = None


def label_table(table: pa.Table, mode: str, seed: int, scenes: SceneSource | None) -> tuple[pa.Table, pa.Table]:
    """(rows with labels, quarantined rows with a `reason`), both in the order of `table`, image bytes untouched.

    A robot episode with one unfit row is quarantined whole, because its motion has a hole; a multimodal row alone.
    Labels are null on multimodal rows, and scene_label is null everywhere without `scenes` (`action` and `none` need
    none).

    Raises: DataError if columns are missing or the table is labelled already.
    """
    table = _step_columns(table)
    runs = Runs.of(table)
    faults: dict[int, str] = {}  # run -> why it is unfit: the first thing found
    for row, reason in _row_faults(table, runs):
        faults.setdefault(runs.of_row(row), reason)
    scene = np.zeros(len(table), dtype=bool)
    if scenes is not None:
        faults |= _label_scenes(table, runs, faults, scenes, scene)
    fit = np.array([run not in faults for run in range(len(runs.starts))], dtype=bool)
    action = _action_labels(table, runs, fit)

    keep = np.ones(len(table), dtype=bool)
    for run in np.flatnonzero(fit & runs.is_robot).tolist():
        rows = runs.rows(run)
        keep[rows] = combine(scene[rows], action[rows], mode, _episode_seed(seed, runs.ids[run]))

    speechless = runs.to_rows(~runs.is_robot)
    labels = {
        "scene_label": pa.array(scene, mask=speechless | (scenes is None)),
        "action_label": pa.array(action, mask=speechless),
        "keep_reasoning": pa.array(keep),
    }
    good = table
    for name in _LABELS:
        good = good.append_column(name, labels[name])
    if fit.all():  # no copy of the images
        return good, table.slice(0, 0).append_column("reason", pa.array([], type=pa.string()))
    is_good = runs.to_rows(fit)
    reasons = np.array([faults.get(run) for run in range(len(fit))], dtype=object)
    bad = table.filter(~is_good).append_column("reason", pa.array(runs.to_rows(reasons)[~is_good], type=pa.string()))
    return good.filter(is_good), bad


def tally(good: pa.Table, bad: pa.Table | None) -> dict[str, Any]:
    """JSON-ready counts of what `label_table` returned; `merge` adds them up.

    tasks: robot task -> episodes, episodes_without_reasoning, frames, scene_frames and action_frames (where that label
    fires), kept_frames, and words and tokens of their reasoning, before and after. episode_keys: hashes of all
    episodes' names; robot_keys: of the robot ones, the quarantined included.
    """
    robot = good.select(TALLIED).filter(_is(good, "domain", "robot"))
    keep = pc.cast(robot["keep_reasoning"], pa.int64())
    words, tokens = (_count(robot["reasoning"], split) for split in (str.split, statistics.tokens))
    columns = {
        "frames": pa.array(np.ones(len(robot), dtype=np.int64)),
        "scene_frames": pc.fill_null(pc.cast(robot["scene_label"], pa.int64()), 0),
        "action_frames": pc.cast(robot["action_label"], pa.int64()),
        "kept_frames": keep,
        "words_before": words,
        "words_after": pc.multiply(words, keep),
        "tokens_before": tokens,
        "tokens_after": pc.multiply(tokens, keep),
    }
    counted = pa.table({"task": robot["task"], "episode_id": robot["episode_id"], **columns})
    episodes = counted.group_by(["task", "episode_id"], use_threads=False).aggregate([(c, "sum") for c in columns])
    tasks: dict[str, Counter[str]] = {}
    for episode in episodes.to_pylist():
        counts = tasks.setdefault(episode["task"] or "", Counter())
        counts.update({name: episode[f"{name}_sum"] for name in columns})
        counts.update(episodes=1, episodes_without_reasoning=int(episode["kept_frames_sum"] == 0))
    reasons = bad["reason"].to_pylist() if bad is not None else []
    robots = {*_names(good, robots_only=True), *(_names(bad, robots_only=True) if bad is not None else ())}
    return {
        "rows_out": len(good),
        "rows_quarantined": len(reasons),
        "reasons": dict(Counter(reasons)),
        "tasks": {task: dict(counts) for task, counts in tasks.items()},
        "episode_keys": sorted(episode_key(name) for name in _names(good)),
        "robot_keys": sorted(episode_key(name) for name in robots),
    }


def merge(tallies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of several `tally` results, keys sorted. episodes: how many different ones in all."""
    reasons: Counter[str] = Counter()
    tasks: dict[str, Counter[str]] = {}
    for one in tallies:
        reasons.update(one["reasons"])
        for task, counts in one["tasks"].items():
            tasks.setdefault(task, Counter()).update(counts)
    keys = [np.array(one["episode_keys"], dtype=np.uint64) for one in tallies]
    return {
        "rows_out": sum(one["rows_out"] for one in tallies),
        "rows_quarantined": sum(one["rows_quarantined"] for one in tallies),
        "episodes": len(np.unique(np.concatenate(keys))) if keys else 0,
        "reasons": dict(sorted(reasons.items())),
        "tasks": {task: dict(tasks[task]) for task in sorted(tasks)},
    }


def episode_key(episode_id: str) -> int:
    """64 bits that stand for an episode's name where a million names would not fit, and that order them at random."""
    return int.from_bytes(hashlib.blake2b(episode_id.encode(), digest_size=8).digest(), "big")


def _names(table: pa.Table, robots_only: bool = False) -> list[str]:
    ids = table["episode_id"]
    if robots_only:
        ids = ids.filter(_is(table, "domain", "robot"))
    return ids.drop_null().unique().to_pylist()


def _count(texts: pa.ChunkedArray, split: Callable[[str], list[str]]) -> pa.Array:
    """Into how many each text splits, int64, 0 for null. Each different text is split once: most repeat."""
    encoded = texts.combine_chunks().dictionary_encode()
    counts = pa.array([len(split(text)) for text in encoded.dictionary.to_pylist()], type=pa.int64())
    return pc.fill_null(counts.take(encoded.indices), 0)


def _step_columns(table: pa.Table) -> pa.Table:
    if set(_LABELS) & set(table.schema.names):
        raise DataError("These steps are labelled already.", "prune the data set they were made from")
    lacking = [name for name in _COLUMNS if name not in table.schema.names]
    if lacking:
        raise DataError(f"The steps have no column '{lacking[0]}'.", "make the data set with this version")
    return table.select(_COLUMNS)


def _row_faults(table: pa.Table, runs: Runs) -> Iterator[tuple[int, str]]:
    """(row, what makes it unfit), for everything that shows without decoding an image."""
    domains = table["domain"].to_pylist()
    for row in np.flatnonzero(~np.isin(np.array(domains, dtype=object), DOMAINS)):
        yield int(row), f"unknown domain {domains[row]!r}"
    seen: set[str] = set()
    for run, name in enumerate(runs.ids):
        if not name:
            yield int(runs.starts[run]), "no episode_id"
        elif runs.is_robot[run] and name in seen:
            yield int(runs.starts[run]), "the rows of this episode are not next to each other"
        seen.add(name)

    for name in _FINITE:
        column = table[name].combine_chunks()
        finite = np.isfinite(column.flatten().to_numpy(zero_copy_only=False).astype(np.float64))
        for row in np.unique(pc.list_parent_indices(column).to_numpy()[~finite]):
            yield int(row), f"{name} is not finite"

    robot = runs.to_rows(runs.is_robot)
    first = runs.to_rows(runs.starts)
    pose, gripper = _widths(table, "ee_pose"), _widths(table, "gripper")
    for row in np.flatnonzero(robot & ~np.isin(pose, (POSE_DIMS, 2 * POSE_DIMS))):
        yield int(row), f"ee_pose has {pose[row]} numbers, not {POSE_DIMS} per arm"
    for row in np.flatnonzero(robot & (gripper * POSE_DIMS != pose)):
        yield int(row), f"gripper has {gripper[row]} numbers where ee_pose has {pose[row]}"
    for row in np.flatnonzero(robot & (pose != pose[first])):
        yield int(row), "the number of arms changes"

    steps = pc.fill_null(table["step"], -1).to_numpy()
    jumps = robot & (steps != np.roll(steps, 1) + 1)
    jumps[runs.starts] = False
    for row in np.flatnonzero(jumps):
        yield int(row), f"step {steps[row]} follows step {steps[row - 1]}"


def _label_scenes(
    table: pa.Table, runs: Runs, faults: Mapping[int, str], scenes: SceneSource, scene: np.ndarray
) -> dict[int, str]:
    """Fills in `scene` for the robot runs without a fault. Returns the runs whose images cannot be used, with why."""
    unusable: dict[int, str] = {}
    frames: dict[int, np.ndarray] = {}

    def label() -> None:
        for run, labels in zip(frames, scenes.detector(list(frames.values())), strict=True):
            scene[runs.rows(run)] = labels
        frames.clear()

    for run in np.flatnonzero(runs.is_robot).tolist():
        if run in faults:
            continue
        try:
            frames[run] = decode_frames(table["images"][runs.rows(run)], scenes.camera, scenes.at_least)
        except DataError as error:
            unusable[run] = error.message
        if sum(episode.nbytes for episode in frames.values()) >= _DECODED_BYTES:
            label()
    label()
    return unusable


def decode_frames(images: pa.ChunkedArray, camera: str | None = None, at_least: int | None = None) -> np.ndarray:
    """uint8 [N, H, W, 3] of one camera. Raises: DataError on a missing, broken or odd-sized image."""
    frames = []
    for row in images:
        cameras = row.as_py() or []
        data = next((data for name, data in cameras if camera in (None, name)), None)
        if data is None:
            raise DataError("a step has no image" + (f" of camera '{camera}'" if camera else ""))
        frames.append(decode_image(data, at_least))
    if len({frame.shape for frame in frames}) > 1:
        raise DataError("the size of the images changes")
    return np.stack(frames)


def _action_labels(table: pa.Table, runs: Runs, fit: np.ndarray) -> np.ndarray:
    """Eq. 4 on the fit robot runs, False elsewhere, bool [rows]."""
    action = np.zeros(len(table), dtype=bool)
    widths = _widths(table, "ee_pose")
    for width in (POSE_DIMS, 2 * POSE_DIMS):
        chosen = fit & runs.is_robot & (widths[runs.starts] == width)
        rows = runs.to_rows(chosen)
        pose = pc.list_flatten(table["ee_pose"].filter(rows)).to_numpy().reshape(-1, width)
        gripper = pc.list_flatten(table["gripper"].filter(rows)).to_numpy().reshape(-1, width // POSE_DIMS)
        action[rows] = action_labels_ragged(pose, gripper, runs.lengths[chosen])
    return action


def _episode_seed(seed: int, episode_id: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{episode_id}".encode()).digest()[:8], "big")


def _is(table: pa.Table, column: str, value: str) -> np.ndarray:
    return pc.fill_null(pc.equal(table[column], value), False).to_numpy(zero_copy_only=False).astype(bool)


def _widths(table: pa.Table, column: str) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(table[column]), 0).to_numpy()
