"""A sweep of the fake suite on the cluster of RAY_ADDRESS, as a program of its own: prints what came of it as JSON.

sweep_program.py FOLDER EPISODES WORKERS STEP_S WAIT_FOR_NODES
"""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import eval_fakes
import ray
from eval_fakes import FakePolicy, fake_suite
from ray import cloudpickle

from dualvla_cluster import connect
from dualvla_eval import results
from dualvla_eval.policies import PolicyRef
from dualvla_eval.sweep import Machinery, SweepConfig, run_sweep

PATIENCE_S = 120


class SlowEnv(eval_fakes.FakeEnv):
    """Takes its time, and no processor."""

    def __init__(self, step_s):
        self._step_s = step_s

    def step(self, action):
        time.sleep(self._step_s)
        return super().step(action)


def load(ref, **_):
    return FakePolicy()


def alive():
    return sum(node["Alive"] for node in ray.nodes())


def main(folder, episodes, workers, step_s, wait_for_nodes):
    cloudpickle.register_pickle_by_value(eval_fakes)
    connect.connect()
    seen = [alive()]
    over = threading.Event()

    def watch():
        while not over.wait(0.2):
            seen.append(alive())

    watcher = threading.Thread(target=watch)
    watcher.start()
    suite = replace(fake_suite(), make_env=functools.partial(SlowEnv, step_s))
    config = SweepConfig({"touch": episodes}, videos_per_task=0)
    started = time.monotonic()
    run_sweep(folder, suite, [PolicyRef("p", "expert")], config, machinery=Machinery(workers), load_policy=load)
    wall_s = time.monotonic() - started
    deadline = time.monotonic() + PATIENCE_S
    while wait_for_nodes and alive() > wait_for_nodes and time.monotonic() < deadline:
        time.sleep(0.2)
    over.set()
    watcher.join()
    rows = results.read_episodes(folder)
    outcomes = [[r["episode_id"], r["stop_reason"], r["steps"]] for r in rows]
    told = {"first": seen[0], "most": max(seen), "last": alive(), "wall_s": wall_s, "outcomes": outcomes}
    print(json.dumps(told))


if __name__ == "__main__":
    folder, *numbers = sys.argv[1:]
    main(folder, int(numbers[0]), int(numbers[1]), float(numbers[2]), int(numbers[3]))
