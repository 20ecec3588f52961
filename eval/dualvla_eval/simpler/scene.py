"""Builds an `EpisodeSetup` in a mani_skill scene: stage, objects, lights, camera. Knows no task, no robot."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
import sapien
from mani_skill.render import PREBUILT_SHADER_CONFIGS, ShaderConfig
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils.structs import Actor
from mani_skill.utils.structs.pose import Pose as PoseStruct

from dualvla_eval.simpler.assets import Assets
from dualvla_eval.simpler.pieces import PiecewiseBuilder
from dualvla_eval.simpler.specs import EpisodeSetup, ObjectSetup, Pose

STAGE = "arena"
_Y_UP_TO_Z_UP = sapien.Pose(q=[np.sqrt(0.5), np.sqrt(0.5), 0, 0])
_WHITE_FLOOR_HALF_M = [10, 10, 0.017]
_OBJECT_MATERIAL = {"static_friction": 0.5, "dynamic_friction": 0.5, "restitution": 0.0}
_DAMPING = 0.1
_SLEEP_THRESHOLD = 0.01  # twice SAPIEN 2's: what rests trembles more, and two of five oranges would roll away
_FLAT = 1  # SAPIEN's shading mode
WAITING_M = 20.0  # above their place, where objects that are dropped later wait


def to_sapien(pose: Pose) -> sapien.Pose:
    return sapien.Pose(pose.position, np.asarray(pose.rotation) / np.linalg.norm(pose.rotation))


def build_stage(scene: Any, setup: EpisodeSetup, assets: Assets) -> Actor:
    """The room, or the plain white floor where the setup names none."""
    builder = scene.create_actor_builder()
    stage = setup.stage
    if stage.model is None:
        white = sapien.render.RenderMaterial(base_color=[1, 1, 1, 1])
        builder.add_box_visual(half_size=_WHITE_FLOOR_HALF_M, material=white)
    else:
        file = assets.path(f"stages/{stage.model}.glb")
        pose = to_sapien(stage.extra) * _Y_UP_TO_Z_UP
        builder.add_visual_from_file(file, pose=pose)
        if stage.collides:
            builder.add_nonconvex_collision_from_file(file, pose=pose)
    builder.initial_pose = to_sapien(stage.pose)
    return builder.build_static(name=STAGE)


def build_objects(scene: Any, setups: Sequence[EpisodeSetup], assets: Assets) -> dict[str, Actor]:
    """The objects of N setups that differ only in their poses, by model."""
    first = setups[0]
    densities = assets.models(first.models)
    objects = {}
    for i, spec in enumerate(first.objects):
        density = spec.density if spec.density is not None else densities[spec.model].get("density", 1000)
        objects[spec.model] = _build_object(scene, spec, density, assets)
        objects[spec.model].initial_pose = stack_poses([_start(setup.objects[i]) for setup in setups])
    return objects


def _start(spec: ObjectSetup) -> Pose:
    x, y, z = spec.pose.position
    return Pose((x, y, z + WAITING_M), spec.pose.rotation) if spec.later else spec.pose


def _build_object(scene: Any, spec: ObjectSetup, density: float, assets: Assets) -> Actor:
    builder = PiecewiseBuilder().set_scene(scene)
    builder.add_pieces(
        assets.path(f"custom/models/{spec.model}/collision.obj"),
        spec.scale,
        sapien.physx.PhysxMaterial(**_OBJECT_MATERIAL),
        density,
    )
    visual = assets.visual(spec.model)
    if visual is not None:
        builder.add_visual_from_file(visual, scale=[spec.scale] * 3)
    builder.initial_pose = to_sapien(spec.pose)
    actor = builder.build(name=spec.model)
    if not spec.later:
        actor.set_linear_damping(_DAMPING)
        actor.set_angular_damping(_DAMPING)
    for body in actor._bodies:
        body.set_sleep_threshold(_SLEEP_THRESHOLD)
        if spec.locked or spec.later:
            body.set_locked_motion_axes([True] * 6)
    for material in _materials(actor):
        if spec.matte:
            material.roughness, material.metallic, material.specular = 1.0, 0.0, 0.0
        if material.emission_texture is not None:  # SAPIEN 2 drew it whatever the file's factor, which is 0
            material.emission = [1.0, 1.0, 1.0, 1.0]
    return actor


def _materials(actor: Actor) -> list[sapien.render.RenderMaterial]:
    components = [e.find_component_by_type(sapien.render.RenderBodyComponent) for e in actor._objs]
    return [part.material for c in components if c is not None for shape in c.render_shapes for part in shape.parts]


def stack_poses(poses: Sequence[Pose]) -> PoseStruct:
    """One pose an environment."""
    return PoseStruct.create_from_pq(
        p=np.array([pose.position for pose in poses], dtype=np.float32),
        q=np.array([np.asarray(pose.rotation) / np.linalg.norm(pose.rotation) for pose in poses], dtype=np.float32),
    )


def add_lights(scene: Any, setup: EpisodeSetup) -> None:
    scene.set_ambient_light(list(setup.ambient))
    for light in setup.lights:
        scene.add_directional_light(list(light.direction), list(light.color), shadow=light.shadow)


def one_pass(setup: EpisodeSetup) -> bool:
    """Whether our own shaders draw the picture: the same one in a third of the time, but they know no shadows."""
    return not any(light.shadow for light in setup.lights)


def shaders(setup: EpisodeSetup) -> ShaderConfig:
    """For the cameras that are made next: SAPIEN keeps the format of pictures for the process.

    Ours give Color, uint8 [H, W, 4], and Actor, uint8 [H, W, 4] with the id in the first channel; SAPIEN's give Color,
    float [H, W, 4], and Segmentation, int [H, W, 4].
    """
    if not one_pass(setup):
        return PREBUILT_SHADER_CONFIGS["default"]
    sapien.render.set_picture_format("Color", "r8g8b8a8unorm")
    sapien.render.set_picture_format("Actor", "r8g8b8a8unorm")
    folder = str(resources.files("dualvla_eval.simpler") / "shaders")
    return ShaderConfig(
        folder,
        {"Color": ["rgb"], "Actor": ["segmentation"]},
        texture_transforms={"Color": lambda data: {"rgb": data[..., :3]}},
    )


def leave_unshaded(actors: Sequence[Actor]) -> None:
    """What a photograph covers needs no light: our shaders then only note who is where."""
    for actor in actors:
        for entity in actor._objs:
            component = entity.find_component_by_type(sapien.render.RenderBodyComponent)
            if component is not None:
                component.shading_mode = _FLAT


def camera_config(setup: EpisodeSetup, mount: Any) -> CameraConfig:
    """The policy's camera as a mani_skill sensor, on the link `mount`."""
    camera = setup.camera
    fx, (cx, cy) = camera.focal_px, camera.center_px
    return CameraConfig(
        camera.name,
        pose=to_sapien(camera.pose),
        width=camera.width,
        height=camera.height,
        near=camera.near_m,
        far=camera.far_m,
        intrinsic=np.array([[fx, 0, cx], [0, fx, cy], [0, 0, 1]]),
        mount=mount,
        shader_config=shaders(setup),
    )
