"""What each source's numbers mean, and their conversion to ours (metres, radians, extrinsic XYZ Euler, 1 = open).

A convention is written down, never inferred from values. Knows arrays only: nothing of files, images or rows.

Suffixes: T steps, D numbers of one column.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from dualvla import config as configs
from dualvla.errors import DataError, UsageError, did_you_mean
from dualvla.io import storage

Rotation = Literal["euler_xyz", "euler_xyz_intrinsic", "quaternion_xyzw", "quaternion_wxyz", "rotation_vector"]
_WIDTH = {
    "euler_xyz": 3,
    "euler_xyz_intrinsic": 3,
    "quaternion_xyzw": 4,
    "quaternion_wxyz": 4,
    "rotation_vector": 3,
}
_SLICE = re.compile(r"^(?P<column>[^\[\]]+)(?:\[(?P<start>-?\d*):(?P<stop>\d*)\])?$")
_FRACTAL_TRIGGER = 0.1  # of a relative gripper command: what lies below it means "stay"
_DECIDED = 0.05  # of a gripper command in [0, 1]: nearer to 0 or 1 than this is a decision, the rest is on its way


@dataclass(frozen=True)
class Arm:
    """Where one arm's numbers lie: "column" or "column[start:stop]"; a negative start counts from the end."""

    position: str
    rotation: str
    gripper: str
    action_position: str
    action_rotation: str
    action_gripper: str


@dataclass(frozen=True)
class Convention:
    """How one source writes things down.

    name: also the `task` of its rows. action: `delta` (the action columns hold a change of pose in the base frame),
    `absolute` (the pose to go to), or `reached` (relabelled: the change to the next recorded pose; the last step has
    none and is dropped). *_closed, *_open: the numbers that mean fully closed and fully open. action_gripper
    `relative_closing`: +1 closes, -1 opens, 0 stays. binarise_gripper: commands become 0 or 1, those in between taking
    the next decided one. drop_first: the first step is dropped. control_hz: where the source does not say.
    cameras: source column -> our name (none: all image columns, under the last part of their name). proprio: columns
    (none: our pose and gripper).
    """

    name: str
    arms: tuple[Arm, ...]
    cameras: dict[str, str] = field(default_factory=dict)
    instruction: str | None = None
    proprio: tuple[str, ...] = ()
    control_hz: float | None = None
    position_unit: Literal["m", "mm"] = "m"
    angle_unit: Literal["rad", "deg"] = "rad"
    rotation: Rotation = "euler_xyz"
    gripper_closed: float = 0.0
    gripper_open: float = 1.0
    action: Literal["delta", "absolute", "reached"] = "delta"
    action_rotation: Rotation = "euler_xyz"
    action_gripper: Literal["absolute", "relative_closing"] = "absolute"
    action_gripper_closed: float = 0.0
    action_gripper_open: float = 1.0
    binarise_gripper: bool = False
    drop_first: bool = False

    def __post_init__(self) -> None:
        if len(self.arms) not in (1, 2):
            raise UsageError(f"Convention '{self.name}' has {len(self.arms)} arms.", "give one or two")
        for closed, open_ in (
            (self.gripper_closed, self.gripper_open),
            (self.action_gripper_closed, self.action_gripper_open),
        ):
            if closed == open_:
                raise UsageError(
                    f"Convention '{self.name}': the gripper is {closed} both closed and open.",
                    "set gripper_closed and gripper_open",
                )

    @property
    def action_space(self) -> str:
        return "ee_delta_pose+gripper" if len(self.arms) == 1 else "bimanual_ee_delta_pose+gripper"


def _state_arm(state: str, rotation: int, gripper: str, action: str = "action") -> Arm:
    return Arm(
        f"{state}[0:3]", f"{state}[3:{3 + rotation}]", gripper, f"{action}[0:3]", f"{action}[3:6]", f"{action}[6:7]"
    )


