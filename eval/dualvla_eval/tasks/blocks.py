"""The five tabletop tasks of suite `blocks`: what lies where, what is asked, and when it is done. Knows no simulator.

A layout is a pure function of (task, seed). Colours are unique within a scene, so that an instruction names one object.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dualvla.errors import UsageError, did_you_mean
from dualvla_eval.sim.base import SceneState

BLOCK_SIZE_M = 0.05
BIN_SIZE_M = (0.13, 0.13, 0.05)  # outside; the walls are BIN_WALL_M thick
BIN_WALL_M = 0.008
BIN = "bin"
SHAPES = ("cube", "cylinder", "sphere")

# sRGB-like base colours, far apart at 64 px. No white (the robot) and no grey (the table).
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.80, 0.04, 0.04),
    "green": (0.04, 0.50, 0.08),
    "blue": (0.04, 0.10, 0.85),
    "yellow": (0.95, 0.75, 0.03),
    "purple": (0.50, 0.06, 0.60),
    "cyan": (0.04, 0.75, 0.80),
}

# Where centres of objects may lie: 26 x 40 cm in front of the robot, all of it in view.
_LOW_M, _HIGH_M = np.array([0.425, -0.21]), np.array([0.685, 0.19])
_SPACING_M = 0.10  # between centres: an open gripper fits between two blocks
_BIN_SPACING_M = 0.14
_START_LOW_M, _START_HIGH_M = np.array([0.40, -0.10, 0.16]), np.array([0.48, 0.08, 0.21])
_MAX_YAW_RAD = 0.25

_LIFTED_M = 0.05
_LIFTED_WRONG_M = 0.03
_DISTURBED_M = 0.03
_NEAR_M = 0.09  # between centres: at most a block's width of free space less a little
_MOVED_M = 0.03
_ON_TOP_M = 0.02  # vertical tolerance of SimplerEnv's stacking test
_REACH_LOW_M, _REACH_HIGH_M = np.array([0.28, -0.42, -0.05]), np.array([0.85, 0.40, 1.0])


@dataclass(frozen=True)
class ObjectSpec:
    """An object before the episode starts. position: centre [x, y, z], m."""

    name: str
    shape: str
    color: str | None
    position: tuple[float, float, float]
    yaw_rad: float
    size: tuple[float, float, float]


@dataclass(frozen=True)
class Layout:
    """A scene and what is asked in it. start_position: tool centre point at reset, m."""

    objects: tuple[ObjectSpec, ...]
    target: str
    reference: str | None
    template: str
    start_position: tuple[float, float, float]

    def instruction(self, target: str | None = None) -> str:
        """The instruction, or the same sentence about another object."""
        a = target or self.target
        b = self.reference if self.reference != a else self.target  # "stack B on B" becomes "stack B on A"
        return self.template.format(a=a, b=b)


@dataclass(frozen=True)
class BlocksTask:
    """counts: number of blocks -> probability. success and failure look at the state at the end of a control step."""

    name: str
    max_steps: int
    templates: tuple[str, ...]
    counts: dict[int, float]
    success: Callable[[SceneState], bool]
    failure: Callable[[SceneState], str | None]
    rule: str
    target_shapes: tuple[str, ...] = SHAPES
    reference_shapes: tuple[str, ...] = field(default=())  # empty: the task names no second block
    has_bin: bool = False
    target_spacing_m: float = _SPACING_M  # between target and reference


# --- success and failure ----------------------------------------------------------------------------------------------


def _touched(s: SceneState) -> bool:
    return s.touched[:1] == (s.target,)


def _wrong_touch(s: SceneState) -> str | None:
    return f"touched the {s.touched[0]} first" if s.touched and s.touched[0] != s.target else None


def _picked(s: SceneState) -> bool:
    return s.held == s.target and s.object(s.target).lifted_m > _LIFTED_M


def _wrong_lift(s: SceneState) -> str | None:
    """Also: the target is where no one can reach it."""
    for o in s.objects:
        if o.name not in (s.target, BIN) and s.held == o.name and o.lifted_m > _LIFTED_WRONG_M:
            return f"lifted the {o.name}"
    position = np.array(s.object(s.target).position)
    if np.any(position < _REACH_LOW_M) or np.any(position > _REACH_HIGH_M):
        return f"lost the {s.target}"
    return None


def _released(s: SceneState) -> bool:
    return s.still and s.held is None and "robot" not in s.touching(s.target)


def _stacked(s: SceneState) -> bool:
    """SimplerEnv's test: over the support, at the right height, touching nothing else, let go of."""
    a, b = s.object(s.target), s.object(s.reference or "")
    offset = np.subtract(a.position, b.position)
    over = np.hypot(offset[0], offset[1]) <= b.size[0] / 2 + 0.003
    height = abs(offset[2] - (a.size[2] + b.size[2]) / 2) <= _ON_TOP_M
    return bool(over and height and _released(s) and s.touching(a.name) == {b.name})


