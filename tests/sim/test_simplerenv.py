"""Suite simpler-widowx against rollouts recorded from the original SimplerEnv: poses, pictures, verdicts, episodes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dualvla.errors import DataError, PolicyError, UsageError
from dualvla.io.assets import VARIABLE
from dualvla_eval.experts import make_expert
from dualvla_eval.reasoning import parse
from dualvla_eval.simpler import episodes, widowx_tasks
from dualvla_eval.simpler.assets import Assets
from dualvla_eval.suites import Episode, get_suite

GOLDEN = Path(__file__).parent / "golden_simpler"
SUITE = widowx_tasks.SUITE
FREE = sorted(p.stem for p in GOLDEN.glob("widowx_*.json"))
CONTACT = sorted(f"contact/{p.stem}" for p in (GOLDEN / "contact").glob("widowx_*.json"))

# What another version of PhysX leaves (docs/simplerenv.md), in mm and degrees: the spoon rolls by 6 degrees on
# its round back, the loose plane under the basket slides by 5 mm.
SETTLED = {"bridge_spoon_generated_modified": (1.3, 6.5), "dummy_sink_target_plane": (6.0, 1.0)}
FINAL_MM = {"eggplant": 20}  # it rolls in the basket, as no two runs of different builds do alike


@pytest.fixture(scope="module")
def env(simpler_assets: Assets) -> Any:
    from dualvla_eval.simpler.env import SimplerEnv

    made = SimplerEnv(simpler_assets)
    yield made
    made.close()


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def start(env: Any, task: str, episode_id: int) -> dict[str, Any]:
    return env.reset(options={"episode": Episode(SUITE, task, "base", episode_id, 0)})[0]


def offset_mm(pose: Any, expected: list[float]) -> float:
    return 1e3 * float(np.linalg.norm(np.subtract(pose.p, expected[:3])))


def turn_deg(pose: Any, expected: list[float]) -> float:
    cosine = abs(float(np.dot(pose.q, expected[3:]) / np.linalg.norm(expected[3:]) / np.linalg.norm(pose.q)))
    return float(np.degrees(2 * np.arccos(min(cosine, 1.0))))


def boxed(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((160, 120), Image.Resampling.BOX), dtype=np.float64)


@pytest.mark.parametrize("task", list(widowx_tasks.TASKS))
def test_the_numbered_episodes_are_the_originals(task: str) -> None:
    table = json.loads((GOLDEN / "simplerenv_episodes.json").read_text())[task]
    assert len(table["episodes"]) == widowx_tasks.NUM_EPISODES
    for i, expected in enumerate(table["episodes"]):
        setup = widowx_tasks.setup(task, i)
        dropped = [o for o in setup.objects if not o.locked]
        assert [o.model for o in dropped] == [table["source"], table["target"]]
        np.testing.assert_allclose([o.pose.position[:2] for o in dropped], expected["init_xys"], atol=1e-9)
        for rotation, theirs in zip([o.pose.rotation for o in dropped], expected["init_rot_quats"], strict=True):
            assert abs(np.dot(rotation, theirs)) == pytest.approx(1, abs=1e-5)
        assert setup.instructions == (table["instruction"],)
        assert setup.max_steps == table["max_episode_steps"]
    with pytest.raises(UsageError, match="no episode 24"):
        widowx_tasks.setup(task, 24)


@pytest.mark.slow
@pytest.mark.sim
@pytest.mark.parametrize("name", FREE + CONTACT)
def test_a_rollout_of_the_original_is_repeated(env: Any, name: str) -> None:
    recorded = golden(name)
    obs = start(env, recorded["name"], recorded["episode_id"])
    assert obs["instruction"] == recorded["instruction"]
    assert get_suite(SUITE).task(recorded["name"]).max_steps == recorded["max_episode_steps"]
    for model, expected in recorded["objects"].items():
        if model != "arena":
            most_mm, most_deg = SETTLED.get(model, (1.0, 1.0))
            assert offset_mm(env.world.pose(model), expected) < most_mm, model
            assert turn_deg(env.world.pose(model), expected) < most_deg, model

    picture, theirs = boxed(obs["images"]["main"]), np.asarray(Image.open(GOLDEN / f"{name}.png").convert("RGB"))
    error = np.abs(picture - theirs)
    simulated = np.any(boxed(env.task.photo) != theirs, axis=-1)
    assert error.mean() <= 1.0
    assert error[simulated].mean() <= 4.0

    info: dict[str, Any] = {"success": False}
    free = name in FREE
    for i, action in enumerate(recorded["actions"]):
        *_, info = env.step_native(np.array(action))
        untouched = not any(c.pressed and "robot" in (c.first.kind, c.second.kind) and c.first.kind != c.second.kind
                            for c in env.world.contacts)  # fmt: skip
        if free and untouched:
            tool = env.task.agent.tool_poses()[0]
            assert offset_mm(tool, recorded["tcp"][i + 1]) < 0.2, i
            assert turn_deg(tool, recorded["tcp"][i + 1]) < 0.1, i
    assert info["success"] == recorded["final_info"]["success"]
    source = env.task.setup.source
    assert offset_mm(env.world.pose(source), recorded["objects_final"][source]) < FINAL_MM.get(source, 10)


@pytest.mark.slow
@pytest.mark.sim
@pytest.mark.parametrize("task", list(widowx_tasks.TASKS))
def test_the_expert_solves_the_task_and_says_what_it_does(env: Any, task: str) -> None:
    """Three episodes of 24: `dualvla eval --policy expert --suite simpler-widowx` counts all."""
    for episode_id in (1, 10, 23):
        start(env, task, episode_id)
        expert, texts, events, info = make_expert(env, np.random.default_rng(0)), [], [], {"success": False}
        for _ in range(env.task.setup.max_steps):
            decided = expert.act()
            texts.append(decided.reasoning)
            *_, info = env.step(decided.action)
            events += info["events"]
        assert info["success"], (task, episode_id)
        assert all(parse(text) is not None for text in texts)
        phrase = env.state().target
        assert f"grasp:{phrase}" in events
        assert f"release:{phrase}" in events


@pytest.mark.sim
def test_an_action_that_is_not_finite_is_refused_and_the_picture_has_the_cameras_size(env: Any) -> None:
    obs = start(env, "widowx_stack_cube", 0)
    assert obs["images"]["main"].shape == (480, 640, 3)
    assert env.observation_space.contains(obs)
    with pytest.raises(PolicyError, match="7 finite numbers"):
        env.step(np.full(7, np.nan))
    u, v = env.project(np.array(env.state().object("green block").position))
    around = obs["images"]["main"][int(v * 480) - 3 : int(v * 480) + 3, int(u * 640) - 3 : int(u * 640) + 3]
    r, g, b = around.reshape(-1, 3).mean(axis=0)
    assert g > r
    assert g > b
    assert env.instruction_for("yellow block") == "stack the yellow block on the green block"


_REPEAT = """
import hashlib, sys, numpy as np
from dualvla_eval.simpler.env import SimplerEnv
from dualvla_eval.suites import Episode
env, digest = SimplerEnv(), hashlib.sha256()
for task in sys.argv[1:]:
    obs, _ = env.reset(options={"episode": Episode("simpler-widowx", task, "base", 3, 0)})
    rng = np.random.default_rng(0)
    for _ in range(8):
        obs, *_ = env.step(np.append(rng.uniform(-0.03, 0.03, 6), rng.uniform()))
    digest = hashlib.sha256(obs["images"]["main"].tobytes() + repr(env.state()).encode())
