"""An evaluation sweep beside a serial loop with batch 1 over the same environments, rendering on, same policy.

    python benchmarks/sweep.py [--suite blocks] [--task touch] [--only simulation,policy,hop] [--out FILE]

Simulation-bound: the random policy. The ceiling is cores / CPU-seconds per step, as the serial loop measures them
before and after the sweep.
Policy-bound: the same actions from a policy that takes 200 ms a call, whatever the batch. Ray's own share: what a
question costs beyond the policy's time (hop), and of `busy_share` what is missing: time between two episodes.

of_ceiling is wall time: what else the machine does counts. So beside it stand as many bare loops as workers, each in a
process of its own, without Ray and without writing anything down (of_bare_loops), and the CPU time of a step in the
loop over that in the simulators (of_ceiling_by_cpu_time).

Rates are those of the time in which every simulator works: from the end of the last first episode to the end of the
first last one. Renderers of both sides have one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("LP_NUM_THREADS", "1")  # before the renderer is loaded, for both sides
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # else workers give way to all that the loop does not give way to

import numpy as np
import psutil

from dualvla.io import dataset
from dualvla.schema import Observation, PolicyReply
from dualvla_eval import results
from dualvla_eval.policies import PolicyRef, RandomPolicy
from dualvla_eval.rollout import session_name
from dualvla_eval.sim.base import to_observation
from dualvla_eval.suites import Episode, Suite, get_suite
from dualvla_eval.sweep import Machinery, SweepConfig, run_sweep

_CALL_S = 0.2
_CORES = os.cpu_count() or 1
_WARM_UP = 1  # episodes
_SAMPLE_S = 0.5
_SAMPLES_A_SEARCH = 2  # looking for processes at every sample takes a percent of a core


class SlowPolicy(RandomPolicy):
    """The random policy, `seconds` a call, whatever the batch."""

    def __init__(self, suite: Suite, seconds: float):
        super().__init__(suite, seed=0)
        self._seconds = seconds

    def infer(self, observations: Sequence[Observation], sessions: Sequence[str]) -> list[PolicyReply]:
        if self._seconds:
            time.sleep(self._seconds)
        return super().infer(observations, sessions)


def load(ref: PolicyRef, *, suite: Suite, **_: Any) -> SlowPolicy:
    return SlowPolicy(suite, float(ref.name))


def serial(suite: Suite, episodes: Sequence[Episode], seconds: float) -> dict[str, float]:
    """One environment, one observation a call, the bare loop: steps/s, and CPU-seconds a step."""
    env, policy = suite.make_env(), SlowPolicy(suite, seconds)
    steps, wall, cpu = 0, 0.0, 0.0
    for number, episode in enumerate(episodes):
        if number == _WARM_UP:
            steps, wall, cpu = 0, time.perf_counter(), time.process_time()
        steps += _roll_out(env, policy, suite, episode)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"steps_per_s": steps / wall, "cpu_s_per_step": cpu / steps, "steps": steps}


def _roll_out(env: Any, policy: SlowPolicy, suite: Suite, episode: Episode) -> int:
    obs, _ = env.reset(seed=episode.seed, options={"episode": episode})
    session = session_name(episode, 0)
    for step in range(suite.task(episode.task).max_steps):
        (reply,) = policy.infer([to_observation(obs, step, "")], [session])
        obs, _, terminated, truncated, info = env.step(np.asarray(reply.actions[0]))
        if terminated or truncated or info["success"]:
            return step + 1
    return suite.task(episode.task).max_steps


def sweep(suite: Suite, task: str, episodes: int, workers: int, seconds: float, envs: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        source = "random"
        if seconds:  # behind a host, as a checkpoint is; what it holds comes from `load`
            source = str(Path(folder, "checkpoint"))
            Path(source).mkdir()
            for name in ("config.json", "none.safetensors"):
                Path(source, name).write_text("{}")
        out = str(Path(folder, "out"))
        ref = PolicyRef(str(seconds), source)
        config = SweepConfig({task: episodes}, videos_per_task=0, max_batch=64)
        machinery = Machinery(workers=workers, envs_per_worker=envs, hosts=1)
        started = time.perf_counter()
        with _processor_time() as samples:
            run_sweep(out, suite, [ref], config, machinery=machinery, load_policy=load)
        whole_s = time.perf_counter() - started
        rows = results.read_episodes(out)
        waits = [s for row in rows for s in _waits(out, row)]
        ends = [Path(results.part_url(out, results.row_stem(row))).stat().st_mtime for row in rows]
    slots = workers * (envs if seconds else 1)
    return {**_steady(rows, ends, slots, samples), **_asking(rows, waits), "whole_s": whole_s}


@contextlib.contextmanager
def _processor_time() -> Iterator[list[tuple[float, float]]]:
    """Yields a list that grows: (time, CPU-seconds that all simulators have used until then)."""
    samples: list[tuple[float, float]] = []
    used: dict[int, float] = {}
    over, own = threading.Event(), psutil.Process()

    def simulators() -> list[psutil.Process]:
        found = []
        for process in own.children(recursive=True):  # others may have simulators of theirs on this machine
            with contextlib.suppress(psutil.NoSuchProcess):
                if (process.cmdline() or [""])[0].startswith("ray::SimulatorImpl"):
                    found.append(process)
        return found

    def watch() -> None:
        watched: list[psutil.Process] = []
        while not over.wait(_SAMPLE_S):
            if len(samples) % _SAMPLES_A_SEARCH == 0:
                watched = simulators()
            for process in watched:
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    used[process.pid] = times.user + times.system
            samples.append((time.time(), sum(used.values())))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def _waits(out: str, row: dict[str, Any]) -> list[float]:
    steps = dataset.read_table(results.trajectory_url(out, row), ["infer_ms"]).to_pylist()
    return [s["infer_ms"] for s in steps if s["infer_ms"] is not None]


def _steady(
    rows: Sequence[dict[str, Any]], ends: Sequence[float], slots: int, samples: Sequence[tuple[float, float]]
) -> dict[str, float]:
    """Rate and occupancy while all slots are full. A step counts with the part of its episode in that time."""
    order = np.argsort(ends)
    begin, end = ends[order[slots - 1]], ends[order[-slots]]
    steps = busy_s = 0.0
    for row, at in zip(rows, ends, strict=True):
        inside = max(0.0, min(at, end) - max(at - row["wall_s"], begin))
        steps += row["steps"] * inside / row["wall_s"]
        busy_s += inside
    cpu_s = np.diff(np.interp([begin, end], *zip(*samples, strict=True)))[0]
    return {
        "steps_per_s": steps / (end - begin),
        "busy_share": busy_s / (end - begin) / slots,
        "cpu_s_per_step": float(cpu_s) / steps,
    }


def _asking(rows: Sequence[dict[str, Any]], infer_ms: Sequence[float]) -> dict[str, float]:
    replies = sum(row["replies"] for row in rows)
    return {"wait_ms": 1e3 * sum(row["wait_s"] for row in rows) / replies, "infer_ms": float(np.mean(infer_ms))}


def simulation_bound(suite: Suite, arguments: argparse.Namespace) -> dict[str, Any]:
    episodes = suite.episodes(arguments.task)[: arguments.serial_episodes]
    before = serial(suite, episodes, 0.0)
    many = sweep(suite, arguments.task, arguments.episodes, arguments.workers, 0.0, 1)
    after = serial(suite, episodes, 0.0)
    alone = {name: (before[name] + after[name]) / 2 for name in before}  # hosts drift by several percent in a minute
    bare = bare_loops(arguments)
    ceiling = _CORES / alone["cpu_s_per_step"]
    return {
        "serial": alone,
        "serial_before_and_after": [before["steps_per_s"], after["steps_per_s"]],
        "sweep": many,
        "ceiling_steps_per_s": ceiling,
        "bare_loops_steps_per_s": bare,
        "of_bare_loops": many["steps_per_s"] / bare,
        "of_ceiling": many["steps_per_s"] / ceiling,
        "of_ceiling_by_cpu_time": alone["cpu_s_per_step"] / many["cpu_s_per_step"],
        "speedup": many["steps_per_s"] / alone["steps_per_s"],
    }


def bare_loops(arguments: argparse.Namespace) -> float:
    """Steps/s of all loops together, which run at the same time."""
    command = [sys.executable, __file__, "--suite", arguments.suite, "--task", arguments.task, "--only", "loop"]
    command += ["--serial-episodes", str(arguments.serial_episodes)]
    loops = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(arguments.workers)]
    return sum(json.loads(loop.communicate()[0].splitlines()[-1])["steps_per_s"] for loop in loops)


def policy_bound(suite: Suite, arguments: argparse.Namespace) -> dict[str, Any]:
    task, workers, envs = arguments.task, arguments.workers, arguments.envs
    alone = serial(suite, suite.episodes(task)[: _WARM_UP + 2], _CALL_S)
    many = sweep(suite, task, min(arguments.episodes, 4 * workers * envs), workers, _CALL_S, envs)
    return {
        "call_ms": 1e3 * _CALL_S,
        "serial": alone,
        "sweep": many,
        "speedup": many["steps_per_s"] / alone["steps_per_s"],
    }


def hop(suite: Suite, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a question costs beyond the policy's own time, one at a time."""
    found = sweep(suite, arguments.task, min(arguments.episodes, 24), 1, 0.001, 1)
    cost_ms = found["wait_ms"] - 1.0
    return {"ms": cost_ms, "share_beside_a_200_ms_call": cost_ms / (1e3 * _CALL_S)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default="blocks")
    parser.add_argument("--task", default="touch")
    parser.add_argument("--episodes", type=int, default=120)
    parser.add_argument("--serial-episodes", type=int, default=20)
    parser.add_argument("--workers", type=int, default=_CORES)
    parser.add_argument("--envs", type=int, default=6, help="of each worker, where the policy is slow")
    parser.add_argument("--only", default="simulation,policy,hop")
    parser.add_argument("--out", help="where the figures go, as JSON")
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    suite = get_suite(arguments.suite)
    parts = arguments.only.split(",")
    if parts == ["loop"]:
        print(json.dumps(serial(suite, suite.episodes(arguments.task)[: arguments.serial_episodes], 0.0)))
        return
    figures: dict[str, Any] = {"suite": arguments.suite, "task": arguments.task}
    if "simulation" in parts:
        figures["simulation_bound"] = simulation_bound(suite, arguments)
    if "policy" in parts:
        figures["policy_bound"] = policy_bound(suite, arguments)
    if "hop" in parts:
        figures["hop"] = hop(suite, arguments)
    figures["machine"] = {
        "cores": _CORES,
        "processor": platform.machine(),
        "python": platform.python_version(),
        "load_before": load_before,
        "LP_NUM_THREADS": os.environ["LP_NUM_THREADS"],
        "workers": arguments.workers,
    }
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(figures, indent=2) + "\n")
    json.dump(figures, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