def _near(s: SceneState) -> bool:
    """SimplerEnv's test: the target moved and ended near the reference, nearer to it than to anything else."""
    a = s.object(s.target)
    distance = {o.name: float(np.linalg.norm(np.subtract(a.position, o.position))) for o in s.objects if o is not a}
    near = distance[s.reference or ""]
    return (
        _released(s)
        and a.displaced_m > _MOVED_M
        and near <= _NEAR_M
        and near <= min(distance.values()) + 0.01
        and "table" in s.touching(a.name)
        and _disturbed(s) is None
    )


def _disturbed(s: SceneState) -> str | None:
    for o in s.objects:
        if o.name not in (s.target, s.reference) and o.displaced_m > _DISTURBED_M:
            return f"moved the {o.name}"
    return None


def _wrong_lift_or_disturbed(s: SceneState) -> str | None:
    return _wrong_lift(s) or _disturbed(s)


def _binned(s: SceneState) -> bool:
    a, b = s.object(s.target), s.object(BIN)
    inside = np.abs(np.subtract(a.position, b.position))[:2] < np.array(b.size[:2]) / 2 - BIN_WALL_M
    return bool(inside.all() and a.position[2] < b.size[2] and _released(s))


_TASKS = (
    BlocksTask(
        "touch",
        max_steps=30,
        templates=(
            "touch the {a}",
            "tap the {a}",
            "reach out and touch the {a}",
            "put the gripper on the {a}",
        ),
        # So that going for a random object succeeds in about 46 % of the episodes.
        counts={2: 0.75, 3: 0.2, 4: 0.05},
        success=_touched,
        failure=_wrong_touch,
        rule="the robot's first contact with any object is with the named one",
    ),
    BlocksTask(
        "pick",
        max_steps=45,
        templates=("pick up the {a}", "lift the {a}", "grab the {a} and lift it", "take the {a}"),
        counts={2: 0.6, 3: 0.3, 4: 0.1},
        success=_picked,
        failure=_wrong_lift,
        rule="the named object is held more than 5 cm above where it lay",
    ),
    BlocksTask(
        "stack",
        max_steps=70,
        templates=(
            "stack the {a} on the {b}",
            "put the {a} on top of the {b}",
            "place the {a} on the {b}",
        ),
        counts={2: 0.6, 3: 0.4},
        success=_stacked,
        failure=_wrong_lift,
        rule="the named object rests on the other one alone, released and still",
        target_shapes=("cube", "cylinder"),
        reference_shapes=("cube", "cylinder"),
    ),
    BlocksTask(
        "move_near",
        max_steps=70,
        templates=(
            "move the {a} near the {b}",
            "bring the {a} next to the {b}",
            "place the {a} close to the {b}",
        ),
        counts={2: 0.3, 3: 0.7},
        success=_near,
        failure=_wrong_lift_or_disturbed,
        rule="the named object stands on the table within 9 cm of the other (centres), released, the rest undisturbed",
        target_shapes=("cube", "cylinder"),
        reference_shapes=("cube", "cylinder"),
        target_spacing_m=0.15,
    ),
    BlocksTask(
        "put_in_bin",
        max_steps=70,
        templates=("put the {a} in the bin", "drop the {a} into the bin", "place the {a} in the bin"),
        counts={1: 0.2, 2: 0.6, 3: 0.2},
        success=_binned,
        failure=_wrong_lift,
        rule="the named object lies inside the bin, released and still",
        has_bin=True,
    ),
)
# Not a task: the scenes that questions are asked about.
QA_SCENE = BlocksTask(
    "touch", 30, ("",), counts={2: 0.33, 3: 0.34, 4: 0.33}, success=_touched, failure=_wrong_touch, rule=""
)
TASKS: dict[str, BlocksTask] = {task.name: task for task in _TASKS}


