"""The four WidowX tasks of SimplerEnv: their numbered episodes as `EpisodeSetup`s. Knows no simulator."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

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
    Vector,
    dropped,
)

SUITE = "simpler-widowx"
NUM_EPISODES = 24
CONTROL_HZ = 5
_SIM_HZ = 500
_STAGE_OFFSET: Vector = (2.0634, 2.8313, 0.0)
_HALF_TURN: Quaternion = (0.0, 0.0, 0.0, 1.0)
_CENTER = (-0.16, 0.0)

_JOINTS = (
    "waist",
    "shoulder",
    "elbow",
    "forearm_roll",
    "wrist_angle",
    "wrist_rotate",
    "left_finger",
    "right_finger",
)
_TABLE_ROBOT = RobotSetup(
    "widowx",
    Pose((0.147, 0.028, 0.870), _HALF_TURN),
    dict(
        zip(
            _JOINTS,
            (-0.01840777, 0.0398835, 0.22242722, -0.00460194, 1.36524296, 0.00153398, 0.037, 0.037),
            strict=True,
        )
    ),
)
_SINK_ROBOT = RobotSetup(
    "widowx",
    Pose((0.127, 0.06, 0.85), _HALF_TURN),
    dict(
        zip(
            _JOINTS,
            (-0.2600599, -0.12875618, 0.04461369, -0.00652761, 1.7033415, -0.26983038, 0.037, 0.037),
            strict=True,
        )
    ),
)


def _camera(pose: Pose, near_m: float) -> Camera:
    return Camera("3rd_view_camera", "base_link", pose, 640, 480, 623.588, (319.501, 239.545), near_m)


_TABLE_CAMERA = _camera(Pose((0.0, -0.16, 0.36), (0.8992917, -0.09263245, 0.35892478, 0.23209205)), 0.1)
_SINK_CAMERA = _camera(Pose((-0.003, -0.21, 0.39), (-0.907313, 0.0782, -0.36434, -0.194741)), 0.01)
_SINK_LIGHTS = (Light((0.0, 0.0, -1.0), (0.3, 0.3, 0.3)),)

SINK = "sink"
SINK_PLANE = "dummy_sink_target_plane"
_SINK_POSE = Pose((-0.16, 0.13, 0.88))
_SINK_PLANE_XY = (-0.125, 0.025)


@dataclass(frozen=True)
class WidowXTask:
    """source, target: models. phrases: how reasoning calls them. rule: the success test in words.

    Success wants the source over the target, resting at most `max_gap_m` above it, and, with `alone`, touching nothing
    but the target and the robot.
    """

    name: str
    source: str
    target: str
    source_phrase: str
    target_phrase: str
    instruction: str
    max_steps: int
    alone: bool
    max_gap_m: float
    models: str = "info_bridge_custom_v0.json"


_TASKS = (
    WidowXTask(
        "widowx_spoon_on_towel",
        "bridge_spoon_generated_modified",
        "table_cloth_generated_shorter",
        "spoon",
        "towel",
        "put the spoon on the towel",
        60,
        alone=False,
        max_gap_m=0.02,
    ),
    WidowXTask(
        "widowx_carrot_on_plate",
        "bridge_carrot_generated_modified",
        "bridge_plate_objaverse_larger",
        "carrot",
        "plate",
        "put carrot on plate",
        60,
        alone=True,
        max_gap_m=0.02,
    ),
    WidowXTask(
        "widowx_stack_cube",
        "baked_green_cube_3cm",
        "baked_yellow_cube_3cm",
        "green block",
        "yellow block",
        "stack the green block on the yellow block",
        60,
        alone=True,
        max_gap_m=0.02,
        models="info_bridge_custom_baked_tex_v0.json",
    ),
    WidowXTask(
        "widowx_put_eggplant_in_basket",
        "eggplant",
        SINK_PLANE,
        "eggplant",
        "yellow basket",
        "put eggplant into yellow basket",
        120,
        alone=False,
        max_gap_m=0.06,
    ),
)
TASKS = {task.name: task for task in _TASKS}


def get_task(name: str) -> WidowXTask:
    """Raises: UsageError."""
    if name not in TASKS:
        raise UsageError(f"Suite '{SUITE}' has no task '{name}'.", did_you_mean(name, TASKS))
    return TASKS[name]


def suite_cells() -> list[tuple[str, str, int, int]]:
    """Every (task, variant, number of episodes, step limit), in the order in which results are listed."""
    return [(task.name, "base", NUM_EPISODES, task.max_steps) for task in _TASKS]


def rules() -> dict[str, str]:
    """The success tests in words."""
    return {
        f"success of {task.name}": f"the {task.source_phrase} is over the {task.target_phrase}, at most "
        f"{100 * task.max_gap_m:.0f} cm above it" + (", and touches nothing else but the robot" if task.alone else "")
        for task in _TASKS
    }


def setup(name: str, episode_id: int) -> EpisodeSetup:
    """Episode 0..23 of a task. Raises: UsageError."""
    task = get_task(name)
    if not 0 <= episode_id < NUM_EPISODES:
        raise UsageError(f"Task '{name}' has no episode {episode_id}.", f"ask for 0 to {NUM_EPISODES - 1}")
    source_xy, target_xy, source_rotation = _layout(task, episode_id)
    sink = task.target == SINK_PLANE
    objects: tuple[ObjectSetup, ...] = (
        dropped(task.source, task.source_phrase, source_xy, source_rotation),
        dropped(task.target, task.target_phrase, target_xy, IDENTITY),
    )
    if sink:
        fallen, plane = objects
        objects = (fallen, replace(plane, photo=True), ObjectSetup(SINK, SINK, _SINK_POSE, locked=True, photo=True))
    return EpisodeSetup(
        suite=SUITE,
        task=name,
        variant="base",
        episode_id=episode_id,
        robot=_SINK_ROBOT if sink else _TABLE_ROBOT,
        camera=_SINK_CAMERA if sink else _TABLE_CAMERA,
        stage=Stage("bridge_table_1_v2" if sink else "bridge_table_1_v1", Pose(_STAGE_OFFSET)),
        instructions=(task.instruction,),
        max_steps=task.max_steps,
        control_hz=CONTROL_HZ,
        sim_hz=_SIM_HZ,
        models=task.models,
        objects=objects,
        source=task.source,
        target=task.target,
        overlay="bridge_sink" if sink else "bridge_real_eval_1",
        lights=_SINK_LIGHTS if sink else USUAL_LIGHTS,
        contact_offset_m=0.005,
    )


XY = tuple[float, float]


def _layout(task: WidowXTask, episode_id: int) -> tuple[XY, XY, Quaternion]:
    """Where source and target are dropped, and how the source is turned."""
    if task.target == SINK_PLANE:
        spot, turn = divmod(episode_id, 3)
        x, y = list(product((-0.115, -0.095), (0.191, 0.201, 0.211, 0.221)))[spot]
        return (x, y), _SINK_PLANE_XY, _about_z((0.0, 45.0, -45.0)[turn])
    if task.name == "widowx_stack_cube":
        pairs = _corner_pairs(0.05) + _corner_pairs(0.1)
        return (*pairs[episode_id], IDENTITY)
    pair, turn = divmod(episode_id, 2)
    turns = (0.0, 90.0) if task.name == "widowx_spoon_on_towel" else (180.0, -90.0)
    return (*_corner_pairs(0.075)[pair], _about_z(turns[turn]))


def _corner_pairs(half_edge_m: float) -> list[tuple[XY, XY]]:
    """Ordered pairs of different corners of a square."""
    x, y = _CENTER
    corners = [(x + i * half_edge_m, y + j * half_edge_m) for i, j in product((-1, 1), (-1, 1))]
    return [(a, b) for a, b in product(corners, corners) if a != b]


def _about_z(degrees: float) -> Quaternion:
    half = math.radians(degrees) / 2
    return (math.cos(half), 0.0, 0.0, math.sin(half))