print(digest.hexdigest())
"""


@pytest.mark.slow
@pytest.mark.sim
def test_two_processes_give_the_same_states_and_pictures_to_the_bit(simpler_assets: Assets) -> None:
    """The second has run another episode before."""
    told = []
    for tasks in (["widowx_carrot_on_plate"], ["widowx_put_eggplant_in_basket", "widowx_carrot_on_plate"]):
        done = subprocess.run([sys.executable, "-c", _REPEAT, *tasks], capture_output=True, text=True, check=True)
        told.append(done.stdout.strip().splitlines()[-1])
    assert told[0] == told[1]


def test_demonstrations_start_from_scenes_that_no_evaluation_has() -> None:
    suite = get_suite(SUITE)
    numbered = {episodes.setup(e).objects for e in suite.episodes("widowx_stack_cube")}
    for episode in suite.training_episodes("widowx_stack_cube", 20, seed=0):
        setup = episodes.setup(episode)
        assert setup.objects not in numbered
        assert episodes.setup(episode) == setup


def test_missing_and_substituted_files_are_named(tmp_path: Path, simpler_assets: Assets) -> None:
    told = get_suite(SUITE).assets()
    assert "stages/bridge_table_1_v1.glb" in told["substituted"]
    assert not any(name.startswith("robots/") for name in told["substituted"])
    (tmp_path / "custom").mkdir()
    suite = get_suite(SUITE, str(tmp_path))
    with pytest.raises(DataError, match=r"widowx_stack_cube / base lacks .*stages/bridge_table_1_v1\.glb"):
        suite.check(suite.tasks)


def test_without_assets_the_message_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(DataError, match="dualvla assets fetch"):
        Assets.find()
