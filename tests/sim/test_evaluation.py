"""Evaluation on the real simulator: a killed sweep resumes to the same table; the judge tells phases apart."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from dualvla_eval import policies, results
from dualvla_eval.judges import get_judge
from dualvla_eval.policies import PolicyRef
from dualvla_eval.rollout import run_episodes
from dualvla_eval.suites import get_suite

pytestmark = [pytest.mark.sim, pytest.mark.slow]

COLUMNS = ("policy", "task", "episode_id", "seed", "instruction", "success", "steps", "stop_reason", "failure")
PATIENCE_S = 300


def evaluate(out, *more, **popen):
    argv = [sys.executable, "-m", "dualvla", "eval", "--policy", "expert", "--policy", "random", "--suite", "blocks"]
    argv += ["--tasks", "touch", "--episodes", "20", "--videos", "0", "--out", str(out), *more]
    return subprocess.Popen(argv, start_new_session=True, **popen)


def table(folder):
    return [tuple(row[c] for c in COLUMNS) for row in results.read_episodes(str(folder))]


def test_a_sweep_killed_with_force_resumes_to_the_same_table(tmp_path):
    assert evaluate(tmp_path / "whole", "--workers", "2").wait(PATIENCE_S) == 0

    victim = evaluate(tmp_path / "killed", "--workers", "1")
    deadline = time.monotonic() + PATIENCE_S
    while not list((tmp_path / "killed" / "parts").glob("*.parquet")):
        assert time.monotonic() < deadline
        assert victim.poll() is None
        time.sleep(0.05)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed" / "parts").glob("*.parquet")}
    assert 0 < len(kept) < 40
    assert not (tmp_path / "killed" / "manifest.json").exists()

    assert evaluate(tmp_path / "killed", "--workers", "1").wait(PATIENCE_S) == 0
    assert all((tmp_path / "killed" / "parts" / name).stat().st_mtime_ns == t for name, t in kept.items())
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
    assert len(table(tmp_path / "whole")) == 40
    for row in results.read_episodes(str(tmp_path / "whole"))[::7]:
        one, two = (results.read_trajectory(str(tmp_path / name), row) for name in ("whole", "killed"))
        assert one.states == two.states


@pytest.fixture(scope="module")
def picks():
    """Ten picks of the expert, as they would be read back from an evaluation folder."""
    suite = get_suite("blocks")
    expert = policies.load(PolicyRef("expert", "expert"), suite=suite)
    envs = [suite.make_env()]
    return [recorded(r) for r in run_episodes(expert, envs, suite, suite.episodes("pick", 10))]


def recorded(result):
    steps = result.steps[:-1]
    return results.Trajectory(
        row={"success": result.success, "seed": result.episode.seed},
        actions=np.array([s.action for s in steps]),
        ee_pose=np.array([s.ee_pose for s in result.steps]),
        gripper=np.array([s.gripper for s in result.steps]),
        states=tuple(s.state for s in result.steps),
        reasoning=tuple(s.reasoning for s in steps),
        keyframe=tuple(s.keyframe for s in steps),
        events=tuple(s.events for s in steps),
    )


def means(trajectories):
    verdicts = get_judge("rubric").judge(trajectories)
    parts = ("action", "intention", "reasoning", "alignment")
    return {part: np.mean([getattr(v, part) for v in verdicts]) for part in parts}


def test_the_expert_gets_good_marks_without_tuning_to_the_task(picks):
    assert min(means(picks).values()) > 9


def test_each_perturbation_lowers_the_dimension_it_is_about(picks):
    whole = means(picks)

    def shift(t):
        phases = list(dict.fromkeys(t.reasoning))
        following = dict(zip(phases, [*phases[1:], phases[0]], strict=True))
        return replace(t, reasoning=tuple(following[text] for text in t.reasoning))

    def another(t, other):
        return replace(t, reasoning=tuple(other.reasoning[i % len(other.reasoning)] for i in range(t.num_steps)))

    def shuffle(t):
        order = np.random.default_rng(0).permutation(t.num_steps + 1)
        return replace(t, ee_pose=t.ee_pose[order])

    shifted = means([shift(t) for t in picks])
    assert shifted["alignment"] < whole["alignment"] - 4
    assert shifted["reasoning"] < whole["reasoning"]
    swapped = means([another(t, o) for t, o in zip(picks, [*picks[1:], picks[0]], strict=True)])
    assert swapped["reasoning"] < whole["reasoning"] - 3
    assert swapped["alignment"] < whole["alignment"] - 2
    assert means([shuffle(t) for t in picks])["action"] < whole["action"] - 3