# Open-X bridge (protocols: first step dropped, gripper binarised, actions relabelled from reached poses).
BRIDGE_RLDS = Convention(
    name="bridge",
    arms=(_state_arm("observation/state", 3, "observation/state[-1:]"),),
    cameras={"observation/image_0": "image_0"},
    instruction="language_instruction",
    control_hz=5.0,
    action="reached",
    binarise_gripper=True,
    drop_first=True,
)
# Open-X fractal20220817_data (RT-1): pose as x, y, z and quaternion x, y, z, w; rotation_delta is a rotation vector.
FRACTAL_RLDS = Convention(
    name="fractal",
    arms=(
        Arm(
            "observation/base_pose_tool_reached[0:3]",
            "observation/base_pose_tool_reached[3:7]",
            "observation/gripper_closed[0:1]",
            "action/world_vector",
            "action/rotation_delta",
            "action/gripper_closedness_action",
        ),
    ),
    cameras={"observation/image": "image"},
    instruction="observation/natural_language_instruction",
    control_hz=3.0,
    rotation="quaternion_xyzw",
    gripper_closed=1.0,
    gripper_open=0.0,
    action_rotation="rotation_vector",
    action_gripper="relative_closing",
)
# The same two as LeRobot data sets (state of 8 numbers, actions already made relative and absolute by the conversion).
BRIDGE_LEROBOT = Convention(name="bridge", arms=(_state_arm("observation.state", 3, "observation.state[7:8]"),))
FRACTAL_LEROBOT = Convention(
    name="fractal",
    arms=(_state_arm("observation.state", 4, "observation.state[7:8]"),),
    rotation="quaternion_xyzw",
    gripper_closed=1.0,
    gripper_open=0.0,
    action_rotation="rotation_vector",
)


def dualvla_lerobot(arms: int) -> Convention:
    """What `dualvla export` writes."""

    def arm(i: int) -> Arm:
        pose, action = 6 * i, 7 * i
        return Arm(
            f"observation.ee_pose[{pose}:{pose + 3}]",
            f"observation.ee_pose[{pose + 3}:{pose + 6}]",
            f"observation.gripper[{i}:{i + 1}]",
            f"action[{action}:{action + 3}]",
            f"action[{action + 3}:{action + 6}]",
            f"action[{action + 6}:{action + 7}]",
        )

    return Convention(
        name="dualvla",
        arms=tuple(arm(i) for i in range(arms)),
        proprio=("observation.state",),
        action_rotation="rotation_vector",
    )


def load(
    name: str, table: Mapping[str, Convention], recognised: Convention | None, overrides: tuple[str, ...]
) -> Convention:
    """The convention called `name` in `table`, in the JSON file `name`, or for `auto` the one recognised by columns.

    overrides: `key=value` settings applied to it. Raises: UsageError if there is none, naming what can be said.
    """
    if name == "auto":
        if recognised is None:
            raise UsageError(
                "The columns of this source do not say what its numbers mean.",
                f"pass --convention {', '.join(sorted(table))} or a JSON file (docs/data.md)",
            )
        found = recognised
    elif name.endswith(".json"):
        try:
            found = configs.from_dict(Convention, json.loads(storage.read_bytes(name)), "convention")
        except json.JSONDecodeError as error:
            raise UsageError(f"'{name}' is not valid JSON: {error}.", "repair it") from error
    elif name in table:
        found = table[name]
    else:
        raise UsageError(f"Unknown convention '{name}'.", did_you_mean(name, table))
    return configs.override(found, overrides)


def column(columns: Mapping[str, np.ndarray], spec: str) -> np.ndarray:
    """float64 [T, D] of "name" or "name[start:stop]". Raises: DataError if it does not exist or is too narrow."""
    match = _SLICE.match(spec)
    if match is None:
        raise UsageError(f"'{spec}' is not a column.", 'write "name" or "name[start:stop]"')
    name = match["column"]
    if name not in columns:
        raise DataError(f"The source has no column '{name}'.", did_you_mean(name, columns))
    values = np.asarray(columns[name], dtype=np.float64)
    values = values.reshape(len(values), -1)
    if match["start"] is None:
        return values
    width = values.shape[1]
    start, stop = int(match["start"] or 0), int(match["stop"] or width)
    start += width if start < 0 else 0
    if not 0 <= start < stop <= width:
        raise DataError(
            f"'{spec}' asks for more than the {values.shape[1]} numbers of '{name}'.", "correct the convention"
        )
    return values[:, start:stop]


@dataclass(frozen=True)
class Converted:
    """One episode in our units, on the source's own steps.

    pose [T, 6 per arm] (m, rad), gripper [T, arms], proprio [T, P], action [T, 7 per arm]; dropped: step -> why it has
    no place in the data set (the arrays still hold it).
    """

    pose: np.ndarray
    gripper: np.ndarray
    proprio: np.ndarray
    action: np.ndarray
    dropped: dict[int, str]


