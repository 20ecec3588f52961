"""The convex pieces of a collision mesh, cut as the original's simulator cut them. Knows files and shapes only.

SAPIEN 2 made one convex shape of each connected part of a file, vertices at one place being one vertex. SAPIEN 3 makes
one of each object that the file names: the spoon, one object of four parts, would weigh 1.8 times as much and lie
otherwise, and the orange would roll away. Which of nearly coplanar vertices a hull keeps, and so how a can stands,
depends on their order; here it is SAPIEN 2's.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import sapien
from mani_skill.utils.building.actor_builder import ActorBuilder

from dualvla.errors import DataError

_FIX = "the model is damaged: run `dualvla assets fetch` again"


class PiecewiseBuilder(ActorBuilder):
    """An actor with one convex shape for each of `convex_pieces`."""

    def add_pieces(self, file: str, scale: float, material: sapien.physx.PhysxMaterial, density: float) -> None:
        """material: of the surface. density: in kg/m^3."""
        self._pieces = (file, scale, material, density)

    def build_physx_component(self, link_parent: object = None) -> sapien.physx.PhysxRigidBodyComponent:
        component = super().build_physx_component(link_parent)
        file, scale, material, density = self._pieces
        for vertices in convex_pieces(file):
            shape = sapien.physx.PhysxCollisionShapeConvexMesh(
                vertices=vertices, scale=np.full(3, scale, dtype=np.float32), material=material
            )
            shape.set_collision_groups(self.collision_groups)
            shape.set_density(density)
            component.attach(shape)
        return component


@cache
def convex_pieces(file: str) -> tuple[np.ndarray, ...]:
    """float32 [V, 3] a piece, in m. file: Wavefront OBJ. Raises: DataError where it is none."""
    return tuple(piece for polygons in _objects(file) for piece in _connected(polygons))


def _objects(file: str) -> list[list[np.ndarray]]:
    """The polygons of each object, float32 [corners, 3] each, in the file's order: loaders of meshes keep another."""
    places: list[list[float]] = []
    objects: list[list[np.ndarray]] = [[]]
    for number, line in enumerate(Path(file).read_text().splitlines(), 1):
        kind, *words = line.split() or [""]
        try:
            if kind == "v":
                places.append([float(word) for word in words[:3]])
            elif kind in ("o", "g"):
                objects.append([])
            elif kind == "f":
                corners = [int(word.split("/")[0]) for word in words]
                objects[-1].append(np.array([places[c - 1 if c > 0 else c] for c in corners], dtype=np.float32))
        except (ValueError, IndexError) as error:
            raise DataError(f"line {number} of '{file}' is no OBJ's: '{line.strip()}'.", _FIX) from error
    return [polygons for polygons in objects if polygons]


def _connected(polygons: list[np.ndarray]) -> list[np.ndarray]:
    """Vertices of each connected part, depth first, neighbours by their first appearance."""
    numbers: dict[bytes, int] = {}
    places: list[np.ndarray] = []
    neighbours: list[set[int]] = []
    for polygon in polygons:
        corners = []
        for place in polygon + 0.0:  # no negative zeros
            if numbers.setdefault(place.tobytes(), len(places)) == len(places):
                places.append(place)
                neighbours.append(set())
            corners.append(numbers[place.tobytes()])
        first = corners[0]
        for a, b in zip(corners, [*corners[1:], first], strict=True):
            for one, other in ((a, b), (first, b)):  # the edge, and its triangle's third side
                neighbours[one].add(other)
                neighbours[other].add(one)
    parts, seen = [], [False] * len(places)
    for start in range(len(places)):
        if not seen[start]:
            part, waiting, seen[start] = [start], [start], True
            while waiting:
                found = [i for i in sorted(neighbours[waiting.pop()]) if not seen[i]]
                for i in found:
                    seen[i] = True
                part += found
                waiting += found
            parts.append(np.array([places[i] for i in part]))
    return parts
