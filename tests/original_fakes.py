"""A stand-in for mani-skill2 and SimplerEnv: what is used of their interface, with a tool that goes as told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

BASE = np.array([-0.615, 0.0, 0.0])
TURNED = Rotation.from_euler("z", 90, degrees=True).as_matrix()  # of the base: world axes are not the robot's
FINGERS = ("panda_finger_joint1", "panda_finger_joint2", "left_finger", "right_finger")
PANDA_STEP = 0.1
UNROTATED = {"panda": [[1.0, 0, 0], [0, -1, 0], [0, 0, -1]], "widowx": [[0, 0, 1.0], [0, 1, 0], [-1, 0, 0]]}


class Pose:
    def __init__(self, rotation: np.ndarray, position: np.ndarray):
        self.rotation, self.position = np.array(rotation, float), np.array(position, float)

    def to_transformation_matrix(self) -> np.ndarray:
        matrix = np.eye(4, dtype=np.float32)
        matrix[:3, :3], matrix[:3, 3] = self.rotation, self.position
        return matrix


class FakeEnv:
    """Moves a tool as `pd_ee_delta_pose` does (kind "panda"), or along the base's axes in metres ("widowx").

    Succeeds while the tool is higher than 0.3 m above the base. The cube lies where the seed says.
    """

    def __init__(self, kind: str, camera: str):
        self.kind, self.camera = kind, camera
        self.received: list[np.ndarray] = []
        self.reset_with: list[tuple[int, dict[str, Any]]] = []
        self.closed = False
        self.unwrapped = self
        joints = [SimpleNamespace(name=name) for name in FINGERS]
        robot = SimpleNamespace(
            pose=Pose(TURNED, BASE),
            get_links=lambda: [SimpleNamespace(name="hand"), SimpleNamespace(name="finger")],
            get_active_joints=lambda: joints,
            get_qpos=lambda: np.full(len(joints), 0.03),
        )
        self.agent = SimpleNamespace(robot=robot, check_grasp=lambda actor: False)
        self._scene = SimpleNamespace(get_contacts=self._contacts)
        if kind == "widowx":
            self.get_language_instruction = lambda: "put the spoon on the towel"
            self._get_instruction_obj_name = lambda name: name.removeprefix("bridge_").replace("_", " ")

    def reset(self, seed: int, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        self.reset_with.append((seed, options))
        at = np.random.default_rng(seed).uniform(0.3, 0.5, 2)
        self.position = np.array([0.6, 0.0, 0.2])  # in the base frame
        self.rotation = np.array(UNROTATED[self.kind])
        shape = SimpleNamespace(
            geometry=SimpleNamespace(half_lengths=np.full(3, 0.02)),
            get_local_pose=lambda: Pose(np.eye(3), np.zeros(3)),
        )
        name = "bridge_spoon" if self.kind == "widowx" else "cube"
        self.cube = SimpleNamespace(
            name=name,
            type="dynamic",
            pose=Pose(TURNED, BASE + TURNED @ [*at, 0.02]),
            get_collision_shapes=lambda: [shape],
        )
        self.obj, self.goal_pos = self.cube, BASE + TURNED @ [0.5, 0.1, 0.25]
        return self._observation(), {}

    @property
    def tcp(self) -> Any:
        return SimpleNamespace(pose=Pose(TURNED @ self.rotation, BASE + TURNED @ self.position))

    def get_actors(self) -> list[Any]:
        return [SimpleNamespace(name="ground", type="static"), self.cube]

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.received.append(action)
        move, turn = action[:3].astype(float), action[3:6].astype(float)
        if self.kind == "panda":  # what the original does in the frame of the tool
            self.position = self.position + self.rotation @ (PANDA_STEP * np.clip(move, -1, 1))
            self.rotation = self.rotation @ Rotation.from_rotvec(PANDA_STEP * turn).as_matrix()
        else:
            self.position = self.position + move
            self.rotation = Rotation.from_rotvec(turn).as_matrix() @ self.rotation
        success = np.bool_(self.position[2] > 0.3)
        return self._observation(), 0.0, bool(success), False, {"success": success}

    def close(self) -> None:
        self.closed = True

    def _contacts(self) -> list[Any]:
        def touch(first: str, second: str, impulse: float) -> Any:
            points = [SimpleNamespace(impulse=np.array([0, 0, impulse]))]
            return SimpleNamespace(
                actor0=SimpleNamespace(name=first), actor1=SimpleNamespace(name=second), points=points
            )

        return [
            touch("finger", self.cube.name, 1.0),
            touch("ground", self.cube.name, 1.0),
            touch("hand", "ground", 0.0),
        ]

    def _observation(self) -> dict[str, Any]:
        picture = np.arange(12 * 16 * 3, dtype=np.uint8).reshape(12, 16, 3)
        down = np.eye(4)[:3]  # a camera at the origin of the world, looking along z
        lens = {"intrinsic_cv": np.array([[8.0, 0, 8], [0, 8, 6], [0, 0, 1]]), "extrinsic_cv": down}
        return {"image": {self.camera: {"rgb": picture}}, "camera_param": {self.camera: lens}}
