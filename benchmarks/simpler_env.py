"""Steps per second of suite simpler-widowx in one process with its 640x480 picture, and where the time goes.

    python benchmarks/simpler_env.py [--steps 100] [--task widowx_stack_cube]

The baseline, in the same run: the same environment with SAPIEN's default shaders and their segmentation picture, which
is how mani_skill draws and overlays. Both run random actions on the CPU, one thread for the software renderer. Wall
time counts what else the machine does; CPU time does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("LP_NUM_THREADS", "1")  # before the renderer is loaded

import numpy as np

from dualvla_eval.simpler import scene
from dualvla_eval.simpler.env import SimplerEnv
from dualvla_eval.suites import get_suite

_RESULT = Path(__file__).parent / "results" / "simpler_env.json"
_WARM_UP = 5


class Clock:
    """CPU seconds by part; a part is a method of some object, replaced by itself with a clock around it."""

    def __init__(self) -> None:
        self.cpu_s: dict[str, float] = {}

    def around(self, owner: Any, method: str, part: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return inner(*args, **kwargs)
            finally:
                self.cpu_s[part] = self.cpu_s.get(part, 0.0) + time.process_time() - started

        setattr(owner, method, timed)


def measure(task: str, steps: int) -> dict[str, Any]:
    env = SimplerEnv()
    env.reset(options={"episode": get_suite("simpler-widowx").episodes(task)[0]})
    rng = np.random.default_rng(0)
    actions = np.column_stack([rng.uniform(-0.02, 0.02, (steps + _WARM_UP, 6)), rng.uniform(size=steps + _WARM_UP)])
    for action in actions[:_WARM_UP]:
        env.step(action)
    clock, camera = Clock(), env.task._sensors[env.task.setup.camera.name]
    clock.around(env.task, "step", "physics and control")
    clock.around(env.task.scene, "update_render", "render")
    clock.around(camera, "capture", "render")
    clock.around(camera.camera, "get_picture", "copy")
    clock.around(env.task._overlay, "apply", "overlay")
    wall, cpu = time.perf_counter(), time.process_time()
    for action in actions[_WARM_UP:]:
        env.step(action)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    parts = {part: round(1e3 * seconds / steps, 2) for part, seconds in clock.cpu_s.items()}
    parts["state, contacts, success test"] = round(1e3 * cpu / steps - sum(parts.values()), 2)
    env.close()
    return {
        "steps_per_s": round(steps / wall, 1),
        "cpu_ms_per_step": round(1e3 * cpu / steps, 1),
        "steps_per_cpu_s": round(steps / cpu, 1),
        "cpu_ms": parts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--task", default="widowx_stack_cube")
    arguments = parser.parse_args()
    ours = measure(arguments.task, arguments.steps)
    scene.one_pass = lambda setup: False
    baseline = measure(arguments.task, max(20, arguments.steps // 5))
    result = {
        "task": arguments.task,
        "ours": ours,
        "SAPIEN's default shaders": baseline,
        "ratio of CPU time per step": round(baseline["cpu_ms_per_step"] / ours["cpu_ms_per_step"], 2),
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {platform.machine()}, software renderer",
    }
    print(json.dumps(result, indent=2))
    _RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
