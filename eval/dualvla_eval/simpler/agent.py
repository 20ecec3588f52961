"""What both SimplerEnv robots share as mani_skill agents: loading, parking, passive forces, the tool, the gripper.

Knows mani_skill; no task. A robot is a subclass that names its `RobotSpec` and its controllers; `agent_class`
finds it by `RobotSetup.kind`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import sapien
import torch
from mani_skill.agents.base_agent import BaseAgent
from mani_skill.utils import sapien_utils
from mani_skill.utils.structs import Articulation, Link

from dualvla_eval.simpler.assets import Assets
from dualvla_eval.simpler.robots import RobotSpec
from dualvla_eval.simpler.specs import ROBOT_FOLDERS, RobotSetup, Vector

PARKED = sapien.Pose([-10, 0, 0])  # where the robot waits until the objects have settled
_GLOSS = {"specular": 0.9, "roughness": 0.3}


class SimplerAgent(BaseAgent, ABC):
    """spec: the original's set-up, with what is helped of it.

    grasp_sides: the links of each side of the gripper, and the sign of their y axis along which a grasped object pushes
    them, within grasp_angle_deg. unrotated: the orientation of the tool, in the base frame, that is told as no
    rotation, so that Euler angles stay small.
    """

    spec: ClassVar[RobotSpec]
    grasp_sides: ClassVar[tuple[tuple[tuple[str, ...], float], ...]]
    grasp_angle_deg: ClassVar[float]
    unrotated: ClassVar[tuple[Vector, Vector, Vector]] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))

    def __init__(self, scene: Any, setup: RobotSetup, assets: Assets, control_hz: int):
        self.setup = setup
        self.urdf_path = assets.path(f"robots/{ROBOT_FOLDERS[setup.kind]}/{self.spec.files[setup.urdf]}")
        self.urdf_config = {
            "_materials": {
                link: {"static_friction": friction, "dynamic_friction": friction, "restitution": 0.0}
                for link, (friction, _) in self.spec.materials.items()
            },
            "link": {
                link: {"material": link, "patch_radius": radius, "min_patch_radius": radius}
                for link, (_, radius) in self.spec.materials.items()
            },
        }
        super().__init__(scene, control_hz, initial_pose=PARKED)

    def _load_articulation(self, initial_pose: sapien.Pose | None = None) -> None:
        """Without the file's mimic joints, which SAPIEN 2 did not know: each finger follows its own drive."""
        loader = self.scene.create_urdf_loader()
        loader.name = self.uid
        sapien_utils.apply_urdf_config(loader, sapien_utils.parse_urdf_config(self.urdf_config))
        (builder,) = loader.parse(self.urdf_path)["articulation_builders"]
        builder.initial_pose = initial_pose
        self.robot = builder.build(build_mimic_joints=False)
        self.robot_link_names = [link.name for link in self.robot.get_links()]

    def _after_loading_articulation(self) -> None:
        robot: Articulation = self.robot
        for link_name, groups in self.spec.collision_groups.items():
            for body in robot.links_map[link_name]._objs:
                for shape in body.collision_shapes:
                    shape.set_collision_groups(list(groups))
        if self.setup.glossy:
            for articulation in robot._objs:
                sapien_utils.set_articulation_render_material(articulation, **_GLOSS)
        self.tool_link: Link = robot.links_map[self.spec.tool]
        self.base_link: Link = robot.links[0]
        names = [joint.name for joint in robot.active_joints]
        self.start_qpos = np.array([self.setup.qpos[name] for name in names], dtype=np.float32)
        self._gripper_indices = [names.index(name) for name in self.spec.finger_joints]
        self._passive = list(robot._objs) if scene_on_cpu(self.scene) else []

    def _after_init(self) -> None:
        if self._passive:  # mani_skill's stand-in for them; only the GPU needs it
            for link in self.robot.links:
                link.disable_gravity = False

    def balance_passive_forces(self) -> None:
        """Gravity, Coriolis and centrifugal forces of the coming substep. On a GPU gravity is off instead."""
        for articulation in self._passive:
            articulation.set_qf(articulation.compute_passive_force(gravity=True, coriolis_and_centrifugal=True))

    def place(self) -> None:
        """From where it is parked to where the episode starts."""
        self.robot.set_qpos(torch.as_tensor(self.start_qpos)[None].repeat(self.scene.num_envs, 1))
        self.robot.set_qvel(torch.zeros((self.scene.num_envs, len(self.start_qpos))))
        position, rotation = self.setup.pose.position, self.setup.pose.rotation
        self.robot.set_root_pose(sapien.Pose(position, rotation))

    def tool_poses(self) -> list[sapien.Pose]:
        """The tool in the frame of the robot's base, one an environment."""
        return [
            sapien.Pose(b[:3], b[3:]).inv() * sapien.Pose(t[:3], t[3:])
            for b, t in zip(_raw(self.base_link), _raw(self.tool_link), strict=True)
        ]

    @abstractmethod
    def target_poses(self) -> list[sapien.Pose]:
        """Where the arm was commanded to, in the frame of the base, one an environment."""

    def qpos(self) -> np.ndarray:
        """[N, joints], rad and m, in the order of `joint_names`."""
        return self.robot.get_qpos().cpu().numpy()

    @property
    def joint_names(self) -> list[str]:
        return [joint.name for joint in self.robot.active_joints]

    @abstractmethod
    def native_action(self, action: np.ndarray) -> np.ndarray:
        """An action of space "ee_delta_pose+gripper" [7] as the original's [7], whose gripper is its own."""

    @abstractmethod
    def openings(self) -> np.ndarray:
        """[N], as measured: 0 closed to 1 open."""

    @abstractmethod
    def commanded_openings(self) -> np.ndarray:
        """[N], as commanded last: 0 closed to 1 open."""


def scene_on_cpu(scene: Any) -> bool:
    return scene.device.type == "cpu"


def _raw(link: Link) -> np.ndarray:
    return link.pose.raw_pose.cpu().numpy()


def agent_class(kind: str) -> type[SimplerAgent]:
    if kind == "widowx":
        from dualvla_eval.simpler.widowx import WidowX

        return WidowX
    from dualvla_eval.simpler.google_robot import GoogleRobot

    return GoogleRobot
