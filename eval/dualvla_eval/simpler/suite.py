"""The suites `simpler-widowx`, `simpler-google-vm` and `simpler-google-va`: cells, conventions, assets.

Imports no simulator: `make_env` does, when it is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dualvla.errors import DataError
from dualvla_eval.simpler import episodes, widowx_tasks
from dualvla_eval.simpler.assets import Assets
from dualvla_eval.suites import Suite, TaskSpec

if TYPE_CHECKING:
    from dualvla_eval.sim.base import SimEnv

_SIZES = {"widowx": (640, 480), "google": (640, 512)}
_CONVENTIONS = {
    "frame": "positions in m in the base frame of the robot: x away from it, y to its left, z up",
    "translation": "m, neither normalised nor clipped",
    "rotation": "a rotation vector (rad) about the tool's current position, in the base frame",
    "proprio": "tool position (m), its extrinsic XYZ Euler angles (rad) from pointing down, measured opening (0..1)",
    "simulator": "mani_skill 3 / SAPIEN 3, within the tolerances of docs/simplerenv.md of the original's SAPIEN 2",
}


@dataclass(frozen=True)
class _MakeEnv:
    """Goes to other processes. folder: of the assets, None to find them there."""

    folder: str | None
    size: tuple[int, int]

    def __call__(self) -> SimEnv:
        from dualvla_eval.simpler.env import SimplerEnv

        return SimplerEnv(Assets.find(self.folder), *self.size)


@dataclass(frozen=True)
class _UsedAssets:
    folder: str | None
    tasks: tuple[TaskSpec, ...]
    suite: str

    def __call__(self) -> Mapping[str, Sequence[str]]:
        assets, names = Assets.find(self.folder), _names(self.suite, self.tasks)
        missing = set(assets.missing(names))
        used = [name for name in names if name not in missing]
        return {"used": used, "substituted": assets.substituted(used)}


@dataclass(frozen=True)
class _Check:
    folder: str | None
    suite: str

    def __call__(self, tasks: Sequence[TaskSpec]) -> None:
        assets = Assets.find(self.folder)
        lacking = {f"{t.name} / {t.variant}": assets.missing(_names(self.suite, [t])) for t in tasks}
        told = [f"{cell} lacks {', '.join(files)}" for cell, files in lacking.items() if files]
        if told:
            raise DataError(
                f"Suite '{self.suite}' cannot run: {'; '.join(told)} (in '{assets.root}').",
                "run `dualvla assets fetch`, or leave these out with --tasks and --variants",
            )


def simpler_suite(name: str, folder: str | None = None) -> Suite:
    """folder: of the assets; None for DUALVLA_ASSETS or the user's cache, wherever the environment is made."""
    robustness: tuple[str, ...] = ()
    if name == widowx_tasks.SUITE:
        cells, control_hz = widowx_tasks.suite_cells(), widowx_tasks.CONTROL_HZ
        own = {"gripper": "0 closes, 1 opens; in between, in between", **widowx_tasks.rules()}
        size = _SIZES["widowx"]
    else:
        from dualvla_eval.simpler import google_tasks

        cells, control_hz = google_tasks.suite_cells(name), google_tasks.CONTROL_HZ
        robustness = google_tasks.robustness_variants()
        own, size = {"gripper": "0 closes, 1 opens: turned into the original's relative command"}, _SIZES["google"]
    tasks = tuple(TaskSpec(task, max_steps, count, variant) for task, variant, count, max_steps in cells)
    names = tuple(dict.fromkeys(task.name for task in tasks))
    return Suite(
        name=name,
        tasks=tasks,
        action_space="ee_delta_pose+gripper",
        control_hz=float(control_hz),
        cameras=("main",),
        make_env=_MakeEnv(folder, size),
        conventions={**_CONVENTIONS, **own},
        variants=tuple(dict.fromkeys(task.variant for task in tasks)),
        default_conventions={"termination": "original"},
        means={f"mean of {len(names)} tasks": names},
        robustness_variants=robustness,
        assets=_UsedAssets(folder, tasks, name),
        check=_Check(folder, name),
    )


def _names(suite: str, tasks: Sequence[TaskSpec]) -> list[str]:
    """Of every file that any episode of these cells needs."""
    found: dict[str, None] = {}
    for task in tasks:
        for i in range(task.num_episodes):
            found.update(dict.fromkeys(episodes.numbered(suite, task.name, task.variant, i).assets))
    return list(found)
