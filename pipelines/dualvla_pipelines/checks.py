"""What makes a row unfit, and what makes it doubtful: the rules that `ingest` and `validate` share.

Vectorised over one Arrow table of steps. Knows no files, no Ray and no source.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dualvla.errors import DataError
from dualvla.io.dataset import decode_image
from dualvla.schema import ACTION_SPACES, DOMAINS, step_schema

POSE_DIMS = 6
_NUMBERS = ("timestamp_s", "control_hz", "ee_pose", "gripper", "proprio", "action")


@dataclass(frozen=True)
class Limits:
    """What is plausible: an arm reaches about 2 m and a step moves it millimetres to centimetres."""

    position_m: float = 10.0  # mm for m shows as hundreds
    angle_rad: float = 4.0 * np.pi  # an unwrapped wrist may pass one turn; degrees for radians show as up to 180
    step_m: float = 1.0
    step_rad: float = np.pi + 1e-6  # a rotation vector is never longer
    gripper_slack: float = 0.05  # around [0, 1]
    gripper_spread: float = 0.2  # of a whole data set: less and openings are metres, or the gripper never moves
    rate_hz: tuple[float, float] = (0.5, 1000.0)
    rate_tolerance: float = 0.1  # between timestamps and control_hz


LIMITS = Limits()


@dataclass(frozen=True)
class Finding:
    """One thing wrong. row: of the table, None for what concerns the whole. An `error` makes the row unfit."""

    check: str
    message: str
    row: int | None = None
    severity: Literal["error", "warning"] = "error"


def check_schema(schema: pa.Schema) -> list[Finding]:
    """Missing columns and wrong types; with one of these, `check_rows` cannot run."""
    found = []
    for wanted in step_schema(labels=True):
        at = schema.get_field_index(wanted.name)
        if at < 0:
            if wanted.name in step_schema().names:
                found.append(Finding("schema", f"there is no column '{wanted.name}'"))
        elif schema.field(at).type != wanted.type:
            found.append(Finding("schema", f"'{wanted.name}' is {schema.field(at).type}, not {wanted.type}"))
    return found


def check_rows(table: pa.Table, images: bool = True) -> list[Finding]:
    """Everything wrong with the rows of a table of the step schema, whole episodes in it. images: decode them."""
    episodes = _Episodes.of(table)
    found = [
        *_identity(table, episodes),
        *_finite(table),
        *_widths(table, episodes),
        *_ranges(table, episodes),
        *_order(table, episodes),
        *_rate(table, episodes),
        *_images(table, episodes, images),
    ]
    return sorted(found, key=lambda finding: -1 if finding.row is None else finding.row)


@dataclass(frozen=True)
class _Episodes:
    """opens: bool [rows], where a robot episode or a multimodal row begins; first: int [rows], that row."""

    ids: list[str | None]
    is_robot: np.ndarray
    opens: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, table: pa.Table) -> _Episodes:
        ids = pc.fill_null(table["episode_id"], "").combine_chunks()
        codes = ids.dictionary_encode().indices.to_numpy()
        is_robot = pc.fill_null(pc.equal(table["domain"], "robot"), False).to_numpy(zero_copy_only=False).astype(bool)
        opens = ~is_robot
        opens[:1] = True
        opens[1:] |= (codes[1:] != codes[:-1]) | (is_robot[1:] != is_robot[:-1])
        first = np.maximum.accumulate(np.where(opens, np.arange(len(table)), 0)) if len(table) else np.zeros(0, int)
        return cls(ids.to_pylist(), is_robot, opens, first)

    @property
    def starts(self) -> np.ndarray:
        """Rows at which a robot episode begins."""
        return np.flatnonzero(self.opens & self.is_robot)


def _identity(table: pa.Table, episodes: _Episodes) -> Iterator[Finding]:
    for row, name in enumerate(episodes.ids):
        if not name:
            yield Finding("episode_id", "there is no episode_id", row)
    domains = table["domain"].to_pylist()
    for row, domain in enumerate(domains):
        if domain not in DOMAINS:
            yield Finding("domain", f"domain {domain!r} is none of {', '.join(DOMAINS)}", row)
    seen: set[str | None] = set()
    for row in episodes.starts.tolist():
        if episodes.ids[row] in seen:
            yield Finding("order", "the rows of this episode are not next to each other", row)
        seen.add(episodes.ids[row])


def _finite(table: pa.Table) -> Iterator[Finding]:
    for name in _NUMBERS:
        column = table[name].combine_chunks()
        if pa.types.is_list(column.type):
            values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
            rows = pc.list_parent_indices(column).to_numpy()[~np.isfinite(values)]
        else:
            values = column.to_numpy(zero_copy_only=False).astype(np.float64)
            rows = np.flatnonzero(~np.isfinite(values) & column.is_valid().to_numpy(zero_copy_only=False))
        for row in np.unique(rows).tolist():
            yield Finding("finite", f"{name} is not finite", row)


def _widths(table: pa.Table, episodes: _Episodes) -> Iterator[Finding]:
    pose, gripper, action = (_lengths(table, name) for name in ("ee_pose", "gripper", "action"))
    spaces = table["action_space"].to_pylist()
    for row in np.flatnonzero(episodes.is_robot).tolist():
        if pose[row] not in (POSE_DIMS, 2 * POSE_DIMS):
            yield Finding("dimensions", f"ee_pose has {pose[row]} numbers, not {POSE_DIMS} per arm", row)
        elif gripper[row] * POSE_DIMS != pose[row]:
            yield Finding("dimensions", f"gripper has {gripper[row]} numbers where ee_pose has {pose[row]}", row)
        elif pose[row] != pose[episodes.first[row]]:
            yield Finding("dimensions", "the number of arms changes", row)
        if spaces[row] not in ACTION_SPACES:
            yield Finding("dimensions", f"action_space {spaces[row]!r} is none of {', '.join(ACTION_SPACES)}", row)
        elif action[row] != ACTION_SPACES[spaces[row]].size:
            size = ACTION_SPACES[spaces[row]].size
            yield Finding("dimensions", f"action has {action[row]} numbers, {spaces[row]} has {size}", row)


def _ranges(table: pa.Table, episodes: _Episodes) -> Iterator[Finding]:
    """Units, action range and the gripper convention, by what no robot can do."""
    low, high = -LIMITS.gripper_slack, 1.0 + LIMITS.gripper_slack
    for width in (POSE_DIMS, 2 * POSE_DIMS):
        rows = np.flatnonzero(episodes.is_robot & (_lengths(table, "ee_pose") == width))
        pose = np.abs(_matrix(table, "ee_pose", rows, width)).reshape(len(rows), width // POSE_DIMS, POSE_DIMS)
        far, turned = pose[..., :3].max(axis=(1, 2), initial=0.0), pose[..., 3:].max(axis=(1, 2), initial=0.0)
        for at in np.flatnonzero(far > LIMITS.position_m).tolist():
            yield Finding(
                "units", f"a position is {far[at]:.6g} m from the base: millimetres for metres?", int(rows[at])
            )
        for at in np.flatnonzero(turned > LIMITS.angle_rad).tolist():
            yield Finding("units", f"an angle is {turned[at]:.6g} rad: degrees for radians?", int(rows[at]))
    for arms in (1, 2):
        rows = np.flatnonzero(episodes.is_robot & (_lengths(table, "gripper") == arms))
        opening = _matrix(table, "gripper", rows, arms)
        for at, arm in np.argwhere((opening < low) | (opening > high)).tolist():
            value = opening[at, arm]
            yield Finding("gripper", f"gripper is {value:.6g}, not in [0, 1]: unknown convention", int(rows[at]))
    spaces = np.array(table["action_space"].to_pylist(), dtype=object)
    for name, space in ACTION_SPACES.items():
        is_space = episodes.is_robot & (spaces == name) & (_lengths(table, "action") == space.size)
        rows = np.flatnonzero(is_space)
        action = _matrix(table, "action", rows, space.size).reshape(len(rows), space.size // 7, 7)
        moved = np.linalg.norm(action[..., :3], axis=2).max(axis=1, initial=0.0)
        turned = np.linalg.norm(action[..., 3:6], axis=2).max(axis=1, initial=0.0)
        command = action[..., 6]
        for at in np.flatnonzero(moved > LIMITS.step_m).tolist():
            yield Finding("action range", f"one step moves {moved[at]:.6g} m: millimetres for metres?", int(rows[at]))
        for at in np.flatnonzero(turned > LIMITS.step_rad).tolist():
            yield Finding("action range", f"one step turns {turned[at]:.6g} rad: degrees for radians?", int(rows[at]))
        for at in np.flatnonzero(((command < low) | (command > high)).any(axis=1)).tolist():
            value = command[at][np.argmax(np.abs(command[at] - 0.5))]
            message = f"the gripper command is {value:.6g}, not in [0, 1]: unknown convention"
            yield Finding("gripper", message, int(rows[at]))


def _order(table: pa.Table, episodes: _Episodes) -> Iterator[Finding]:
    steps = pc.fill_null(table["step"], -1).to_numpy().astype(np.int64)
    for row in np.flatnonzero(episodes.is_robot).tolist():
        if episodes.opens[row]:
            if steps[row] != 0:
                yield Finding("gap", f"the episode begins at step {steps[row]}", row)
        elif steps[row] <= steps[row - 1]:
            yield Finding("order", f"step {steps[row]} follows step {steps[row - 1]}", row)
        elif steps[row] != steps[row - 1] + 1:
            yield Finding("gap", f"step {steps[row]} follows step {steps[row - 1]}", row)


def _rate(table: pa.Table, episodes: _Episodes) -> Iterator[Finding]:
    times = _numbers(table, "timestamp_s")
    rates = _numbers(table, "control_hz")
    slowest, fastest = LIMITS.rate_hz
    for start, stop in zip(episodes.starts.tolist(), _stops(episodes), strict=True):
        hz = rates[start]
        if np.isnan(hz) or not slowest <= hz <= fastest:
            yield Finding("control rate", f"control_hz is {hz:.6g}, not in [{slowest}, {fastest}]", start)
            continue
        for row in np.flatnonzero(rates[start:stop] != hz).tolist():
            yield Finding("control rate", f"control_hz changes from {hz:.6g}", start + row)
        passed = np.diff(times[start:stop])
        for row in np.flatnonzero(~(passed > 0)).tolist():
            yield Finding("order", f"timestamp_s does not grow: {passed[row]:+.6g} s", start + row + 1)
        if not len(passed) or not (passed > 0).all():
            continue
        middle = float(np.median(passed))
        if abs(middle * hz - 1.0) > LIMITS.rate_tolerance:
            message = f"timestamps are {middle:.4g} s apart, control_hz says {1.0 / hz:.4g} s"
            yield Finding("control rate", message, start, "warning")
        for row in np.flatnonzero(passed > 1.5 * middle).tolist():
            yield Finding("gap", f"{passed[row]:.4g} s pass before this step", start + row + 1, "warning")


def _stops(episodes: _Episodes) -> list[int]:
    ends = np.flatnonzero(episodes.opens)
    ends = np.append(ends, len(episodes.opens))
    return ends[np.searchsorted(ends, episodes.starts, side="right")].tolist()


def _images(table: pa.Table, episodes: _Episodes, decode: bool) -> Iterator[Finding]:
    sizes: dict[str, tuple[int, ...]] = {}
    cameras: list[str] = []
    column = table["images"]
    for row in range(len(table)):
        images = column[row].as_py() or []
        names = [name for name, _ in images]
        if episodes.opens[row]:
            sizes, cameras = {}, names
        if not names:
            if episodes.is_robot[row]:
                yield Finding("image", "there is no image", row)
        elif names != cameras:
            yield Finding("image", f"the cameras change from {', '.join(cameras)} to {', '.join(names)}", row)
        for name, data in images if decode else ():
            try:
                shape = decode_image(data or b"").shape
            except DataError as error:
                yield Finding("image", f"camera '{name}': {error.message}", row)
                continue
            if sizes.setdefault(name, shape) != shape:
                yield Finding("image", f"the size of camera '{name}' changes to {shape[1]} x {shape[0]}", row)


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    return table[name].combine_chunks().to_numpy(zero_copy_only=False).astype(np.float64)


def _lengths(table: pa.Table, name: str) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(table[name]), 0).to_numpy()


def _matrix(table: pa.Table, name: str, rows: np.ndarray, width: int) -> np.ndarray:
    """float64 [rows, width]; what is not finite (found elsewhere) counts as 0, inside every range."""
    values = pc.list_flatten(table[name].take(pa.array(rows, type=pa.int64())))
    return np.nan_to_num(values.to_numpy().astype(np.float64), posinf=0.0, neginf=0.0).reshape(len(rows), width)
