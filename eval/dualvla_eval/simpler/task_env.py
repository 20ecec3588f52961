"""A SimplerEnv task as a mani_skill `BaseEnv`: N episodes of one shape, one on a CPU or many batched on a GPU.

Knows `EpisodeSetup` and the robots; no success test, no instruction and no policy. A new object is built for every
scene, so that an episode depends on its setup alone, to the last bit, and never on the episodes before it.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils.structs.types import DefaultMaterialsConfig, SceneConfig, SimConfig

from dualvla_eval.simpler import scene as building
from dualvla_eval.simpler.agent import agent_class
from dualvla_eval.simpler.assets import Assets
from dualvla_eval.simpler.overlay import Overlay
from dualvla_eval.simpler.settle import settle, settle_one_by_one
from dualvla_eval.simpler.specs import EpisodeSetup


class SimplerTask(BaseEnv):
    """setups: one an environment; they share everything but poses. `agent`, `objects` (by model) and `stage` are built
    and settled when the constructor returns."""

    SUPPORTED_REWARD_MODES = ("none",)

    def __init__(self, setups: Sequence[EpisodeSetup], assets: Assets, **options: Any):
        self.setups = tuple(setups)
        self.assets = assets
        os.environ.setdefault("LP_NUM_THREADS", "1")
        with engine_settings_kept():
            super().__init__(num_envs=len(self.setups), obs_mode="none", reward_mode="none", **options)

    @property
    def setup(self) -> EpisodeSetup:
        return self.setups[0]

    @property
    def _default_sim_config(self) -> SimConfig:
        return SimConfig(
            sim_freq=self.setup.sim_hz,
            control_freq=self.setup.control_hz,
            spacing=20,
            scene_config=SceneConfig(
                contact_offset=self.setup.contact_offset_m,
                solver_position_iterations=25,
                solver_velocity_iterations=1,
                enable_pcm=False,
                enable_tgs=True,
            ),
            default_materials_config=DefaultMaterialsConfig(static_friction=1.0, dynamic_friction=1.0, restitution=0.0),
        )

    @property
    def _default_sensor_configs(self) -> list[CameraConfig]:
        return [building.camera_config(self.setup, self.agent.robot.links_map[self.setup.camera.link])]

    def _load_agent(self, options: dict[str, Any]) -> None:
        self.agent = agent_class(self.setup.robot.kind)(
            self.scene, self.setup.robot, self.assets, self.setup.control_hz
        )

    def _load_scene(self, options: dict[str, Any]) -> None:
        self.stage = building.build_stage(self.scene, self.setup, self.assets)
        self.objects = building.build_objects(self.scene, self.setups, self.assets)
        self.station = None
        if self.setup.station is not None:
            from dualvla_eval.simpler.google_station import build_station

            self.station = build_station(self.scene, self.setup.station, self.assets)

    def _load_lighting(self, options: dict[str, Any]) -> None:
        building.add_lights(self.scene, self.setup)

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict[str, Any]) -> None:
        self._settle()
        self.agent.place()
        if self.setup.station is not None:
            from dualvla_eval.simpler.google_station import open_station

            open_station(self.station, self.setup.station)

    def _settle(self) -> None:
        pairs = list(zip(self.setup.objects, self.objects.values(), strict=True))
        step, sim_hz = self.scene.px.step, self.setup.sim_hz
        falling = [actor for spec, actor in pairs if not spec.locked and not spec.later]
        if falling:
            settle(falling, step, sim_hz)
        later = [(actor, building.to_sapien(spec.pose)) for spec, actor in pairs if spec.later]
        if later:
            settle_one_by_one([actor for actor, _ in later], [pose for _, pose in later], step, sim_hz)

    def _after_reconfigure(self, options: dict[str, Any]) -> None:
        camera, photo = self.setup.camera, self.setup.overlay
        self._overlay = None
        if photo is not None:
            path = self.assets.path(f"real_inpainting/{photo}.png")
            self._overlay = Overlay(path, camera.width, camera.height, self._kept_ids())
            covered = [self.objects[spec.model] for spec in self.setup.objects if spec.photo]
            building.leave_unshaded([self.stage, *covered])

    @property
    def photo(self) -> np.ndarray | None:
        """What covers the simulated picture, uint8 [H, W, 3]; None without an overlay."""
        return None if self._overlay is None else self._overlay.photo

    def _kept_ids(self) -> list[int]:
        """Segmentation ids of robot, objects and cabinet: what an overlay leaves as it is."""
        photo = {spec.model for spec in self.setup.objects if spec.photo}
        actors = [actor._objs[0] for model, actor in self.objects.items() if model not in photo]
        articulations = [self.agent.robot] + ([self.station] if self.station is not None else [])
        links = [link._objs[0].entity for articulation in articulations for link in articulation.links]
        return [entity.per_scene_id for entity in (*actors, *links)]

    def pictures(self) -> np.ndarray:
        """What the policies see, uint8 [N, H, W, 3]."""
        sensor = self._sensors[self.setup.camera.name]
        self.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        sensor.capture()
        if building.one_pass(self.setup):
            color, actors = (t.cpu().numpy() for t in sensor.camera.get_picture(["Color", "Actor"]))
            pixels, actors = color[..., :3], actors[..., 0]
        else:
            color, segmentation = (t.cpu().numpy() for t in sensor.camera.get_picture(["Color", "Segmentation"]))
            pixels, actors = (np.clip(color[..., :3], 0, 1) * 255).astype(np.uint8), segmentation[..., 1]
        return np.ascontiguousarray(pixels) if self._overlay is None else self._overlay.apply(pixels, actors)

    def _before_simulation_step(self) -> None:
        self.agent.balance_passive_forces()

    @property
    def _default_human_render_camera_configs(self) -> list[CameraConfig]:
        return []


@contextlib.contextmanager
def engine_settings_kept() -> Iterator[None]:
    """PhysX settings are the process's; other suites in it must not inherit ours."""
    physx = sapien.physx
    scene, shape, body = (
        copy.deepcopy(c) for c in (physx.get_scene_config(), physx.get_shape_config(), physx.get_body_config())
    )
    material = physx.get_default_material()
    try:
        yield
    finally:
        physx.set_scene_config(scene)
        physx.set_shape_config(shape)
        physx.set_body_config(body)
        physx.set_default_material(material.static_friction, material.dynamic_friction, material.restitution)
