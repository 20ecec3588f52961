"""The second backend without its simulators: what an original is sent and tells, by a stand-in of its interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from original_fakes import FakeEnv
from ray import cloudpickle
from scipy.spatial.transform import Rotation

from dualvla.errors import DataError, PlatformError, PolicyError, UsageError
from dualvla_eval.collect import CollectConfig, collect
from dualvla_eval.maniskill2 import interpreter
from dualvla_eval.maniskill2.env import OriginalEnv
from dualvla_eval.maniskill2.original import OriginalImpl
from dualvla_eval.maniskill2.robots import GOOGLE_ROBOT
from dualvla_eval.maniskill2.tasks import MANISKILL2, SUITES, WIDOWX_SUITE
from dualvla_eval.policies import RandomPolicy, parse_policy
from dualvla_eval.rollout import run_episodes
from dualvla_eval.suites import get_suite
from dualvla_eval.sweep import SweepConfig, run_sweep


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeEnv]:
    """Environments that were made, by packages that stand in for the originals."""
    found: list[FakeEnv] = []

    def make(kind: str, camera: str) -> FakeEnv:
        found.append(FakeEnv(kind, camera))
        return found[-1]

    gymnasium = types.SimpleNamespace(make=lambda task, **options: make("panda", "base_camera"))
    monkeypatch.setitem(sys.modules, "gymnasium", gymnasium)
    monkeypatch.setitem(sys.modules, "mani_skill2", types.ModuleType("mani_skill2"))
    monkeypatch.setitem(sys.modules, "mani_skill2.envs", types.ModuleType("mani_skill2.envs"))
    simpler = types.SimpleNamespace(make=lambda task: make("widowx", "3rd_view_camera"))
    monkeypatch.setitem(sys.modules, "simpler_env", simpler)
    return found


def start(suite: str, task: str, number: int = 0) -> tuple[OriginalEnv, dict[str, Any]]:
    known = SUITES[suite]
    process = OriginalImpl(known.package, known.robot.camera, known.robot.fingers)
    env = OriginalEnv(process, known.robot, {t.name: t for t in known.tasks})
    episode = get_suite(suite).episodes(task)[number]
    return env, env.reset(options={"episode": episode})[0]


@pytest.mark.parametrize(("suite", "task"), [(MANISKILL2, "pick_cube"), (WIDOWX_SUITE, "widowx_spoon_on_towel")])
def test_the_tool_goes_as_our_action_says_in_the_base_frame(suite: str, task: str, made: list[FakeEnv]) -> None:
    env, before = start(suite, task)
    for action in ([0.02, -0.03, 0.04, 0, 0, 0, 1], [0, 0, 0, 0.05, -0.02, 0.06, 0], [0.01, 0.01, 0, 0, 0.1, 0, 1]):
        after = env.step(np.array(action))[0]
        np.testing.assert_allclose(after["ee_pose"][:3] - before["ee_pose"][:3], action[:3], atol=1e-6)
        turns = [Rotation.from_euler("xyz", obs["ee_pose"][3:]) for obs in (before, after)]
        np.testing.assert_allclose((turns[1] * turns[0].inv()).as_rotvec(), action[3:6], atol=1e-6)
        assert after["gripper"] == [action[6]]
        assert made[0].received[-1][6] == 2 * action[6] - 1
        before = after


def test_the_google_robots_gripper_is_relative_and_keeps_its_goal_at_a_half() -> None:
    native = [GOOGLE_ROBOT.native(np.array([0, 0, 0, 0, 0, 0, g]), np.eye(3))[6] for g in (0.0, 0.5, 1.0)]
    assert native == [1.0, 0.0, -1.0]


def test_state_and_observation_are_in_the_base_frame(made: list[FakeEnv]) -> None:
    env, obs = start(MANISKILL2, "pick_cube")
    state = env.state()
    cube = state.object("red cube")
    assert 0.3 < cube.position[0] < 0.5
    assert cube.position[2] == pytest.approx(0.02)
    assert cube.size == pytest.approx((0.04,) * 3)
    assert cube.yaw_rad == pytest.approx(0, abs=1e-6)
    assert state.contacts == (("red cube", "robot"), ("red cube", "table"))
    assert (state.target, state.touched, state.gripper) == ("red cube", ("red cube",), pytest.approx(0.75))
    assert obs["instruction"] == "pick up the red cube and hold it at x 0.500, y 0.100, z 0.250 m"
    assert obs["images"]["main"].shape == env.render().shape == (12, 16, 3)
    assert env.render(64).shape == (64, 64, 3)
    world = made[0].cube.pose.position
    expected = [(8 * world[0] / world[2] + 8) / 16, (8 * world[1] / world[2] + 6) / 12]
    np.testing.assert_allclose(env.project(np.array(cube.position)), np.clip(expected, 0, 1), atol=1e-5)


def test_simplerenv_gets_the_episodes_number_and_says_its_own_words(made: list[FakeEnv]) -> None:
    env, obs = start(WIDOWX_SUITE, "widowx_spoon_on_towel", number=7)
    seed, options = made[0].reset_with[0]
    assert options == {"reconfigure": True, "obj_init_options": {"episode_id": 7}}
    assert 0 <= seed < 2**32
    assert (obs["instruction"], env.state().target) == ("put the spoon on the towel", "spoon")
    assert env.instruction_for("carrot") == "put the carrot on the towel"
    env.close()
    assert made[0].closed


def test_the_same_episode_and_actions_give_the_same_states(made: list[FakeEnv]) -> None:
    def states(number: int) -> list[Any]:
        env, _ = start(MANISKILL2, "stack_cube", number)
        return [env.state(), *(env.step(np.full(7, 0.01)) and env.state() for _ in range(3))]

    assert states(0) == states(0) != states(1)


def test_episodes_end_with_the_originals_verdict(made: list[FakeEnv]) -> None:
    """The stand-in succeeds above 0.3 m: at the fourth step of 0.03 m."""
    suite = get_suite(MANISKILL2)
    env, _ = start(MANISKILL2, "lift_cube")

    class Up(RandomPolicy):
        def _act(self, observation: Any, session: str) -> Any:
            reply = super()._act(observation, session)
            reply.actions[:] = [0, 0, 0.03, 0, 0, 0, 1]
            return reply

    (result,) = run_episodes(Up(suite, 0), [env], suite, suite.episodes("lift_cube", 1))
    assert (result.stop_reason, result.num_steps) == ("success", 4)


def test_a_bad_action_is_refused(made: list[FakeEnv]) -> None:
    env, _ = start(MANISKILL2, "lift_cube")
    with pytest.raises(PolicyError):
        env.step(np.full(7, np.nan))


def test_what_crosses_to_the_other_interpreter_is_plain_and_carries_none_of_our_modules(made: list[FakeEnv]) -> None:
    """No array, whose pickle depends on numpy's version; and the class goes by value."""
    import dualvla_eval.maniskill2.remote  # noqa: F401  (registers it)

    told = OriginalImpl("mani_skill2", "base_camera", SUITES[MANISKILL2].robot.fingers).reset("PickCube-v0", 1, 0)

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(plain(v) for v in value.values())
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return type(value) in (str, bytes, int, float, bool, type(None))

    assert plain(told)
    code = f"import sys, pickle; made = pickle.loads(bytes.fromhex('{cloudpickle.dumps(OriginalImpl).hex()}'))"
    code += "('mani_skill2', 'c', ()); assert 'dualvla_eval' not in sys.modules and 'numpy' not in sys.modules"
    env = {**os.environ, "PYTHONPATH": ""}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0


