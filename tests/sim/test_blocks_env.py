"""The simulated environment: determinism, the API, what an action does, what a picture shows."""

import os
import subprocess
import sys

import numpy as np
import pytest

from dualvla.errors import PolicyError
from dualvla_eval.sim.base import to_observation
from dualvla_eval.sim.blocks import BlocksEnv
from dualvla_eval.sim.panda import MAX_STEP_M
from dualvla_eval.suites import get_suite
from dualvla_eval.tasks.blocks import COLORS

pytestmark = pytest.mark.sim

SUITE = get_suite("blocks")
OPEN, CLOSED = 1.0, 0.0


@pytest.fixture(scope="module")
def env():
    return BlocksEnv()


def _move(x=0.0, y=0.0, z=0.0, gripper=OPEN):
    return np.array([x, y, z, 0, 0, 0, gripper])


def _play(env, episode, actions):
    """Everything that can be seen of an episode, for comparison to the last bit."""
    obs, _ = env.reset(options={"episode": episode})
    seen = [obs["images"]["main"].tobytes(), str(env.state())]
    for action in actions:
        obs, *rest = env.step(action)
        seen += [obs["images"]["main"].tobytes(), obs["proprio"].tobytes(), str(env.state()), str(rest)]
    return seen


def test_an_episode_is_the_same_to_the_last_bit_whatever_ran_before(env):
    rng = np.random.default_rng(0)
    actions = [_move(*rng.uniform(-0.03, 0.03, 3), rng.random()) for _ in range(15)]
    low = [_move(z=-0.03)] * 5  # into the blocks
    episode, other = SUITE.episodes("pick", 2)
    first = _play(env, episode, [*actions, *low])
    _play(env, other, actions[:7])
    assert _play(env, episode, [*actions, *low]) == first
    assert _play(BlocksEnv(), episode, [*actions, *low]) == first


def test_rendering_for_a_video_changes_nothing(env):
    episode = SUITE.episodes("stack", 1)[0]
    plain = _play(env, episode, [_move(0.02)] * 3)
    env.reset(options={"episode": episode})
    assert env.render(256).shape == (256, 256, 3)
    for _ in range(2):
        env.step(_move(0.02))
        env.render(256)
    obs, *_ = env.step(_move(0.02))
    assert obs["images"]["main"].tobytes() == plain[-4]


def test_the_gymnasium_api_holds(env):
    from gymnasium.utils.env_checker import check_env

    check_env(BlocksEnv(), skip_render_check=True)
    obs, info = env.reset(options={"episode": SUITE.episodes("put_in_bin", 1)[0]})
    assert env.observation_space.contains(obs)
    assert info == {"success": False, "failure": None, "events": []}
    observation = to_observation(obs, step=3, id="a")
    assert observation.instruction == env.state().instruction
    assert (observation.step, observation.id) == (3, "a")


def test_a_step_goes_where_it_is_told_and_no_further_than_3_cm(env):
    env.reset(options={"episode": SUITE.episodes("touch", 1)[0]})
    for delta in ((0.03, 0, 0), (0, -0.02, 0), (0.01, 0.01, -0.02), (0.3, 0, 0)):
        before = np.array(env.state().ee_pose)
        env.step(_move(*delta))
        after = np.array(env.state().ee_pose)
        expected = np.array(delta) * min(1, MAX_STEP_M / np.linalg.norm(delta))
        np.testing.assert_allclose((after - before)[:3], expected, atol=0.006)
        np.testing.assert_allclose(after[3:], [np.pi, 0, 0], atol=0.02)  # the tool stays vertical


def test_rotations_are_ignored_and_the_table_is_not_pushed(env):
    episode = SUITE.episodes("touch", 1)[0]
    turned = _move(0.01)
    turned[3:6] = 0.5
    assert _play(env, episode, [turned] * 3) == _play(env, episode, [_move(0.01)] * 3)
    for _ in range(12):
        env.step(_move(z=-0.03))
    assert env.state().ee_pose[2] > 0.01
    assert ("robot", "table") not in env.state().contacts


@pytest.mark.parametrize("action", [np.full(7, np.nan), np.zeros(6), np.array([np.inf, 0, 0, 0, 0, 0, 1])])
def test_an_action_that_is_none_is_refused(env, action):
    env.reset(options={"episode": SUITE.episodes("touch", 1)[0]})
    with pytest.raises(PolicyError):
        env.step(action)


@pytest.mark.parametrize("task", [task.name for task in SUITE.tasks])
def test_a_block_is_seen_where_the_projection_says_and_in_its_colour(env, task):
    """Of blocks that nothing hides; the share guards against a camera that looks elsewhere."""
    hits = []
    for episode in SUITE.episodes(task, 15):
        obs, _ = env.reset(options={"episode": episode})
        image = obs["images"]["main"].astype(float)
        for o in env.state().objects:
            u, v = env.project(np.array(o.position))
            assert 0.02 < u < 0.98
            assert 0.02 < v < 0.98
            if o.color:
                pixel = image[int(v * 64), int(u * 64)]
                cosines = {c: pixel @ rgb / np.linalg.norm(pixel) / np.linalg.norm(rgb) for c, rgb in COLORS.items()}
                hits.append(max(cosines, key=cosines.get) == o.color)
    assert np.mean(hits) > 0.9


def test_touching_another_object_first_is_a_failure(env):
    episode = SUITE.episodes("touch", 1)[0]
    env.reset(options={"episode": episode})
    wrong = next(o for o in env.state().objects if o.name != env.state().target)
    events = []
    for _ in range(25):
        offset = np.array(wrong.position) - env.state().ee_pose[:3]
        down = 0.0 if np.linalg.norm(offset[:2]) > 0.01 else -0.03
        _, reward, terminated, _, info = env.step(_move(*np.clip(offset[:2], -0.02, 0.02), down, CLOSED))
        events += info["events"]
        if terminated:
            break
    assert info["failure"] == f"touched the {wrong.name} first"
    assert (reward, info["success"]) == (0.0, False)
    assert events == [f"contact:{wrong.name}"]


def test_without_a_vulkan_device_the_error_names_the_fix():
    code = "from dualvla_eval.suites import get_suite; get_suite('blocks').make_env().reset()"
    hidden = {**os.environ, "VK_ICD_FILENAMES": "/nonexistent.json", "VK_DRIVER_FILES": "/nonexistent.json"}
    ran = subprocess.run([sys.executable, "-c", code], env=hidden, capture_output=True, text=True, check=False)
    assert "PlatformError: No Vulkan device renders here" in ran.stderr
    assert "dualvla doctor" in ran.stderr


@pytest.mark.slow
def test_a_thousand_resets_leak_nothing(env):
    import psutil

    process = psutil.Process()
    episodes = SUITE.episodes("put_in_bin", 200)
    for episode in episodes[:50]:
        env.reset(options={"episode": episode})
    before = process.memory_info().rss
    for i in range(1000):
        env.reset(options={"episode": episodes[i % 200]})
    assert process.memory_info().rss - before < 20e6
