"""The Google Robot tasks of SimplerEnv: numbered episodes of both suites as `EpisodeSetup`s. Knows no simulator.

Visual matching replaces the room by photographs and varies the robot's colours; variant aggregation has no photograph
and varies stage, light, distractors and camera. Enumeration as in SimplerEnv's scripts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from dualvla.errors import UsageError, did_you_mean
from dualvla_eval.simpler.specs import (
    IDENTITY,
    USUAL_LIGHTS,
    Camera,
    EpisodeSetup,
    Light,
    ObjectSetup,
    Pose,
    Quaternion,
    RobotSetup,
    Stage,
    Station,
    Vector,
    dropped,
)

VISUAL_MATCHING = "simpler-google-vm"
VARIANT_AGGREGATION = "simpler-google-va"
CONTROL_HZ = 3
_SIM_HZ = 513

PICK_COKE_CAN = "google_robot_pick_coke_can"
MOVE_NEAR = "google_robot_move_near"
OPEN_DRAWER = "google_robot_open_drawer"
CLOSE_DRAWER = "google_robot_close_drawer"
PLACE_APPLE = "google_robot_place_apple_in_closed_top_drawer"
MAX_STEPS: Mapping[str, int] = {
    PICK_COKE_CAN: 80,
    MOVE_NEAR: 80,
    OPEN_DRAWER: 113,
    CLOSE_DRAWER: 113,
    PLACE_APPLE: 200,
}
DRAWERS = ("top", "middle", "bottom")
CAN = "opened_coke_can"

XY = tuple[float, float]
_STAGE_POSE = Pose((1.6616, 3.0337, 0.0))
_BASE_Z_M = 0.07905
_QPOS: Mapping[str, float] = {
    "joint_torso": -0.2639457174606611,
    "joint_shoulder": 0.0831913360274175,
    "joint_bicep": 0.5017611504652179,
    "joint_elbow": 1.156859026208673,
    "joint_forearm": 0.028583671314766423,
    "joint_wrist": 1.592598203487462,
    "joint_gripper": -1.080652960128774,
    "joint_finger_right": 0.0,
    "joint_finger_left": 0.0,
    "joint_head_pan": -0.00285961,
    "joint_head_tilt": 0.7851361,
}
_CAMERA = Camera(
    "overhead_camera", "link_camera", Pose(rotation=(0.5, 0.5, -0.5, 0.5)), 640, 512, 425.0, (320.0, 256.0)
)
_PLAIN_MODELS = "info_pick_custom_v0.json"
_BAKED_MODELS = "info_pick_custom_baked_tex_v1.json"
_TABLE_STAGE = "google_pick_coke_can_1_v4"

_EPISODE_SEED = 40194941  # of every episode of the original's scripts


def _spread(low: float, high: float, count: int) -> tuple[float, ...]:
    """np.linspace."""
    return tuple(float(value) for value in np.linspace(low, high, count))


def _about_z(angle_rad: float) -> Quaternion:
    return (math.cos(angle_rad / 2), 0.0, 0.0, math.sin(angle_rad / 2))


# --- what varies ------------------------------------------------------------------------------------------------------

# Robot colours of visual matching: variant -> version of the URDF.
URDFS: Mapping[str, str] = {
    "base": "",
    "tabletop_1": "recolor_tabletop_visual_matching_1",
    "tabletop_2": "recolor_tabletop_visual_matching_2",
    "cabinet_1": "recolor_cabinet_visual_matching_1",
}


def _grey(*lights: tuple[Vector, float]) -> tuple[Light, ...]:
    return tuple(Light(direction, (value,) * 3) for direction, value in lights)


def _cabinet_lights(value: float) -> tuple[Light, ...]:
    """Only the first casts a shadow."""
    first, *others = _grey(((-0.2, 0.0, -1.0), value), ((-1.0, 1.0, -0.05), 0.5), ((-1.0, -1.0, -0.05), 0.5))
    return (replace(first, shadow=True), *others)


_AS_IT_IS = Pose()


@dataclass(frozen=True)
class Variant:
    """One of variant aggregation. extra: see `Stage`. distractors: models beside the can. only_named: no third object.

    robustness: part of the original's robustness study, not of the paper's averages.
    """

    stage: str
    lights: tuple[Light, ...] = USUAL_LIGHTS
    extra: Pose = _AS_IT_IS
    station: str = "mk_station"
    distractors: tuple[str, ...] = ()
    only_named: bool = False
    head_tilt: float | None = None
    robustness: bool = False


_DARKER = _grey(((1.0, 1.0, -1.0), 0.8), ((0.0, 0.0, -1.0), 0.8))
_BRIGHTER = _grey(((0.0, 0.0, -1.0), 3.6), ((-1.0, -0.5, -1.0), 1.3), ((1.0, 1.0, -1.0), 1.3))
_ON_TABLES: Mapping[str, Variant] = {
    "base": Variant(_TABLE_STAGE),
    "background_1": Variant(f"{_TABLE_STAGE}_alt_background"),
    "background_2": Variant(f"{_TABLE_STAGE}_alt_background_2"),
    "darker": Variant(_TABLE_STAGE, _DARKER),
    "brighter": Variant(_TABLE_STAGE, _BRIGHTER),
    "table_1": Variant("Baked_sc1_staging_objaverse_cabinet1_h870"),
    "table_2": Variant("Baked_sc1_staging_objaverse_cabinet2_h870"),
    "camera_1": Variant(_TABLE_STAGE, head_tilt=0.9351361, robustness=True),
    "camera_2": Variant(_TABLE_STAGE, head_tilt=0.6651361, robustness=True),
}
_COKE: Mapping[str, Variant] = {
    **_ON_TABLES,
    "distractors_less": Variant(_TABLE_STAGE, distractors=("opened_pepsi_can", "apple", "sponge", "orange")),
    "distractors_more": Variant(
        _TABLE_STAGE,
        distractors=(
            "opened_7up_can",
            "opened_sprite_can",
            "sponge",
            "orange",
            "opened_fanta_can",
            "bridge_spoon_generated_modified",
        ),
    ),
}
_NEAR: Mapping[str, Variant] = {**_ON_TABLES, "no_distractor": Variant(_TABLE_STAGE, only_named=True)}
_APARTMENT = "frl_apartment_stage_simple"
_AT_CABINET: Mapping[str, Variant] = {
    "base": Variant(_APARTMENT, _cabinet_lights(1.0)),
    "bedroom": Variant(
        "modern_bedroom_no_roof",
        _cabinet_lights(1.0),
        extra=Pose((0.178, -2.235, 1.669), (0.007, 0.0, 0.0, -1.0)),
    ),
    "office": Variant(
        "modern_office_no_roof",
        _cabinet_lights(1.0),
        extra=Pose((-0.192, -1.728, 1.48), (0.709, 0.0, 0.0, -0.705)),
    ),
    "brighter": Variant(_APARTMENT, _cabinet_lights(2.0)),
    "darker": Variant(_APARTMENT, _cabinet_lights(0.5)),
    "station_2": Variant(_APARTMENT, _cabinet_lights(1.0), station="mk_station2"),
    "station_3": Variant(_APARTMENT, _cabinet_lights(1.0), station="mk_station3"),
}
_AGGREGATED: Mapping[str, Mapping[str, Variant]] = {
    PICK_COKE_CAN: _COKE,
    MOVE_NEAR: _NEAR,
    OPEN_DRAWER: _AT_CABINET,
    CLOSE_DRAWER: _AT_CABINET,
    PLACE_APPLE: _AT_CABINET,
}
# What station 3's file refers to beside itself.
_STATION_FILES: Mapping[str, tuple[str, ...]] = {"mk_station3": ("custom/models/stone_tabletop.glb",)}


_COUNTS = {PICK_COKE_CAN: 75, MOVE_NEAR: 60, OPEN_DRAWER: 27, CLOSE_DRAWER: 27, PLACE_APPLE: 27}


def suite_cells(suite: str) -> list[tuple[str, str, int, int]]:
    """Every (task, variant, number of episodes, step limit) of a suite, in the order in which results are listed."""
    return [
        (task, variant, count, MAX_STEPS[task])
        for task, count in _COUNTS.items()
        for variant in (URDFS if suite == VISUAL_MATCHING else _AGGREGATED[task])
    ]


def robustness_variants() -> tuple[str, ...]:
    """Variants of the aggregation that the paper's averages leave out: the camera's."""
    return tuple(name for name, variant in _COKE.items() if variant.robustness)


# --- one episode ------------------------------------------------------------------------------------------------------


def setup(suite: str, task: str, variant: str, episode_id: int) -> EpisodeSetup:
    """Episode `episode_id` of a task in a variant. Raises: UsageError on a name or number there is none of."""
    if task not in _COUNTS:
        raise UsageError(f"Suite '{suite}' has no task '{task}'.", did_you_mean(task, _COUNTS))
    variants = URDFS if suite == VISUAL_MATCHING else _AGGREGATED[task]
    if variant not in variants:
        raise UsageError(f"Task '{task}' has no variant '{variant}'.", did_you_mean(variant, variants))
    if not 0 <= episode_id < _COUNTS[task]:
        raise UsageError(f"Task '{task}' has no episode {episode_id}.", f"ask for 0 to {_COUNTS[task] - 1}")
    aggregated = None if suite == VISUAL_MATCHING else _AGGREGATED[task][variant]
    return _BUILDERS[task](_Request(suite, task, variant, episode_id, aggregated))


def prepackaged(
    task: str, seed: int, xy: XY | None = None, orientation: str | None = None, episode_id: int | None = None
) -> EpisodeSetup:
    """What `simpler_env.make(task)` draws when it is reset with `seed` (and with these options, if given).

    xy: of the can or the apple. orientation: of the can. episode_id: of move near.
    """

    def fresh() -> np.random.RandomState:
        return np.random.RandomState(seed)

    def request(rng: np.random.RandomState) -> _Request:
        versions = ("", *(version for version in URDFS.values() if version))
        by_version = {version: name for name, version in URDFS.items()}
        return _Request(VISUAL_MATCHING, task, by_version[versions[rng.choice(len(versions))]], seed, None)

    if task == PICK_COKE_CAN:
        drawn = ("upright", "laid_vertically", "lr_switch")[fresh().choice(3)]
        x, y = xy or fresh().uniform((-0.35, -0.02), (-0.12, 0.42), 2)
        return _coke_episode(request(fresh()), (float(x), float(y)), ORIENTATIONS[orientation or drawn])
    if task == MOVE_NEAR:
        number = fresh().randint(_COUNTS[task]) if episode_id is None else episode_id
        return _move_near(replace(request(fresh()), episode_id=int(number)))
    rng = fresh()
    drawer = DRAWERS[rng.choice(1 if task == PLACE_APPLE else len(DRAWERS))]
    names = ("a0", "b0", "c0") if task == PLACE_APPLE else tuple(CABINET_POSES)
    name = names[rng.choice(len(names))]
    *stands, yaw = CABINET_POSES[name]
    robot_xy = (stands[0], stands[1])
    if task == PLACE_APPLE:
        x, y = xy or (-0.05, 0.03)
        return _apple_episode(request(rng), (float(x), float(y)), robot_xy, yaw, name)
    return _drawer_episode(request(rng), drawer, robot_xy, yaw, name)


@dataclass(frozen=True)
class _Request:
    """aggregated: None in visual matching."""

    suite: str
    task: str
    variant: str
    episode_id: int
    aggregated: Variant | None

    def robot(self, xy: XY, yaw_rad: float = 0.0, glossy: bool = True) -> RobotSetup:
        """The robot looks along -x; yaw_rad is from there."""
        qpos = dict(_QPOS)
        urdf = ""
        if self.aggregated is None:
            urdf = URDFS[self.variant]
        elif self.aggregated.head_tilt is not None:
            qpos["joint_head_tilt"] = self.aggregated.head_tilt
        pose = Pose((*xy, _BASE_Z_M), _about_z(math.pi + yaw_rad))
        return RobotSetup("google_robot", pose, qpos, urdf, glossy)

    def stage(self, matching: str | None, collides: bool = True) -> Stage:
        """matching: the model in visual matching."""
        if self.aggregated is None:
            return Stage(matching, _STAGE_POSE, collides=collides)
        return Stage(self.aggregated.stage, _STAGE_POSE, self.aggregated.extra, collides)

    def episode(self, **fields: Any) -> EpisodeSetup:
        """What all tasks share."""
        return EpisodeSetup(
            suite=self.suite,
            task=self.task,
            variant=self.variant,
            episode_id=self.episode_id,
            camera=_CAMERA,
            max_steps=MAX_STEPS[self.task],
            control_hz=CONTROL_HZ,
            sim_hz=_SIM_HZ,
            **fields,
        )


# The can: 3 orientations, 5 x 5 places.
ORIENTATIONS: Mapping[str, Quaternion] = {
    "lr_switch": (0.0, 0.0, 0.0, 1.0),
    "upright": (math.sqrt(0.5), math.sqrt(0.5), 0.0, 0.0),
    "laid_vertically": (math.sqrt(0.5), 0.0, 0.0, math.sqrt(0.5)),
}
_CAN_XYS: tuple[XY, ...] = tuple(product(_spread(-0.35, -0.12, 5), _spread(-0.02, 0.42, 5)))
_COKE_XY: XY = (0.35, 0.20)


def _pick_coke_can(request: _Request) -> EpisodeSetup:
    orientation, place = divmod(request.episode_id, len(_CAN_XYS))
    rotation = tuple(ORIENTATIONS.values())[orientation]
    return _coke_episode(request, _CAN_XYS[place], rotation)


def _coke_episode(request: _Request, xy: XY, rotation: Quaternion) -> EpisodeSetup:
    distractors = request.aggregated.distractors if request.aggregated else ()
    return request.episode(
        robot=request.robot(_COKE_XY),
        stage=request.stage(_TABLE_STAGE),
        instructions=("pick coke can",),
        models=_PLAIN_MODELS,
        objects=(dropped(CAN, phrase(CAN), xy, rotation), *_distractors(distractors, xy, rotation)),
        source=CAN,
        overlay="google_coke_can_real_eval_1" if request.aggregated is None else None,
        lights=request.aggregated.lights if request.aggregated else USUAL_LIGHTS,
    )


def _distractors(models: Sequence[str], can_xy: XY, rotation: Quaternion) -> tuple[ObjectSetup, ...]:
    """Dropped around the can, at places drawn as the original draws them in every episode: from the same seed."""
    rng = np.random.RandomState(_EPISODE_SEED)
    placed = []
    for model in models:
        while True:
            xy = np.clip(np.add(can_xy, rng.uniform(-0.3, 0.3, 2)), (-0.5, 0.05), (-0.1, 0.35))
            if np.linalg.norm(xy - can_xy) > 0.25:
                break
        placed.append(replace(dropped(model, phrase(model), (float(xy[0]), float(xy[1])), rotation), later=True))
    return tuple(placed)


# Move near: 5 triplets of models, 2 layouts of the triplet, 6 pairs of source and target.
_TRIPLETS = (
    ("blue_plastic_bottle", "opened_pepsi_can", "orange"),
    ("opened_7up_can", "apple", "sponge"),
    ("opened_coke_can", "opened_redbull_can", "apple"),
    ("sponge", "blue_plastic_bottle", "opened_7up_can"),
    ("orange", "opened_pepsi_can", "opened_redbull_can"),
)
_UNBAKED = ("blue_plastic_bottle", "orange")
_LAYOUTS: tuple[tuple[XY, XY, XY], ...] = (
    ((-0.33, 0.04), (-0.33, 0.34), (-0.13, 0.19)),
    ((-0.13, 0.04), (-0.33, 0.19), (-0.13, 0.34)),
)
_PAIRS = ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1))
_FRUIT_DENSITY = 200.0
_NEAR_XY: XY = (0.35, 0.21)
_NEAR_YAW_RAD = -0.09


def _move_near(request: _Request) -> EpisodeSetup:
    triplet, rest = divmod(request.episode_id, len(_LAYOUTS) * len(_PAIRS))
    layout, pair = divmod(rest, len(_PAIRS))
    matching = request.aggregated is None
    models = tuple(baked(model) if matching else model for model in _TRIPLETS[triplet])
    source, target = (models[i] for i in _PAIRS[pair])
    objects = tuple(
        replace(
            dropped(model, phrase(model), xy, _upright(model), _FRUIT_DENSITY if _is_fruit(model) else None),
            matte=matching,
        )
        for model, xy in zip(models, _LAYOUTS[layout], strict=True)
    )
    if request.aggregated and request.aggregated.only_named:
        objects = tuple(spec for spec in objects if spec.model in (source, target))
    return request.episode(
        robot=request.robot(_NEAR_XY, _NEAR_YAW_RAD),
        stage=request.stage(_TABLE_STAGE),
        instructions=(f"move {phrase(source)} near {phrase(target)}",),
        models=_BAKED_MODELS if matching else _PLAIN_MODELS,
        objects=objects,
        source=source,
        target=target,
        overlay="google_move_near_real_eval_1" if matching else None,
        lights=request.aggregated.lights if request.aggregated else USUAL_LIGHTS,
        contact_offset_m=0.005,
    )


def baked(model: str) -> str:
    """The model with the light of the photograph in its texture, as `simpler_env.make` takes it (v1)."""
    return model if model in _UNBAKED else f"baked_{model}_v2"


def _upright(model: str) -> Quaternion:
    half = math.sqrt(0.5)
    if model.endswith(("_can", "_can_v2")):
        return (half, half, 0.0, 0.0)
    if "bottle" in model:
        return (0.5, 0.5, 0.5, 0.5)
    return (half, 0.0, 0.0, half) if "orange" in model or "sponge" in model else IDENTITY


def _is_fruit(model: str) -> bool:
    return "apple" in model or "orange" in model


# The cabinet: where the robot stands, x, y (m) and yaw (rad).
CABINET_POSES: Mapping[str, tuple[float, float, float]] = {
    "a0": (0.644, -0.179, -0.03),
    "a1": (0.765, -0.182, -0.02),
    "a2": (0.889, -0.203, -0.06),
    "b0": (0.652, 0.009, 0.0),
    "b1": (0.752, 0.009, 0.0),
    "b2": (0.851, 0.035, 0.0),
    "c0": (0.665, 0.224, 0.0),
    "c1": (0.765, 0.222, -0.025),
    "c2": (0.865, 0.222, -0.025),
}
_VARIED_POSES: tuple[XY, ...] = tuple(product((0.65, 0.75, 0.85), (-0.2, 0.0, 0.2)))
_STATION_POSE = Pose((-0.295, 0.0, 0.017))
_OPEN_M = 0.2  # of a drawer that is to be closed
_SUN_RAD = math.radians(75.0)
_CABINET_SUN = _grey(((-math.cos(_SUN_RAD), 0.0, -math.sin(_SUN_RAD)), 1.0))


def _drawer(request: _Request) -> EpisodeSetup:
    number, place = divmod(request.episode_id, 9)
    if request.aggregated is None:
        name, (x, y, yaw) = tuple(CABINET_POSES.items())[place]
    else:
        name, (x, y), yaw = None, _VARIED_POSES[place], 0.0
    return _drawer_episode(request, DRAWERS[number], (x, y), yaw, name)


def _drawer_episode(request: _Request, drawer: str, xy: XY, yaw_rad: float, photo: str | None) -> EpisodeSetup:
    closing = request.task == CLOSE_DRAWER
    return request.episode(
        instructions=(f"{'close' if closing else 'open'} {drawer} drawer",),
        models=_PLAIN_MODELS,
        source=drawer_phrase(drawer),
        **_at_cabinet(request, xy, yaw_rad, photo, {f"{drawer}_drawer_joint": _OPEN_M} if closing else {}),
    )


_APPLE_XYS: tuple[XY, ...] = tuple(product(_spread(-0.08, -0.02, 3), _spread(-0.02, 0.08, 3)))


def _place_apple(request: _Request) -> EpisodeSetup:
    place, spot = divmod(request.episode_id, len(_APPLE_XYS))
    if request.aggregated is None:
        name = ("a0", "b0", "c0")[place]
        x, y, yaw = CABINET_POSES[name]
        return _apple_episode(request, _APPLE_XYS[spot], (x, y), yaw, name)
    return _apple_episode(request, _APPLE_XYS[spot], (0.65, (-0.2, 0.0, 0.2)[place]), 0.0, None)


def _apple_episode(request: _Request, apple_xy: XY, xy: XY, yaw_rad: float, photo: str | None) -> EpisodeSetup:
    matching = request.aggregated is None
    apple = baked("apple") if matching else "apple"
    return request.episode(
        instructions=("open top drawer", f"place {phrase(apple)} into top drawer"),
        models=_BAKED_MODELS if matching else _PLAIN_MODELS,
        objects=(dropped(apple, phrase(apple), apple_xy, IDENTITY),),
        source=apple,
        target=drawer_phrase("top"),
        contact_offset_m=0.005,
        **_at_cabinet(request, xy, yaw_rad, photo, {}),
    )


def _at_cabinet(
    request: _Request, xy: XY, yaw_rad: float, photo: str | None, drawers: Mapping[str, float]
) -> dict[str, Any]:
    """drawers: joint -> m it starts open. photo: name of the pose in visual matching."""
    matching = request.aggregated is None
    lights: dict[str, Any] = {"lights": _CABINET_SUN, "ambient": (1.0, 1.0, 1.0)}
    station = "mk_station_recolor"
    if request.aggregated is not None:
        lights, station = {"lights": request.aggregated.lights}, request.aggregated.station
    return {
        "robot": request.robot(xy, yaw_rad, glossy=not matching),
        "stage": request.stage(None, collides=False),
        "overlay": f"open_drawer_{photo}" if matching else None,
        "station": Station(station, _STATION_POSE, dict(drawers), _STATION_FILES.get(station, ())),
        **lights,
    }


_BUILDERS: Mapping[str, Callable[[_Request], EpisodeSetup]] = {
    PICK_COKE_CAN: _pick_coke_can,
    MOVE_NEAR: _move_near,
    OPEN_DRAWER: _drawer,
    CLOSE_DRAWER: _drawer,
    PLACE_APPLE: _place_apple,
}


# --- names ------------------------------------------------------------------------------------------------------------

_DROPPED_WORDS = frozenset(("opened", "light", "generated", "modified", "objaverse", "bridge", "baked", "v2"))


def phrase(model: str) -> str:
    """As instructions call a model: "baked_opened_7up_can_v2" is "7up can"."""
    words = model.split("_")
    return " ".join(word for word in words if word not in _DROPPED_WORDS and not word.endswith("cm"))


def drawer_phrase(drawer: str) -> str:
    """drawer: "top", "middle" or "bottom"."""
    return f"{drawer} drawer"
