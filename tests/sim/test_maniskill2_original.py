"""The second backend with the real mani-skill2 on SAPIEN 2, in its own interpreter, where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from dualvla.errors import PlatformError
from dualvla.io import dataset
from dualvla_eval.maniskill2 import interpreter
from dualvla_eval.policies import parse_policy
from dualvla_eval.results import read_machines
from dualvla_eval.rollout import Limits
from dualvla_eval.suites import get_suite
from dualvla_eval.sweep import Machinery, SweepConfig, run_sweep

pytestmark = [pytest.mark.slow, pytest.mark.sim]

FREE = ("lift_cube", "pick_cube", "stack_cube", "peg_insertion_side", "plug_charger")  # need no downloads
SUITE = get_suite("maniskill2")


@pytest.fixture(autouse=True)
def _installed() -> None:
    try:
        interpreter.find("mani_skill2")
    except PlatformError as error:
        pytest.skip(str(error))


@pytest.fixture
def env(ray_cluster: None) -> Iterator[Any]:
    made = SUITE.make_env()
    yield made
    made.close()


def trace(env: Any, task: str) -> list[Any]:
    """States and pictures of the first episode's first steps, driven by fixed actions."""
    obs, _ = env.reset(options={"episode": SUITE.episodes(task)[0]})
    found = [(env.state(), obs["images"]["main"].tobytes())]
    for action in np.random.default_rng(1).uniform(-0.03, 0.03, (4, 6)):
        obs = env.step(np.append(action, 1.0))[0]
        found.append((env.state(), obs["images"]["main"].tobytes()))
    return found


def test_two_processes_give_the_same_states_and_pictures(env: Any) -> None:
    other = SUITE.make_env()
    try:
        for task in FREE:
            assert trace(env, task) == trace(other, task)
    finally:
        other.close()


def test_the_tool_goes_where_it_is_sent(env: Any) -> None:
    """The original's drives lag behind: after ten steps of 2 cm it is on its way, along the axis of the base alone."""
    for action, axis in (([0.02, 0, 0, 0, 0, 0, 1], 0), ([0, 0.02, 0, 0, 0, 0, 1], 1), ([0, 0, 0.02, 0, 0, 0, 1], 2)):
        env.reset(options={"episode": SUITE.episodes("lift_cube")[0]})
        before = env.state().ee_pose
        for _ in range(10):
            env.step(np.array(action))
        moved = np.subtract(env.state().ee_pose[:3], before[:3])
        assert moved[axis] > 0.04
        assert np.delete(np.abs(moved), axis).max() < 0.2 * moved[axis]


def test_the_picture_shows_the_cubes_where_they_are_said_to_be(env: Any) -> None:
    env.reset(options={"episode": SUITE.episodes("stack_cube")[0]})
    picture = env.render().astype(int)
    for name, channel in (("red cube", 0), ("green cube", 1)):
        u, v = env.project(np.array(env.state().object(name).position)) * (picture.shape[1], picture.shape[0])
        pixel = picture[round(v - 0.5), round(u - 0.5)]
        assert pixel[channel] > 1.5 * np.delete(pixel, channel).max()


def test_a_sweep_records_what_simulated(ray_cluster: None, tmp_path: Path) -> None:
    config = SweepConfig({"lift_cube": 2}, videos_per_task=0)
    machinery = Machinery(workers=1, limits=Limits(step_s=300.0))
    summary = run_sweep(str(tmp_path), SUITE, [parse_policy("random")], config, machinery=machinery)
    assert summary["policies"]["random"]["stop_reasons"] == {"step_limit": 2}
    (machine,) = read_machines(str(tmp_path))
    assert (machine["simulator"]["sapien"], machine["simulator"]["mani_skill2"]) == ("2.2.2", "0.5.3")
    assert "mani-skill2 0.5.3" in summary["conventions"]["simulator"]
    assert dataset.read_table(str(tmp_path / "episodes.parquet")).column("steps").to_pylist() == [200, 200]


def test_a_process_that_dies_is_a_plain_error(env: Any) -> None:
    env.reset(options={"episode": SUITE.episodes("lift_cube")[0]})
    ray.kill(env._process._actor)
    with pytest.raises(PlatformError, match="died"):
        env.step(np.zeros(7))
