"""The records that cross a process or a file, with units, frames and shapes.

Knows numpy only: pyarrow is imported inside the functions that need it, so that the robot client stays small.

Conventions, everywhere: positions in metres in the robot's base frame, angles in radians as **extrinsic XYZ Euler**,
gripper 0 closed and 1 open, images RGB uint8 [H, W, 3], time in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1
DOMAINS = ("robot", "multimodal")
PolicyKind = Literal["reasoning", "specialist"]


@dataclass(frozen=True)
class Observation:
    """What a policy sees at one control step.

    images: camera name -> uint8 [H, W, 3]; proprio: float32 [P] or None; ee_pose: float64 [6 per arm] (m, rad) or None.
    `id` is answered unchanged in the reply, so that a reply can never be taken for another's.
    """

    images: Mapping[str, np.ndarray]
    instruction: str
    proprio: np.ndarray | None = None
    ee_pose: np.ndarray | None = None
    step: int = 0
    id: str = ""


@dataclass(frozen=True)
class PolicyReply:
    """What a policy answers. actions: float32 [H, D] in the units of its action space.

    reasoning: the text behind these actions, None if the policy has none at this step. keyframe: the text was newly
    generated at this step (False: cached from an earlier one, or none). reasoning_tokens: generated at this step.
    timing: name -> milliseconds.
    """

    actions: np.ndarray
    reasoning: str | None = None
    keyframe: bool = False
    reasoning_tokens: int = 0
    timing: Mapping[str, float] = field(default_factory=dict)
    id: str = ""


@dataclass(frozen=True)
class PolicySpec:
    """What must agree between a policy, its training data and an environment.

    action_space: a name such as "ee_delta_pose+gripper" (see ACTION_SPACES). horizon: actions per reply (H).
    execute_steps: how many of them are executed before the next query.
    """

    action_space: str
    control_hz: float
    cameras: tuple[str, ...]
    kind: PolicyKind
    horizon: int = 1
    execute_steps: int = 1


@dataclass(frozen=True)
class ActionSpace:
    """Per-dimension names, in order. Delta poses are in the base frame; rotations are rotation vectors (rad)."""

    name: str
    dimensions: tuple[str, ...]
    gripper_dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.dimensions)


_ARM = ("dx_m", "dy_m", "dz_m", "drx_rad", "dry_rad", "drz_rad", "gripper_open")
ACTION_SPACES: dict[str, ActionSpace] = {
    "ee_delta_pose+gripper": ActionSpace("ee_delta_pose+gripper", _ARM, (6,)),
    "bimanual_ee_delta_pose+gripper": ActionSpace(
        "bimanual_ee_delta_pose+gripper",
        tuple(f"{arm}_{d}" for arm in ("left", "right") for d in _ARM),
        (6, 13),
    ),
}

# A step of a demonstration, or one question and answer (domain "multimodal": question in `instruction`, answer in
# `reasoning`, no pose and no action). `target_pixel` ([u, v] in [0, 1] of the first camera, u to the right, v down) and
# `target_position` ([x, y, z] m, base frame) of the object the current phase is about are a training-time signal only.
_STEP_COLUMNS: tuple[tuple[str, str], ...] = (
    ("episode_id", "string"),
    ("step", "int32"),
    ("timestamp_s", "float64"),
    ("control_hz", "float64"),
    ("split", "string"),
    ("domain", "string"),
    ("task", "string"),
    ("instruction", "string"),
    ("images", "map<string, binary>"),
    ("ee_pose", "list<float64>"),
    ("gripper", "list<float64>"),
    ("proprio", "list<float32>"),
    ("action", "list<float32>"),
    ("action_space", "string"),
    ("motion_primitive", "string"),
    ("reasoning", "string"),
    ("events", "list<string>"),
    ("target_pixel", "list<float32>"),
    ("target_position", "list<float32>"),
)
_LABEL_COLUMNS: tuple[tuple[str, str], ...] = (
    ("scene_label", "bool"),
    ("action_label", "bool"),
    ("keep_reasoning", "bool"),
)


def step_schema(labels: bool = False) -> pa.Schema:
    """The Arrow schema of a data set's `data/*.parquet`; `labels` adds what pruning adds."""
    import pyarrow as pa

    types: dict[str, Any] = {
        "string": pa.string(),
        "int32": pa.int32(),
        "float64": pa.float64(),
        "bool": pa.bool_(),
        "map<string, binary>": pa.map_(pa.string(), pa.binary()),
        "list<float64>": pa.list_(pa.float64()),
        "list<float32>": pa.list_(pa.float32()),
        "list<string>": pa.list_(pa.string()),
    }
    columns = _STEP_COLUMNS + (_LABEL_COLUMNS if labels else ())
    return pa.schema([pa.field(name, types[kind]) for name, kind in columns])