def convert(columns: Mapping[str, np.ndarray], convention: Convention) -> Converted:
    """Our arrays from a source's columns of one episode (each [T] or [T, D]).

    What is not finite stays so; it is the checks' business. Raises: DataError if a column is missing.
    """
    poses, grippers, actions = [], [], []
    dropped: dict[int, str] = {}
    with np.errstate(invalid="ignore", divide="ignore"):  # of values that are not finite
        for arm in convention.arms:
            position, angles = _pose(columns, arm.position, arm.rotation, convention, convention.rotation)
            gripper = _scale(column(columns, arm.gripper), convention.gripper_closed, convention.gripper_open)
            motion = _motion(columns, arm, convention, position, to_matrix(angles, convention.rotation))
            command = _gripper_command(column(columns, arm.action_gripper)[:, 0], convention)
            poses.append(np.concatenate([position, _as_euler(angles, convention.rotation)], axis=1))
            grippers.append(gripper[:, :1])
            actions.append(np.concatenate([motion, command[:, None]], axis=1))
    pose, gripper = np.concatenate(poses, axis=1), np.concatenate(grippers, axis=1)
    if convention.drop_first and len(pose):
        dropped[0] = "the first step is dropped"
    if convention.action == "reached" and len(pose):
        dropped.setdefault(len(pose) - 1, "the last step has no pose to reach")
    proprio = [column(columns, spec) for spec in convention.proprio] or [pose, gripper]
    return Converted(pose, gripper, np.concatenate(proprio, axis=1), np.concatenate(actions, axis=1), dropped)


def _pose(
    columns: Mapping[str, np.ndarray], position: str, rotation: str, convention: Convention, kind: Rotation
) -> tuple[np.ndarray, np.ndarray]:
    """Position [T, 3] (m) and the rotation [T, 3 or 4] (rad), of its own kind."""
    metres = column(columns, position) * (1e-3 if convention.position_unit == "mm" else 1.0)
    angles = column(columns, rotation)
    if angles.shape[1] != _WIDTH[kind]:
        raise DataError(
            f"'{rotation}' has {angles.shape[1]} numbers, but {kind} has {_WIDTH[kind]}.", "correct the convention"
        )
    if convention.angle_unit == "deg" and not kind.startswith("quaternion"):
        angles = np.deg2rad(angles)
    return metres, angles


def _motion(
    columns: Mapping[str, np.ndarray], arm: Arm, convention: Convention, position: np.ndarray, rotation: np.ndarray
) -> np.ndarray:
    """dx, dy, dz (m) and a rotation vector (rad) in the base frame, [T, 6]. The last of `reached` is zero."""
    if convention.action == "reached":
        turn = np.zeros_like(position)
        step = np.zeros_like(position)
        step[:-1] = np.diff(position, axis=0)
        turn[:-1] = matrix_to_vector(rotation[1:] @ rotation[:-1].swapaxes(-1, -2))
        return np.concatenate([step, turn], axis=1)
    goal, angles = _pose(columns, arm.action_position, arm.action_rotation, convention, convention.action_rotation)
    if convention.action == "delta":
        return np.concatenate([goal, _as_vector(angles, convention.action_rotation)], axis=1)
    turn = matrix_to_vector(to_matrix(angles, convention.action_rotation) @ rotation.swapaxes(-1, -2))
    return np.concatenate([goal - position, turn], axis=1)


def _as_euler(angles: np.ndarray, kind: Rotation) -> np.ndarray:
    """Ours already: to the bit, and on the branch they were recorded on."""
    return angles if kind == "euler_xyz" else matrix_to_euler(to_matrix(angles, kind))


def _as_vector(angles: np.ndarray, kind: Rotation) -> np.ndarray:
    return angles if kind == "rotation_vector" else matrix_to_vector(to_matrix(angles, kind))


def _gripper_command(values: np.ndarray, convention: Convention) -> np.ndarray:
    if convention.action_gripper == "relative_closing":
        return absolute_from_closing(values)
    scaled = _scale(values, convention.action_gripper_closed, convention.action_gripper_open)
    if not convention.binarise_gripper:
        return scaled
    return binarise(scaled)


def _scale(values: np.ndarray, closed: float, open_: float) -> np.ndarray:
    return values if (closed, open_) == (0.0, 1.0) else (values - closed) / (open_ - closed)


def binarise(openings: np.ndarray) -> np.ndarray:
    """0 or 1 for each command in [0, 1], [T]: one on its way takes the next that is decided (none: is it over half)."""
    decided = (openings < _DECIDED) | (openings > 1.0 - _DECIDED) | ~np.isfinite(openings)
    following = np.where(decided, np.arange(len(openings)), len(openings))
    following = np.minimum.accumulate(following[::-1])[::-1]
    padded = np.append(openings, openings[-1:] if len(openings) else 0.0)
    chosen = padded[following]
    return np.where(np.isfinite(chosen), (chosen > 0.5).astype(np.float64), chosen)


