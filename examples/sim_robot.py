"""A robot without hardware: suite `blocks` drives its simulated arm from a served policy, in real time.

    dualvla serve runs/tiny/dual &
    python examples/sim_robot.py ws://127.0.0.1:8000 --task touch --episodes 3

Unlike `dualvla eval --policy ws://...`, which waits for every answer, the arm keeps moving while the next chunk is
inferred: late chunks are blended in, as on a real robot. Needs the simulator (`pip install "dualvla[sim]"`).
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from dualvla.client import ActionStream, PolicyClient, StreamOptions
from dualvla_eval.sim.base import SimEnv, to_observation
from dualvla_eval.suites import Episode, Suite, get_suite


def run_episode(env: SimEnv, suite: Suite, episode: Episode, actions: ActionStream, hz: float) -> str:
    """One line on how it went."""
    obs, _ = env.reset(seed=episode.seed, options={"episode": episode})
    actions.reset()
    start, held, steps = np.array(obs["ee_pose"][:3]), 0, 0
    due = time.monotonic()
    outcome = "step limit"
    while steps < suite.task(episode.task).max_steps:
        command = actions.step(to_observation(obs, steps, f"{episode.task}/{episode.episode_id}#{steps}"))
        obs, _, terminated, truncated, info = env.step(command.action)
        steps, held = steps + 1, held + command.held
        if info["success"] or terminated or truncated:
            outcome = "success" if info["success"] else info["failure"] or "ended"
            break
        due += 1 / hz
        time.sleep(max(0.0, due - time.monotonic()))
    moved = float(np.linalg.norm(obs["ee_pose"][:3] - start))
    return f"{obs['instruction']}: {outcome} after {steps} steps ({held} held), the arm ended {moved:.3f} m away"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of the endpoint, as ws://127.0.0.1:8000; the key is read from DUALVLA_API_KEY")
    parser.add_argument("--suite", default="blocks")
    parser.add_argument("--task", default="touch")
    parser.add_argument("--episodes", type=int, default=3)
    parser.add_argument("--hz", type=float, help="control rate (default: the suite's own, real time)")
    arguments = parser.parse_args()
    suite = get_suite(arguments.suite)
    env = suite.make_env()
    with PolicyClient(arguments.url) as client, ActionStream(client, StreamOptions(deadline_s=1.0)) as actions:
        for episode in suite.episodes(arguments.task, arguments.episodes):
            hz = arguments.hz or suite.control_hz
            print(f"episode {episode.episode_id}: {run_episode(env, suite, episode, actions, hz)}", flush=True)
    env.close()


if __name__ == "__main__":
    main()