# --- what is missing --------------------------------------------------------------------------------------------------


def fake_python(folder: Path, packages: dict[str, str]) -> str:
    """A program that answers as the interpreter of an environment with these packages."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\necho '{json.dumps(packages)}'\n")
    program.chmod(0o755)
    return str(program)


GOOD = {
    "python": "{}.{}.0".format(*sys.version_info),
    "ray": interpreter.metadata.version("ray"),
    "sapien": "2.2.2",
    "mani_skill2": "0.5.3",
}


def test_a_fitting_interpreter_is_found_by_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(interpreter.VARIABLE, fake_python(tmp_path, GOOD))
    assert interpreter.find("mani_skill2").packages == GOOD
    assert get_suite(MANISKILL2).simulator() == GOOD


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"ray": "1.0"}, "ray"),
        ({"sapien": "3.0.3"}, "sapien 2.2.2 (it has 3.0.3)"),
        ({"python": "3.8.1"}, "it is 3.8.1"),
    ],
)
def test_an_interpreter_that_does_not_fit_is_refused_by_what_it_lacks(
    wrong: dict[str, str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(interpreter.VARIABLE, fake_python(tmp_path, {**GOOD, **wrong}))
    with pytest.raises(PlatformError) as refused:
        get_suite(MANISKILL2).check([])
    assert told in refused.value.message
    assert "dualvla maniskill2" in str(refused.value.fix)


def test_without_an_interpreter_the_fix_makes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(interpreter.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(PlatformError, match="run `dualvla maniskill2`"):
        get_suite(MANISKILL2).check([])


def test_simplerenv_is_the_users_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(interpreter.VARIABLE, fake_python(tmp_path, GOOD))
    with pytest.raises(PlatformError, match="simpler_env"):
        get_suite(WIDOWX_SUITE).check([])


def test_a_task_without_its_assets_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(interpreter.VARIABLE, fake_python(tmp_path, GOOD))
    suite = get_suite(MANISKILL2, str(tmp_path))
    suite.check([suite.task("stack_cube")])
    with pytest.raises(DataError, match="pick_single_ycb lacks mani_skill2_ycb"):
        suite.check([suite.task("stack_cube"), suite.task("pick_single_ycb")])


def test_there_is_no_expert_to_evaluate_or_to_collect_with(tmp_path: Path) -> None:
    suite = get_suite(WIDOWX_SUITE)
    with pytest.raises(UsageError, match="no expert"):
        run_sweep(str(tmp_path / "a"), suite, [parse_policy("expert")], SweepConfig({"widowx_stack_cube": 1}))
    with pytest.raises(UsageError, match="no expert"):
        collect(CollectConfig(WIDOWX_SUITE, {"widowx_stack_cube": 1}, 0, 0, 0), str(tmp_path / "b"), workers=1)
    assert not any(tmp_path.iterdir())
