"""The cabinet of the Google Robot's drawer tasks. Knows mani_skill; no task.

Its handles are drawn, but nothing can touch them: a drawer is pulled by the top edge of its front plate, as upstream.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.utils.structs import Articulation

from dualvla_eval.simpler.assets import Assets
from dualvla_eval.simpler.scene import to_sapien
from dualvla_eval.simpler.specs import Station

NAME = "cabinet"
FLOOR_SHAPE = 2  # of a drawer's collision shapes: its interior bottom
FRONT_SIZE_M = (0.015, 0.615, 0.14)
_FRONT_POSE = sapien.Pose([0.305, 0, 0])
_DRAWER = "_drawer"
_JOINT_FRICTION = 0.05
_JOINT_DAMPING = 1.0


def build_station(scene: Any, station: Station, assets: Assets) -> Articulation:
    loader = scene.create_urdf_loader()
    loader.fix_root_link = True
    builder = loader.parse(assets.path(f"custom/{station.model}.urdf"))["articulation_builders"][0]
    builder.initial_pose = to_sapien(station.pose)  # objects settle on it before the episode starts
    articulation = builder.build(name=NAME)
    for joint in articulation.active_joints:
        joint.set_friction(_JOINT_FRICTION)
        joint.set_drive_properties(stiffness=0.0, damping=_JOINT_DAMPING)
    open_station(articulation, station)
    return articulation


def open_station(articulation: Articulation, station: Station) -> None:
    """At its place, at rest, every drawer as far open as the setup says."""
    qpos = [station.qpos.get(joint.name, 0.0) for joint in articulation.active_joints]
    articulation.set_root_pose(to_sapien(station.pose))
    articulation.set_qpos(torch.as_tensor([qpos], dtype=torch.float32))
    articulation.set_qvel(torch.zeros((1, len(qpos))))


def fronts(articulation: Articulation) -> dict[str, sapien.Pose]:
    """Name ("top drawer") -> centre of the front plate, in the world."""
    links = {link.name: link._objs[0].entity.pose for link in articulation.links if link.name.endswith(_DRAWER)}
    return {name.replace("_", " "): pose * _FRONT_POSE for name, pose in links.items()}


def travel(articulation: Articulation, joint: str) -> float:
    """How far the drawer is open, m."""
    names = [j.name for j in articulation.active_joints]
    return float(np.asarray(articulation.get_qpos().cpu()).reshape(-1)[names.index(joint)])
