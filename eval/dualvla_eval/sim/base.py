"""What every simulated environment offers: observations, privileged state, the SimEnv protocol.

Knows no simulator and no task. Units and frames are those of `dualvla.schema`: metres, radians, the robot's base frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dualvla.schema import Observation


@dataclass(frozen=True)
class ObjectState:
    """One object. position: centre [x, y, z] m. size: extent along x, y, z, m, before rotation. yaw_rad: about z.

    name is unique in its scene ("red cube"). color is None for an object that is named without one ("bin").
    """

    name: str
    shape: str
    color: str | None
    position: tuple[float, ...]
    initial_position: tuple[float, ...]
    yaw_rad: float
    size: tuple[float, ...]

    @property
    def lifted_m(self) -> float:
        """Height of the centre above where it started."""
        return self.position[2] - self.initial_position[2]

    @property
    def displaced_m(self) -> float:
        """Horizontal distance from where it started."""
        return float(np.hypot(*np.subtract(self.position[:2], self.initial_position[:2])))


@dataclass(frozen=True)
class SceneState:
    """Everything a judge or a scripted expert may know; a policy never sees it.

    target: the object the instruction names first; reference: the second one, if any. step: control steps since reset.
    ee_pose: [6] m and extrinsic XYZ Euler rad of the tool centre point. gripper: opening, 0 closed to 1 open. contacts:
    pairs of names touching at the end of the step, sorted; every robot link is "robot", the table is "table". held: the
    object between both fingers of a closing gripper. touched: objects the robot has touched so far, in the order of the
    first contact. still: no object moved over the last step. ee_target: like ee_pose, where the tool was commanded to;
    None where the controller keeps no such pose.
    """

    task: str
    instruction: str
    target: str
    reference: str | None
    step: int
    objects: tuple[ObjectState, ...]
    ee_pose: tuple[float, ...]
    gripper: float
    contacts: tuple[tuple[str, str], ...]
    held: str | None
    touched: tuple[str, ...]
    still: bool
    ee_target: tuple[float, ...] | None = None

    def object(self, name: str) -> ObjectState:
        return next(o for o in self.objects if o.name == name)

    def touching(self, name: str) -> frozenset[str]:
        """Names in contact with `name` at the end of the step."""
        return frozenset(a if b == name else b for a, b in self.contacts if name in (a, b))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**vars(self), "objects": [dict(vars(o)) for o in self.objects]}  # asdict copies, ten times slower


class SimEnv(Protocol):
    """A `gymnasium.Env` that also shows its privileged state.

    observation: {"images": {camera: uint8 [H, W, 3]}, "instruction": str, "proprio": float32 [P], "ee_pose": float64
    [6], "gripper": float64 [1], as last commanded (G of Eq. 4)}. info: {"success": bool, "failure": str | None,
    "events": list[str]}; events are those of this step, as "kind:object". `terminated` means success, or a failure that
    cannot be undone.
    """

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]: ...

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]: ...

    def state(self) -> SceneState: ...

    def instruction_for(self, target: str) -> str: ...

    def render(self, size: int | None = None) -> np.ndarray: ...

    def project(self, position: np.ndarray) -> np.ndarray: ...

    def close(self) -> None: ...


def to_observation(obs: Mapping[str, Any], step: int, id: str) -> Observation:
    """What a policy gets of an environment's observation."""
    return Observation(
        images=obs["images"],
        instruction=obs["instruction"],
        proprio=obs["proprio"],
        ee_pose=obs["ee_pose"],
        step=step,
        id=id,
    )
