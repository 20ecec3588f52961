"""What one SimplerEnv episode is made of, as frozen data: stage, objects, robot, camera, lights, rates, instruction.

Knows no simulator and reads no files. Units: m, rad, kg/m^3, Hz; quaternions are [w, x, y, z]; poses are of the world
(z up, the floor of the original's stages at 0) unless a field says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Vector = tuple[float, float, float]
Quaternion = tuple[float, float, float, float]

IDENTITY: Quaternion = (1.0, 0.0, 0.0, 0.0)
TABLE_HEIGHT_M = 0.87  # the original's: used only as the height from which objects are dropped
DROP_M = 0.5


@dataclass(frozen=True)
class Pose:
    position: Vector = (0.0, 0.0, 0.0)
    rotation: Quaternion = IDENTITY


@dataclass(frozen=True)
class ObjectSetup:
    """One movable model. pose: where it is dropped, or where it stays if it is `locked`.

    phrase: what reasoning, events and judges call it ("yellow block"). density: None takes the table's of the model.
    photo: in pictures with an overlay it is replaced by the photograph, like the stage. matte: drawn with roughness 1,
    no metal, no gloss. later: dropped one by one after the others have settled (and undamped, as in the original).
    """

    model: str
    phrase: str
    pose: Pose
    density: float | None = None
    scale: float = 1.0
    locked: bool = False
    photo: bool = False
    matte: bool = False
    later: bool = False


@dataclass(frozen=True)
class Light:
    """A directional light. color: radiance per channel."""

    direction: Vector
    color: Vector
    shadow: bool = False


@dataclass(frozen=True)
class Camera:
    """A pinhole camera on a link of the robot. pose: in the frame of the link, looking along its x axis."""

    name: str
    link: str
    pose: Pose
    width: int
    height: int
    focal_px: float
    center_px: tuple[float, float]
    near_m: float = 0.1
    far_m: float = 10.0


@dataclass(frozen=True)
class Stage:
    """The room. model: a file of the assets' `stages`, None for the plain white floor of the drawer scenes.

    pose: of the whole stage; extra: multiplied in front of the rotation that makes the file's y axis point up.
    """

    model: str | None
    pose: Pose
    extra: Pose = Pose()
    collides: bool = True


@dataclass(frozen=True)
class RobotSetup:
    """kind: "widowx" or "google_robot". urdf: version of the file ("" is the plain one). qpos: joint name -> rad or m.

    glossy: the original's render material (specular 0.9, roughness 0.3).
    """

    kind: str
    pose: Pose
    qpos: Mapping[str, float]
    urdf: str = ""
    glossy: bool = True


@dataclass(frozen=True)
class Station:
    """The cabinet. model: a URDF of the assets' `custom`. qpos: drawer joint -> m it starts open. files: what the URDF
    refers to."""

    model: str
    pose: Pose
    qpos: Mapping[str, float]
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class EpisodeSetup:
    """A whole episode before it starts: a pure function of (task, variant, episode_id).

    models: which table of the assets' `custom` describes the objects. source, target: the models the instruction is
    about, or (for drawers) the joint's name. overlay: a photograph of the assets' `real_inpainting`.
    instructions: the texts in order; all tasks but one have one.
    """

    suite: str
    task: str
    variant: str
    episode_id: int
    robot: RobotSetup
    camera: Camera
    stage: Stage
    instructions: tuple[str, ...]
    max_steps: int
    control_hz: int
    sim_hz: int
    models: str
    objects: tuple[ObjectSetup, ...] = ()
    source: str | None = None
    target: str | None = None
    overlay: str | None = None
    ambient: Vector = (0.3, 0.3, 0.3)
    lights: tuple[Light, ...] = ()
    contact_offset_m: float = 0.02
    station: Station | None = None

    @property
    def assets(self) -> tuple[str, ...]:
        """Every file or folder of the assets it needs, relative to their root."""
        names = [f"custom/{self.models}", *(f"custom/models/{o.model}" for o in self.objects)]
        if self.stage.model:
            names.append(f"stages/{self.stage.model}.glb")
        if self.overlay:
            names.append(f"real_inpainting/{self.overlay}.png")
        if self.station:
            names += [f"custom/{self.station.model}.urdf", *self.station.files]
        names.append(f"robots/{ROBOT_FOLDERS[self.robot.kind]}")
        return tuple(dict.fromkeys(names))


ROBOT_FOLDERS = {"widowx": "widowx", "google_robot": "googlerobot"}

# Ambient 0.3 and these three lights, everywhere but in the sink and drawer scenes.
USUAL_LIGHTS = (
    Light((0.0, 0.0, -1.0), (2.2, 2.2, 2.2)),
    Light((-1.0, -0.5, -1.0), (0.7, 0.7, 0.7)),
    Light((1.0, 1.0, -1.0), (0.7, 0.7, 0.7)),
)


def dropped(
    model: str, phrase: str, xy: tuple[float, float], rotation: Quaternion, density: float | None = None
) -> ObjectSetup:
    """An object that falls onto the table."""
    return ObjectSetup(model, phrase, Pose((*xy, TABLE_HEIGHT_M + DROP_M), rotation), density)
