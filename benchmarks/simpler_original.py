"""The original's physics: one episode of SimplerEnv in SAPIEN 2, without pictures. For `simpler_spread.py`.

    python benchmarks/simpler_original.py < starts.jsonl > ends.jsonl

Runs in an environment of its own, since SAPIEN 2 and 3 do not share one: Python 3.11 or older and
`pip install sapien==2.2.2 "numpy<2" ruckig "setuptools<81"`. A line in is a `Start`; a line out is what came of it:
distances from a recording, or where objects rest.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import sapien.core as sapien
from simpler_spread import Ended, Start, compared, numbered, start_of

from dualvla_eval.simpler.assets import Assets
from dualvla_eval.simpler.motion import JointPath, plan, quaternion
from dualvla_eval.simpler.robots import (
    GOOGLE_ARM_MOTION,
    GOOGLE_FINGER_MARGIN_RAD,
    GOOGLE_FINGER_MOTION,
    GOOGLE_FINGER_REPEAT_RAD,
    GOOGLE_FINGER_STEP_RAD,
    GOOGLE_ROBOT,
    WIDOWX,
    WIDOWX_OPENING_M,
)
from dualvla_eval.simpler.specs import ROBOT_FOLDERS, EpisodeSetup, ObjectSetup, Pose, Station

_Y_UP_TO_Z_UP = sapien.Pose(q=[np.sqrt(0.5), np.sqrt(0.5), 0, 0])
_IK_ITERATIONS = 100
_PARKED = sapien.Pose([-10, 0, 0])


class Scene:
    """Stage, objects, cabinet and robot of an `EpisodeSetup`."""

    def __init__(self, setup: EpisodeSetup, assets: Assets):
        self.setup, self.assets = setup, assets
        config = sapien.SceneConfig()
        config.default_static_friction = config.default_dynamic_friction = 1.0
        config.default_restitution = 0.0
        config.contact_offset = setup.contact_offset_m
        config.solver_iterations, config.solver_velocity_iterations = 25, 1
        config.enable_pcm, config.enable_tgs = False, True
        self.scene = sapien.Engine().create_scene(config)
        self.scene.set_timestep(1 / setup.sim_hz)
        self.robot = self._load_robot()
        self._build_stage()
        self.objects = {spec.model: self._build_object(spec) for spec in setup.objects}
        self.cabinet = None if setup.station is None else self._load_cabinet(setup.station)
        self._settle([self.objects[spec.model] for spec in setup.objects if not spec.locked])
        self._place()

    def _build_stage(self) -> None:
        stage = self.setup.stage
        if stage.model is not None and stage.collides:
            builder = self.scene.create_actor_builder()
            file = self.assets.path(f"stages/{stage.model}.glb")
            builder.add_nonconvex_collision_from_file(file, _pose(stage.extra) * _Y_UP_TO_Z_UP)
            builder.build_static("arena").set_pose(_pose(stage.pose))

    def _build_object(self, spec: ObjectSetup) -> Any:
        known = self.assets.models(self.setup.models)[spec.model].get("density", 1000)
        builder = self.scene.create_actor_builder()
        builder.add_multiple_collisions_from_file(
            self.assets.path(f"custom/models/{spec.model}/collision.obj"),
            scale=[spec.scale] * 3,
            material=self.scene.create_physical_material(0.5, 0.5, 0.0),
            density=known if spec.density is None else spec.density,
        )
        actor = builder.build(name=spec.model)
        actor.set_damping(0.1, 0.1)
        actor.set_pose(_pose(spec.pose))
        if spec.locked:
            actor.lock_motion(*[True] * 6)
        return actor

    def _load_cabinet(self, station: Station) -> Any:
        loader = self.scene.create_urdf_loader()
        loader.fix_root_link = loader.load_multiple_collisions_from_file = True
        cabinet = loader.load(self.assets.path(f"custom/{station.model}.urdf"))
        cabinet.set_pose(_pose(station.pose))
        for joint in cabinet.get_active_joints():
            joint.set_friction(0.05)
            joint.set_drive_property(0, 1)
        return cabinet

    def _load_robot(self) -> Any:
        setup = self.setup.robot
        spec = self.spec = WIDOWX if setup.kind == "widowx" else GOOGLE_ROBOT
        surface = self.scene.create_physical_material
        links = {
            link: {"material": surface(friction, friction, 0.0), "patch_radius": radius, "min_patch_radius": radius}
            for link, (friction, radius) in spec.materials.items()
        }
        loader = self.scene.create_urdf_loader()
        loader.fix_root_link = True
        robot = loader.load(
            self.assets.path(f"robots/{ROBOT_FOLDERS[setup.kind]}/{spec.files[setup.urdf]}"), {"link": links}
        )
        for link in robot.get_links():
            if link.name in spec.collision_groups:
                for shape in link.get_collision_shapes():
                    shape.set_collision_groups(*spec.collision_groups[link.name])
        joints = {joint.name: joint for joint in robot.get_active_joints()}
        for names, drives in ((spec.arm_joints, spec.arm_drives), (spec.finger_joints, spec.finger_drives)):
            for name, *how in zip(names, drives.stiffness, drives.damping, drives.force_limit, strict=True):
                joints[name].set_drive_property(*how[:2], force_limit=how[2], mode="force")
                joints[name].set_friction(0.0)
        robot.set_pose(_PARKED)
        self.joint_names = list(joints)
        self.arm = [joints[name] for name in spec.arm_joints]
        self.fingers = [joints[name] for name in spec.finger_joints]
        self.arm_indices = [self.joint_names.index(name) for name in spec.arm_joints]
        self.finger_indices = [self.joint_names.index(name) for name in spec.finger_joints]
        return robot

    def _settle(self, actors: list[Any]) -> None:
        if not actors:
            return
        for actor in actors:
            actor.lock_motion(False, False, False, True, True, False)
        self._run(0.5)
        for actor in actors:
            actor.lock_motion(*[False] * 6)
            actor.set_pose(actor.pose)
            actor.set_velocity(np.zeros(3))
            actor.set_angular_velocity(np.zeros(3))
        self._run(0.5)
        speed = sum(np.linalg.norm(actor.velocity) for actor in actors)
        turn = sum(np.linalg.norm(actor.angular_velocity) for actor in actors)
        if speed > 1e-3 or turn > 1e-2:
            self._run(1.5)

    def _run(self, seconds: float) -> None:
        for _ in range(int(self.setup.sim_hz * seconds)):
            self.scene.step()

    def _place(self) -> None:
        qpos = np.array([self.setup.robot.qpos[name] for name in self.joint_names])
        self.robot.set_qpos(qpos)
        self.robot.set_qvel(np.zeros_like(qpos))
        self.robot.set_pose(_pose(self.setup.robot.pose))
        if self.cabinet is not None and self.setup.station is not None:
            joints = [joint.name for joint in self.cabinet.get_active_joints()]
            self.cabinet.set_qpos(np.array([self.setup.station.qpos.get(name, 0.0) for name in joints]))
        links = [link.name for link in self.robot.get_links()]
        self._tool = links.index(self.spec.tool)
        self._kinematics = self.robot.create_pinocchio_model()
        self._mask = np.array([name in self.spec.arm_joints for name in self.joint_names])

    def tool(self) -> sapien.Pose:
        """In the frame of the base."""
        links = self.robot.get_links()
        return links[0].pose.inv() * links[self._tool].pose

    def reach(self, target: sapien.Pose) -> np.ndarray:
        """[arm joints] that bring the tool to `target`, or where they are if none are found."""
        qpos = self.robot.get_qpos()
        found, success, _ = self._kinematics.compute_inverse_kinematics(
            self._tool, target, initial_qpos=qpos, active_qmask=self._mask, max_iterations=_IK_ITERATIONS
        )
        return np.asarray(found if success else qpos)[self.arm_indices]

    def substep(self) -> None:
        self.robot.set_qf(self.robot.compute_passive_force(external=False))
        self.scene.step()


class WidowXControl:
    def __init__(self, scene: Scene):
        self.scene, self.target = scene, scene.tool()

    def step(self, action: np.ndarray, substeps: int) -> None:
        at_tip = sapien.Pose(self.scene.tool().p)
        motion = sapien.Pose(action[:3], quaternion(action[3:6]))
        self.target = at_tip * motion * at_tip.inv() * self.target
        low, high = WIDOWX_OPENING_M
        _aim(self.scene.arm, self.scene.reach(self.target))
        _aim(self.scene.fingers, [low + (np.clip(action[6], -1, 1) + 1) / 2 * (high - low)] * 2)
        for _ in range(substeps):
            self.scene.substep()


class GoogleControl:
    def __init__(self, scene: Scene):
        self.scene = scene
        self.path: JointPath | None = None  # of the arm
        self.goal = self.sent = scene.robot.get_qpos()[scene.finger_indices]
        self.limits = scene.robot.get_qlimits()[scene.finger_indices].T

    def step(self, action: np.ndarray, substeps: int) -> None:
        scene, sim_hz = self.scene, self.scene.setup.sim_hz
        qpos, qvel, tool = scene.robot.get_qpos(), scene.robot.get_qvel(), scene.tool()
        turned = sapien.Pose(q=quaternion(action[3:6])) * sapien.Pose(q=tool.q)
        reached = scene.reach(sapien.Pose(tool.p + action[:3], turned.q))
        arm, limits = scene.arm_indices, GOOGLE_ARM_MOTION
        start, velocity = qpos[arm], np.clip(qvel[arm], -limits.speed, limits.speed)
        if self.path is not None:
            start, velocity = self.path.positions[-1], self.path.velocities[-1]
        self.path = plan(start, velocity, reached, limits, sim_hz, substeps)

        change = np.clip(action[6], -1, 1) * GOOGLE_FINGER_STEP_RAD
        if abs(change) >= GOOGLE_FINGER_REPEAT_RAD:
            low, high = self.limits
            self.goal = np.clip(self.sent + change, low - GOOGLE_FINGER_MARGIN_RAD, high + GOOGLE_FINGER_MARGIN_RAD)
        fingers, limits = scene.finger_indices, GOOGLE_FINGER_MOTION
        velocity = np.clip(qvel[fingers], -limits.speed, limits.speed)
        closing = plan(qpos[fingers], velocity, self.goal, limits, sim_hz, substeps)
        for row in range(1, substeps + 1):
            _aim(scene.arm, self.path.positions[row])
            _aim(scene.fingers, closing.positions[row])
            for joint, speed in zip(scene.fingers, closing.velocities[row], strict=True):
                joint.set_drive_velocity_target(speed)
            scene.substep()
        self.sent = closing.positions[-1]


def _aim(joints: list[Any], targets: Any) -> None:
    for joint, target in zip(joints, targets, strict=True):
        joint.set_drive_target(target)


def _pose(pose: Pose) -> sapien.Pose:
    return sapien.Pose(pose.position, np.asarray(pose.rotation) / np.linalg.norm(pose.rotation))


def replay(start: Start, assets: Assets) -> Ended:
    recorded, setup = start_of(start)
    scene = Scene(setup, assets)
    control = WidowXControl(scene) if setup.robot.kind == "widowx" else GoogleControl(scene)
    ended = compared(recorded, {name: (actor.pose.p, actor.pose.q) for name, actor in scene.objects.items()})
    for i, action in enumerate(recorded["actions"], 1):
        control.step(np.array(action), setup.sim_hz // setup.control_hz)
        tool, cabinet = scene.tool(), None
        if scene.cabinet is not None:
            joints = [joint.name for joint in scene.cabinet.get_active_joints()]
            cabinet = dict(zip(joints, scene.cabinet.get_qpos(), strict=True))
        ended.step(recorded, i, (tool.p, tool.q), cabinet)
    ended.finish(recorded, setup.source, {name: actor.pose.p for name, actor in scene.objects.items()})
    return ended


def settle(start: Start, assets: Assets) -> dict[str, list[float]]:
    setup = numbered(start)
    scene = Scene(setup, assets)
    poses = {spec.model: scene.objects[spec.model].pose for spec in setup.objects if not spec.locked}
    return {model: [*map(float, pose.p), *map(float, pose.q)] for model, pose in poses.items()}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")  # SAPIEN writes to stdout, too
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as folder:
        found = Assets(Path(folder, "assets"))
        shutil.copytree(Assets.find().root, found.root)
        theirs = set(found.root.rglob("*"))
        for line in sys.stdin:
            asked = Start(**json.loads(line))
            told = asdict(replay(asked, found)) if asked.recorded else settle(asked, found)
            print(json.dumps(told), file=answers, flush=True)
            for written in set(found.root.rglob("*")) - theirs:  # SAPIEN 2 would read its hulls, which are less precise
                written.unlink()