def get_task(name: str) -> BlocksTask:
    """Raises: UsageError."""
    if name not in TASKS:
        raise UsageError(f"Suite 'blocks' has no task '{name}'.", did_you_mean(name, TASKS))
    return TASKS[name]


# --- layouts ----------------------------------------------------------------------------------------------------------


def sample_layout(task: BlocksTask, seed: int) -> Layout:
    """The scene of one episode: a pure function of its arguments."""
    rng = np.random.default_rng(seed)
    count = int(rng.choice(list(task.counts), p=list(task.counts.values())))
    colors = [str(c) for c in rng.permutation(list(COLORS))[:count]]
    shapes = [str(s) for s in rng.choice(SHAPES, size=count)]
    shapes[0] = str(rng.choice(task.target_shapes))
    if task.reference_shapes:
        shapes[1] = str(rng.choice(task.reference_shapes))
    names = [f"{color} {shape}" for color, shape in zip(colors, shapes, strict=True)]
    positions = _sample_positions(rng, count, task)
    blocks = [
        ObjectSpec(
            name=name,
            shape=shape,
            color=color,
            position=(float(x), float(y), BLOCK_SIZE_M / 2),
            yaw_rad=float(rng.uniform(-_MAX_YAW_RAD, _MAX_YAW_RAD)),
            size=(BLOCK_SIZE_M,) * 3,
        )
        for name, shape, color, (x, y) in zip(names, shapes, colors, positions, strict=False)
    ]
    objects = [blocks[i] for i in rng.permutation(count)]
    reference = names[1] if task.reference_shapes else None
    if task.has_bin:
        x, y = positions[-1]
        objects.append(ObjectSpec(BIN, BIN, None, (float(x), float(y), BIN_SIZE_M[2] / 2), 0.0, BIN_SIZE_M))
        reference = BIN
    x, y, z = rng.uniform(_START_LOW_M, _START_HIGH_M)
    return Layout(
        objects=tuple(objects),
        target=names[0],
        reference=reference,
        template=str(rng.choice(task.templates)),
        start_position=(float(x), float(y), float(z)),
    )


def _sample_positions(rng: np.random.Generator, count: int, task: BlocksTask) -> np.ndarray:
    """Centres [count (+ 1 for a bin, last), 2], m. Rejection sampling: the whole arrangement is drawn until it fits."""
    total = count + task.has_bin
    spacing = np.full((total, total), _SPACING_M)
    if task.reference_shapes:
        spacing[0, 1] = spacing[1, 0] = task.target_spacing_m
    if task.has_bin:
        spacing[-1, :] = spacing[:, -1] = _BIN_SPACING_M
    upper = np.triu_indices(total, 1)
    while True:
        positions = rng.uniform(_LOW_M, _HIGH_M, size=(total, 2))
        distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
        if np.all(distances[upper] >= spacing[upper]):
            return positions
