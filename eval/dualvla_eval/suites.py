"""Suites: which tasks there are, their numbered evaluation episodes, and how to make their environment.

Imports no simulator: `make_env` does, when it is called.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dualvla.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from dualvla_eval.sim.base import SimEnv

Purpose = Literal["evaluation", "training", "qa_train", "qa_test"]

# The top bits of every scene seed say what it is for, so that no two purposes can ever share a scene.
_PURPOSE_CODE: dict[Purpose, int] = {"evaluation": 1, "training": 2, "qa_train": 3, "qa_test": 4}
_SEED_BITS = 56

SUITES = (
    "blocks",
    "simpler-widowx",
    "simpler-google-vm",
    "simpler-google-va",
    "maniskill2",
    "maniskill2-simpler-widowx",
    "maniskill2-simpler-google",
)


@dataclass(frozen=True)
class TaskSpec:
    """One task in one variant. num_episodes: how many numbered evaluation episodes there are."""

    name: str
    max_steps: int
    num_episodes: int
    variant: str = "base"


@dataclass(frozen=True)
class Episode:
    """One scene and one instruction: the seed says all. Below 2^60, so that it fits an int64 column."""

    suite: str
    task: str
    variant: str
    episode_id: int
    seed: int


def _no_assets() -> Mapping[str, Sequence[str]]:
    return {"used": [], "substituted": []}


def _this_process() -> Mapping[str, str]:
    return {}


def _nothing_to_check(tasks: Sequence[TaskSpec]) -> None:
    """For suites that need no files."""


@dataclass(frozen=True)
class Suite:
    """conventions: name -> what a user of the numbers must know.

    variants: the looks in which demonstrations can be made; the first is the usual one. tasks: one entry for each task
    and variant that is evaluated. default_conventions: what `dualvla eval` does unless told otherwise, by the names of
    `dualvla_eval.conventions`. means: name of a mean -> the tasks that it is over. robustness_variants: variants that
    are rolled out but are part of no task's rate and of no mean. assets: "used" and "substituted", names of files.
    check: raises DataError or PlatformError, naming what is missing, if some of these tasks cannot run here. simulator:
    package -> version, where it runs in another interpreter than ours. expert: whether there is a scripted one.
    """

    name: str
    tasks: tuple[TaskSpec, ...]
    action_space: str
    control_hz: float
    cameras: tuple[str, ...]
    make_env: Callable[[], SimEnv]
    conventions: Mapping[str, str]
    variants: tuple[str, ...] = ("base",)
    default_conventions: Mapping[str, Any] = field(default_factory=dict)
    means: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    robustness_variants: tuple[str, ...] = ()
    assets: Callable[[], Mapping[str, Sequence[str]]] = _no_assets
    check: Callable[[Sequence[TaskSpec]], None] = _nothing_to_check
    simulator: Callable[[], Mapping[str, str]] = _this_process
    expert: bool = True

    def need_expert(self) -> None:
        """Raises: UsageError if nobody has scripted one."""
        if not self.expert:
            raise UsageError(
                f"Suite '{self.name}' has no expert.", "evaluate random, a checkpoint or an endpoint on it"
            )

    def task(self, name: str, variant: str | None = None) -> TaskSpec:
        """variant: default, the first that the suite lists for this task. Raises: UsageError."""
        of_name = [task for task in self.tasks if task.name == name]
        if not of_name:
            raise UsageError(f"Suite '{self.name}' has no task '{name}'.", did_you_mean(name, self.task_names))
        found = [task for task in of_name if variant in (None, task.variant)]
        if not found:
            names = [task.variant for task in of_name]
            raise UsageError(f"Task '{name}' has no variant '{variant}'.", did_you_mean(f"{variant}", names))
        return found[0]

    @property
    def task_names(self) -> list[str]:
        return list(dict.fromkeys(task.name for task in self.tasks))

    def episodes(self, task: str, count: int | None = None, variant: str | None = None) -> list[Episode]:
        """The evaluation episodes 0..count-1 (default: all) of a task in one variant: always the same ones.

        Raises: UsageError.
        """
        spec = self.task(task, variant)
        count = spec.num_episodes if count is None else count
        if not 0 < count <= spec.num_episodes:
            raise UsageError(
                f"Task '{task}' has {spec.num_episodes} evaluation episodes, not {count}.",
                f"ask for 1 to {spec.num_episodes}",
            )
        return [
            Episode(self.name, task, spec.variant, i, scene_seed("evaluation", self.name, task, spec.variant, i))
            for i in range(count)
        ]

    def training_episode(
        self, task: str, index: int, seed: int, attempt: int = 0, variant: str | None = None
    ) -> Episode:
        """Demonstration `index` of a data set made with `seed`; another `attempt` or `variant` is another scene.

        variant: default, the task's own. Raises: UsageError on an unknown one.
        """
        variant = variant or self.task(task).variant
        if variant not in self.variants:
            raise UsageError(f"Suite '{self.name}' has no variant '{variant}'.", did_you_mean(variant, self.variants))
        return Episode(
            self.name, task, variant, index, scene_seed("training", self.name, task, variant, seed, index, attempt)
        )

    def training_episodes(self, task: str, count: int, seed: int) -> list[Episode]:
        """Disjoint from the evaluation episodes, whatever the seed."""
        return [self.training_episode(task, i, seed) for i in range(count)]


def scene_seed(purpose: Purpose, *key: str | int) -> int:
    """The seed of one scene: its purpose in the top bits, a hash of the key below."""
    digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    return (_PURPOSE_CODE[purpose] << _SEED_BITS) | (int.from_bytes(digest[:8]) >> (64 - _SEED_BITS))


def is_training(seed: int) -> bool:
    """Whether it is the seed of a demonstration's scene."""
    return seed >> _SEED_BITS == _PURPOSE_CODE["training"]


def get_suite(name: str, assets: str | None = None) -> Suite:
    """assets: folder of the suite's files, for those that need some. Raises: UsageError on an unknown name."""
    if name not in SUITES:
        raise UsageError(f"Unknown suite '{name}'.", did_you_mean(name, SUITES))
    if name == "blocks":
        return _blocks()
    if name.startswith("maniskill2"):
        from dualvla_eval.maniskill2.suite import original_suite

        return original_suite(name, assets)
    from dualvla_eval.simpler.suite import simpler_suite

    return simpler_suite(name, assets)


def _make_blocks_env() -> SimEnv:
    from dualvla_eval.sim.blocks import BlocksEnv

    return BlocksEnv()


def _blocks() -> Suite:
    from dualvla_eval.sim.looks import VARIANTS
    from dualvla_eval.tasks.blocks import TASKS

    return Suite(
        name="blocks",
        tasks=tuple(TaskSpec(task.name, task.max_steps, num_episodes=200) for task in TASKS.values()),
        action_space="ee_delta_pose+gripper",
        control_hz=5.0,
        cameras=("main",),
        make_env=_make_blocks_env,
        conventions={
            "failure": "what cannot be undone, such as a wrong object that was touched first, ends the episode",
            "frame": "positions in m in the base frame of the robot: x away from it, y to its left, z up",
            "translation": "relative to the current tool position, at most 0.03 m a step",
            "rotation": "the three rotation dimensions are accepted and ignored: the tool stays vertical",
            "gripper": "0.5 or more opens, less closes",
            "proprio": "tool position x, y, z (m), gripper opening (0..1)",
            **{f"success of {task.name}": task.rule for task in TASKS.values()},
        },
        variants=VARIANTS,
    )