def absolute_from_closing(commands: np.ndarray) -> np.ndarray:
    """0 closed, 1 open for each command of +1 (close), -1 (open), 0 (stay), [T].

    Before the first command the gripper is in the state that command changes; without any it is open.
    """
    moved = (np.abs(commands) > _FRACTAL_TRIGGER) | ~np.isfinite(commands)
    state = np.where(np.isfinite(commands), (commands < 0).astype(np.float64), commands)
    if not moved.any():
        return np.ones(len(commands))
    latest = np.maximum.accumulate(np.where(moved, np.arange(len(commands)), -1))
    before = 1.0 - state[np.argmax(moved)]
    return np.where(latest >= 0, state[np.maximum(latest, 0)], before)


def to_matrix(values: np.ndarray, kind: Rotation) -> np.ndarray:
    """Rotation matrices [T, 3, 3] from angles (rad), quaternions of any length but 0, or rotation vectors (rad)."""
    if kind == "rotation_vector":
        return _vector_to_matrix(values)
    if kind.startswith("quaternion"):
        return _quaternion_to_matrix(values if kind == "quaternion_xyzw" else np.roll(values, -1, axis=1))
    x, y, z = (_about(axis, values[:, axis]) for axis in range(3))
    return z @ y @ x if kind == "euler_xyz" else x @ y @ z


def _about(axis: int, angle: np.ndarray) -> np.ndarray:
    one, two = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.zeros((len(angle), 3, 3))
    matrix[:, axis, axis] = 1.0
    matrix[:, one, one] = matrix[:, two, two] = np.cos(angle)
    matrix[:, two, one] = np.sin(angle)
    matrix[:, one, two] = -np.sin(angle)
    return matrix


def _quaternion_to_matrix(xyzw: np.ndarray) -> np.ndarray:
    x, y, z, w = (xyzw / np.linalg.norm(xyzw, axis=1, keepdims=True)).T
    return np.stack(
        [
            np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], axis=-1),
            np.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], axis=-1),
            np.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], axis=-1),
        ],
        axis=1,
    )


def _vector_to_matrix(vector: np.ndarray) -> np.ndarray:
    half = np.linalg.norm(vector, axis=1, keepdims=True) / 2.0
    return _quaternion_to_matrix(np.concatenate([vector * np.sinc(half / np.pi) / 2.0, np.cos(half)], axis=1))


def matrix_to_euler(matrix: np.ndarray) -> np.ndarray:
    """Extrinsic XYZ Euler angles (rad) [T, 3], the second in [-pi/2, pi/2]; at its ends the third is 0."""
    sine = np.clip(-matrix[:, 2, 0], -1.0, 1.0)
    locked = np.abs(sine) > 1.0 - 1e-12
    x = np.where(
        locked,
        np.arctan2(-matrix[:, 1, 2], matrix[:, 1, 1]),
        np.arctan2(matrix[:, 2, 1], matrix[:, 2, 2]),
    )
    z = np.where(locked, 0.0, np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0]))
    return np.stack([x, np.arcsin(sine), z], axis=1)


def matrix_to_vector(matrix: np.ndarray) -> np.ndarray:
    """Rotation vectors (rad) [T, 3] of length at most pi."""
    # The largest of the four quaternion numbers is computed first: each of the others alone is inexact somewhere.
    trace = np.trace(matrix, axis1=1, axis2=2)
    diagonal = np.diagonal(matrix, axis1=1, axis2=2)
    squares = np.concatenate([1.0 - trace[:, None] + 2.0 * diagonal, 1.0 + trace[:, None]], axis=1)  # 4 x^2 .. 4 w^2
    quaternion = np.empty_like(squares)
    largest = np.argmax(np.nan_to_num(squares), axis=1)
    off = {
        (3, 0): matrix[:, 2, 1] - matrix[:, 1, 2],
        (3, 1): matrix[:, 0, 2] - matrix[:, 2, 0],
        (3, 2): matrix[:, 1, 0] - matrix[:, 0, 1],
        (0, 1): matrix[:, 0, 1] + matrix[:, 1, 0],
        (0, 2): matrix[:, 0, 2] + matrix[:, 2, 0],
        (1, 2): matrix[:, 1, 2] + matrix[:, 2, 1],
    }
    root = np.sqrt(np.take_along_axis(squares, largest[:, None], axis=1))[:, 0]
    for i in range(4):
        rows = largest == i
        for j in range(4):
            pair = off[(i, j)] if (i, j) in off else off.get((j, i))
            quaternion[rows, j] = root[rows] if pair is None else pair[rows] / root[rows]
    quaternion = np.where(quaternion[:, 3:] < 0, -quaternion, quaternion)
    sine = np.linalg.norm(quaternion[:, :3], axis=1)
    angle = 2.0 * np.arctan2(sine, quaternion[:, 3])
    scale = np.where(sine > 1e-12, angle / np.where(sine > 1e-12, sine, 1.0), 1.0)
    return quaternion[:, :3] * scale[:, None]
