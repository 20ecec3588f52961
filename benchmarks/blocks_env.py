"""Rendered steps per second of suite `blocks` at 64 px, observation included, beside mani_skill's own PickCube-v1.

    python benchmarks/blocks_env.py [--steps 400] [--no-baseline] [--json]

Both run random actions in one process on the CPU; the baseline has the default shader and one 64 px RGB camera. Wall
time counts what else the machine does; CPU time does not.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("LP_NUM_THREADS", "1")  # before the renderer is loaded, for both

import numpy as np

_WARM_UP = 5


def measure(step: Callable[[np.ndarray], Any], action_size: int, steps: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    actions = rng.uniform(-0.03, 0.03, (steps + _WARM_UP, action_size))
    for action in actions[:_WARM_UP]:
        step(action)
    wall, cpu = time.perf_counter(), time.process_time()
    for action in actions[_WARM_UP:]:
        step(action)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"steps_per_s": steps / wall, "steps_per_cpu_s": steps / cpu, "ms_per_step": 1e3 * wall / steps}


def blocks(steps: int) -> dict[str, float]:
    """Episodes as evaluation runs them: resets are part of the time."""
    from dualvla_eval.suites import get_suite

    suite = get_suite("blocks")
    env = suite.make_env()
    episodes = iter(suite.episodes("pick"))
    running = False

    def step(action: np.ndarray) -> None:
        nonlocal running
        if not running:
            env.reset(options={"episode": next(episodes)})
        *_, terminated, truncated, _ = env.step(action)
        running = not (terminated or truncated)

    return measure(step, 7, steps)


def pick_cube(steps: int) -> dict[str, float]:
    import gymnasium
    import mani_skill.envs  # noqa: F401  # registers the environments

    env = gymnasium.make(
        "PickCube-v1",
        obs_mode="rgb",
        sim_backend="cpu",
        render_backend="cpu",
        sensor_configs={"width": 64, "height": 64, "shader_pack": "default"},
    )
    env.reset(seed=0)
    return measure(env.step, env.action_space.shape[-1], steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--no-baseline", action="store_true", help="only suite blocks")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()
    results = {"blocks": blocks(arguments.steps)}
    if not arguments.no_baseline:
        results["mani_skill PickCube-v1"] = pick_cube(max(20, arguments.steps // 10))
    if arguments.json:
        print(json.dumps(results))
        return
    for name, result in results.items():
        print(f"{name:24}", *(f"{value:8.1f} {key}" for key, value in result.items()), sep="  ")


if __name__ == "__main__":
    main()
