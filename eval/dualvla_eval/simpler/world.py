"""What a success test, an expert or a judge may know of a running `SimplerTask`: poses, contacts, grasps.

Reads the simulator once a control step; knows no task. All in the world's frame, m. One environment on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import sapien

from dualvla_eval.simpler.scene import STAGE
from dualvla_eval.simpler.task_env import SimplerTask

MIN_IMPULSE = 1e-6  # N s: less is no contact


@dataclass(frozen=True)
class Body:
    """kind: "robot", "object", "station" or "stage". name: of the link, or the model."""

    kind: str
    name: str


@dataclass(frozen=True)
class Contact:
    """Two shapes that touched in the last substep. impulse [3]: on the first, N s. shapes: their number in the body."""

    first: Body
    second: Body
    impulse: np.ndarray
    shapes: tuple[int, int]

    @property
    def pressed(self) -> bool:
        return float(np.linalg.norm(self.impulse)) > MIN_IMPULSE

    def other(self, body: Body) -> Body:
        return self.second if body == self.first else self.first


class World:
    """settled: model -> pose at reset. contacts: those at the end of the last control step (none before the first).

    extents: model -> [3], the size of its box before rotation. boxes: the same, turned as the object settled; the
    entries keep their signs, as in the original.
    """

    def __init__(self, task: SimplerTask):
        self.task = task
        self.contacts: list[Contact] = []
        self._bodies: dict[Any, Body] = {task.stage._objs[0]: Body("stage", STAGE)}
        for model, actor in task.objects.items():
            self._bodies[actor._objs[0]] = Body("object", model)
        for link in task.agent.robot.links:
            self._bodies[link._objs[0].entity] = Body("robot", link.name)
        if task.station is not None:
            for link in task.station.links:
                self._bodies[link._objs[0].entity] = Body("station", link.name)
        self._table = task.assets.models(task.setup.models)
        self.settled: Mapping[str, sapien.Pose] = {model: self.pose(model) for model in task.objects}
        self.extents = {model: self._extent(model) for model in task.objects}
        self.boxes = {model: _matrix(self.settled[model]) @ self.extents[model] for model in task.objects}

    def read(self) -> None:
        """After each control step."""
        self.contacts = [
            self._contact(contact) for contact in self.task.scene.sub_scenes[0].physx_system.get_contacts()
        ]

    def pose(self, model: str) -> sapien.Pose:
        return self.task.objects[model]._objs[0].pose

    def position(self, model: str) -> np.ndarray:
        """[3] of the model's origin."""
        return np.asarray(self.pose(model).p, dtype=np.float64)

    def center(self, model: str) -> np.ndarray:
        """[3] of its centre of mass."""
        body = self.task.objects[model]._bodies[0]
        return np.asarray((self.pose(model) * body.cmass_local_pose).p, dtype=np.float64)

    def settled_center(self, model: str) -> np.ndarray:
        body = self.task.objects[model]._bodies[0]
        return np.asarray((self.settled[model] * body.cmass_local_pose).p, dtype=np.float64)

    def touching(self, model: str) -> set[Body]:
        """What presses against it."""
        body = Body("object", model)
        return {c.other(body) for c in self.contacts if body in (c.first, c.second) and c.pressed}

    def impulse(self, link: str, model: str) -> np.ndarray:
        """[3], N s: of an object on a link of the robot, over all shapes."""
        on, by = Body("robot", link), Body("object", model)
        total = np.zeros(3)
        for contact in self.contacts:
            if (contact.first, contact.second) == (on, by):
                total += contact.impulse
            elif (contact.first, contact.second) == (by, on):
                total -= contact.impulse
        return total

    def grasped(self, model: str) -> bool:
        """Both sides of the gripper are pressed apart by it. Per side counts the stronger link and the better angle."""
        agent = self.task.agent
        for links, sign in agent.grasp_sides:
            impulses = [self.impulse(link, model) for link in links]
            axes = [sign * _matrix(agent.robot.links_map[link]._objs[0].entity.pose)[:, 1] for link in links]
            strength = max(float(np.linalg.norm(impulse)) for impulse in impulses)
            angle = min(_angle_deg(axis, impulse) for axis, impulse in zip(axes, impulses, strict=True))
            if strength < MIN_IMPULSE or angle > agent.grasp_angle_deg:
                return False
        return True

    def _extent(self, model: str) -> np.ndarray:
        """[3], of the box in the table of models, m; zeros for a model that has none."""
        entry = self._table[model]
        if "bbox" not in entry:
            return np.zeros(3)
        scale = next(spec.scale for spec in self.task.setup.objects if spec.model == model)
        return np.subtract(entry["bbox"]["max"], entry["bbox"]["min"]) * scale

    def _contact(self, contact: Any) -> Contact:
        (a, b), (shape_a, shape_b) = contact.bodies, contact.shapes
        impulse = np.sum([point.impulse for point in contact.points], axis=0) if contact.points else np.zeros(3)
        shapes = (list(a.collision_shapes).index(shape_a), list(b.collision_shapes).index(shape_b))
        return Contact(self._bodies[a.entity], self._bodies[b.entity], np.asarray(impulse, dtype=np.float64), shapes)


def _matrix(pose: sapien.Pose) -> np.ndarray:
    return np.asarray(pose.to_transformation_matrix()[:3, :3], dtype=np.float64)


def _angle_deg(a: np.ndarray, b: np.ndarray) -> float:
    """90 for a vector of no length."""
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.degrees(np.arccos(np.clip(a @ b / lengths, -1, 1)))) if lengths > 0 else 90.0
