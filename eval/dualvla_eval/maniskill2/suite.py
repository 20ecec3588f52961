"""The suites `maniskill2` and `maniskill2-simpler-*`: tasks, conventions, what must be there.

Imports no simulator: `make_env` starts one, in another process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dualvla.errors import DataError
from dualvla_eval.maniskill2 import interpreter
from dualvla_eval.maniskill2.tasks import SUITES, OriginalSuite
from dualvla_eval.suites import Suite, TaskSpec

if TYPE_CHECKING:
    from dualvla_eval.sim.base import SimEnv

NAMES = tuple(SUITES)
ASSETS_VARIABLE = "MS2_ASSET_DIR"  # the originals' own

_CONVENTIONS = {
    "frame": "positions in m in the base frame of the robot: x away from it, y to its left, z up",
    "rotation": "a rotation vector (rad) about the tool's current position, in the base frame",
    "proprio": "tool position (m), its extrinsic XYZ Euler angles (rad) from the robot's usual pose, measured opening",
    "success": 'the original\'s own test: info["success"]',
}
_OWN = {
    "mani_skill2": {
        "simulator": "mani-skill2 0.5.3 on SAPIEN 2.2.2, unchanged, control mode pd_ee_delta_pose",
        "translation": "at most 0.1 m a step along each axis of the tool; more is clipped",
        "gripper": "0 closes, 1 opens; in between, in between",
        "picture": "the original's base_camera, 128 x 128",
        "instruction": "ours, as the original has none; a goal that is in no picture is told in m",
    },
    "simpler_env": {
        "simulator": "SimplerEnv's simpler_env.make (prepackaged set-ups) on SAPIEN 2.2.2, unchanged",
        "translation": "m, neither normalised nor clipped",
        "gripper": "0 closes, 1 opens; on the Google Robot, turned into the original's relative command",
        "picture": "the original's own, with its overlay",
        "episodes": "widowx_*: the original's numbers; google_*: its set-ups are drawn from our seed of the episode",
    },
}


@dataclass(frozen=True)
class _MakeEnv:
    """Goes to other processes, and looks for the interpreter there."""

    suite: str
    variables: tuple[tuple[str, str], ...]

    def __call__(self) -> SimEnv:
        from dualvla_eval.maniskill2.env import OriginalEnv
        from dualvla_eval.maniskill2.remote import RemoteProcess

        known = SUITES[self.suite]
        found = interpreter.find(known.package)
        process = RemoteProcess(found, known.package, known.robot, dict(self.variables))
        return OriginalEnv(process, known.robot, {task.name: task for task in known.tasks})


@dataclass(frozen=True)
class _Packages:
    suite: str

    def __call__(self) -> Mapping[str, str]:
        return interpreter.find(SUITES[self.suite].package).packages


@dataclass(frozen=True)
class _Check:
    suite: str
    folder: Path

    def __call__(self, tasks: Sequence[TaskSpec]) -> None:
        known = SUITES[self.suite]
        interpreter.find(known.package)
        needed = {task.name: task.assets for task in known.tasks}
        lacking = {t.name: [a for a in needed[t.name] if not (self.folder / a).is_dir()] for t in tasks}
        told = [f"{name} lacks {', '.join(folders)}" for name, folders in lacking.items() if folders]
        if told:
            raise DataError(
                f"Suite '{self.suite}' cannot run: {'; '.join(told)} (in '{self.folder}').",
                "fetch them with the original's `python -m mani_skill2.utils.download_asset`, and name their folder "
                f"with --assets or {ASSETS_VARIABLE}; or leave these tasks out with --tasks",
            )


def original_suite(name: str, assets: str | None = None) -> Suite:
    """assets: the folder that the originals know as MS2_ASSET_DIR (None: what that variable says, else "data")."""
    known: OriginalSuite = SUITES[name]
    chosen = assets or os.environ.get(ASSETS_VARIABLE)
    folder = Path(chosen or "data").expanduser().absolute()
    return Suite(
        name=name,
        tasks=tuple(TaskSpec(task.name, task.max_steps, task.episodes) for task in known.tasks),
        action_space="ee_delta_pose+gripper",
        control_hz=known.control_hz,
        cameras=("main",),
        make_env=_MakeEnv(name, ((ASSETS_VARIABLE, str(folder)),) if chosen else ()),
        conventions={**_CONVENTIONS, **_OWN[known.package]},
        default_conventions={"termination": known.termination},
        check=_Check(name, folder),
        simulator=_Packages(name),
        expert=False,
    )
