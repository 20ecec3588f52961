"""Suites simpler-google-*: the Google Robot against rollouts recorded from the original SimplerEnv."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from golden_rollouts import GOLDEN, boxed, end_offset_mm, golden, offset_mm, turn_deg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dualvla.errors import DataError, UsageError
from dualvla_eval.reasoning import parse
from dualvla_eval.simpler import google_tasks as tasks
from dualvla_eval.simpler.assets import Assets
from dualvla_eval.simpler.specs import EpisodeSetup
from dualvla_eval.suites import get_suite

FREE = sorted(p.stem for p in GOLDEN.glob("google_*.json"))
CONTACT = sorted(f"contact/{p.stem}" for p in (GOLDEN / "contact").glob("google_*.json"))
# Farther than asked (docs/simplerenv.md), where the original does not repeat itself either when an object starts 0.1 mm
# aside: the bottle then settles up to 2.1 mm and 1.3 degrees elsewhere.
SETTLED = {"blue_plastic_bottle": (2.5, 1.5)}
# The original from there misses the apple, too: the hand slips off the drawer. Where the apple lies is compared.
SLIPPED = ("contact/google_robot_place_apple_in_closed_top_drawer_0",)


def setup_of(recorded: dict[str, Any]) -> EpisodeSetup:
    options = recorded["options"].get("obj_init_options", {})
    xy = options.get("init_xy")
    return tasks.prepackaged(
        recorded["name"],
        recorded["seed"],
        tuple(xy) if xy else None,
        options.get("orientation"),
        recorded["episode_id"],
    )


@pytest.fixture(scope="module")
def env(simpler_assets: Assets) -> Any:
    from dualvla_eval.simpler.env import SimplerEnv

    made = SimplerEnv(simpler_assets, 640, 512)
    yield made
    made.close()


def test_every_cell_has_the_originals_number_of_episodes() -> None:
    totals = {
        suite: {task: sum(n for t, _, n, _ in tasks.suite_cells(suite) if t == task) for task in tasks.MAX_STEPS}
        for suite in (tasks.VISUAL_MATCHING, tasks.VARIANT_AGGREGATION)
    }
    assert list(totals[tasks.VISUAL_MATCHING].values()) == [300, 240, 108, 108, 108]
    assert list(totals[tasks.VARIANT_AGGREGATION].values()) == [825, 600, 189, 189, 189]
    averaged = [
        (task, n) for task, variant, n, _ in tasks.suite_cells(tasks.VARIANT_AGGREGATION)
        if variant not in tasks.robustness_variants()
    ]  # fmt: skip
    assert [sum(n for t, n in averaged if t == task) for task in tasks.MAX_STEPS] == [675, 480, 189, 189, 189]


def test_move_near_lists_the_originals_episodes() -> None:
    table = json.loads((GOLDEN / "simplerenv_episodes.json").read_text())["google_robot_move_near_v1"]
    for i in range(60):
        setup = tasks.setup(tasks.VISUAL_MATCHING, tasks.MOVE_NEAR, "base", i)
        triplet = table["triplets"][i // 12]
        assert [o.model for o in setup.objects] == triplet
        assert setup.source == triplet[table["source_obj_ids"][i % 6]]
        assert setup.target == triplet[table["target_obj_ids"][i % 6]]
        xys = table["xy_config_per_triplet"][i % 12 // 6]
        np.testing.assert_allclose([o.pose.position[:2] for o in setup.objects], xys)
        for spec in setup.objects:
            expected = table["init_rot_quat_by_model"][spec.model]
            assert abs(np.dot(spec.pose.rotation, expected)) == pytest.approx(1, abs=1e-5)


def test_an_unknown_name_or_number_is_refused() -> None:
    with pytest.raises(UsageError, match="no variant 'bace'"):
        tasks.setup(tasks.VISUAL_MATCHING, tasks.MOVE_NEAR, "bace", 0)
    with pytest.raises(UsageError, match="no episode 75"):
        tasks.setup(tasks.VISUAL_MATCHING, tasks.PICK_COKE_CAN, "base", 75)


def test_distractors_keep_away_from_the_can() -> None:
    for episode_id in range(75):
        can, *others = tasks.setup(
            tasks.VARIANT_AGGREGATION, tasks.PICK_COKE_CAN, "distractors_more", episode_id
        ).objects
        assert len(others) == 6
        for other in others:
            assert other.later
            assert np.linalg.norm(np.subtract(other.pose.position[:2], can.pose.position[:2])) > 0.25


def test_a_variant_whose_stage_is_missing_is_refused_by_name(simpler_assets: Assets) -> None:
    suite = get_suite(tasks.VARIANT_AGGREGATION)
    with pytest.raises(DataError, match=r"google_robot_pick_coke_can / table_1 lacks stages/Baked_sc1"):
        suite.check([suite.task(tasks.PICK_COKE_CAN, "table_1")])
    suite.check([suite.task(tasks.PICK_COKE_CAN, "darker")])


@settings(deadline=None, max_examples=10)
@given(
    st.lists(st.floats(-2, 2), min_size=2, max_size=2),
    st.lists(st.floats(-1.5, 1.5), min_size=2, max_size=2),
    st.lists(st.floats(-2, 2), min_size=2, max_size=2),
)
def test_a_plan_starts_where_it_is_told_and_keeps_its_limits(
    start: list[float], velocity: list[float], goal: list[float]
) -> None:
    pytest.importorskip("ruckig")
    from dualvla_eval.simpler.motion import MotionLimits, plan

    limits = MotionLimits(1.5, 2.0, 50.0)
    path = plan(np.array(start), np.array(velocity), np.array(goal), limits, 513, 3600)
    np.testing.assert_allclose(path.positions[0], start, atol=1e-9)
    np.testing.assert_allclose(path.velocities[0], velocity, atol=1e-9)
    assert np.abs(path.velocities).max() <= 1.5 + 1e-6
    assert np.abs(np.diff(path.velocities, axis=0)).max() * 513 <= 2.0 + 1e-3
    np.testing.assert_allclose(path.positions[-1], goal, atol=1e-6)


@pytest.mark.slow
@pytest.mark.sim
@pytest.mark.parametrize("name", FREE)
def test_free_motion_follows_the_original(env: Any, name: str) -> None:
    recorded = golden(name)
    obs, _ = env.reset(options={"setup": setup_of(recorded)})
    check_start(env, obs, recorded, name)
    for i, action in enumerate(recorded["actions"], 1):
        env.step_native(np.array(action))
        tool = env.task.agent.tool_poses()[0]
        assert offset_mm(tool, recorded["tcp"][i]) < 0.2, i
        assert turn_deg(tool, recorded["tcp"][i]) < 0.1, i


@pytest.mark.slow
@pytest.mark.sim
@pytest.mark.parametrize("name", CONTACT)
def test_a_whole_episode_ends_as_in_the_original(env: Any, name: str) -> None:
    recorded = golden(name)
    obs, _ = env.reset(options={"setup": setup_of(recorded)})
    check_start(env, obs, recorded, name)
    travelled, solved = [], []
    for action, instruction in zip(recorded["actions"], recorded["instructions"][1:], strict=True):
        obs, _, _, _, info = env.step_native(np.array(action))
        assert obs["instruction"] == instruction
        travelled.append(info["stats"].get("qpos"))
        solved.append(info["success"])
    source = env.task.setup.source
    if name not in SLIPPED:
        assert solved[-1] == recorded["success"]
        assert abs(solved.index(True) + 1 - recorded["first_success_step"]) <= 1
    if source in recorded["objects_final"]:
        assert end_offset_mm(name, source, env.world.pose(source)) < 10
    if "cabinet_qpos" in recorded:
        theirs = np.array(recorded["cabinet_qpos"])[
            1:, recorded["cabinet_joints"].index(f"{recorded['drawer_id']}_drawer_joint")
        ]
        assert np.abs(np.array(travelled) - theirs).max() < 0.02


def check_start(env: Any, obs: dict[str, Any], recorded: dict[str, Any], name: str) -> None:
    setup = env.task.setup
    assert obs["instruction"] == recorded["instruction"]
    assert setup.max_steps == recorded["max_episode_steps"]
    np.testing.assert_allclose(setup.robot.pose.position, recorded["base_pose"][:3], atol=1e-6)
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


@pytest.mark.slow
@pytest.mark.sim
def test_distractors_come_to_rest_around_a_can_that_stays_where_it_was(env: Any) -> None:
    """With models that are at hand in place of the variant's; each must have left where it waited above the scene."""
    alone = tasks.setup(tasks.VARIANT_AGGREGATION, tasks.PICK_COKE_CAN, "base", 12)
    more = tasks.setup(tasks.VARIANT_AGGREGATION, tasks.PICK_COKE_CAN, "distractors_more", 12)
    at_hand = [o for o in more.objects if o.model in ("orange", "bridge_spoon_generated_modified")]
    env.reset(options={"setup": alone})
    undisturbed = env.world.pose(tasks.CAN)
    obs, _ = env.reset(options={"setup": replace(alone, objects=(*alone.objects, *at_hand))})
    assert offset_mm(env.world.pose(tasks.CAN), [*undisturbed.p, *undisturbed.q]) < 1
    dropped_at = {o.model: np.array(o.pose.position) for o in at_hand}
    rested = {o.model: env.world.position(o.model) for o in at_hand}
    assert len(rested) == 2
    for model, place in rested.items():
        assert np.linalg.norm((place - dropped_at[model])[:2]) < 0.1, model
        assert 0.86 < place[2] < 0.93, model
    for _ in range(3):
        obs, *_ = env.step(np.array([0.0, 0, 0, 0, 0, 0, 1]))
    for model, place in rested.items():
        atol = 5e-3 if model == "orange" else 1e-3  # it wobbles on its hulls
        np.testing.assert_allclose(env.world.position(model), place, atol=atol)
    orange = np.argwhere((obs["images"]["main"].astype(int) @ [1, 0, -1]) > 150)  # red without blue
    u, v = env.project(np.array(env.state().object("orange").position)) * (640, 512)
    assert np.linalg.norm(orange - (v, u), axis=1).min() < 5


@pytest.mark.slow
@pytest.mark.sim
def test_the_cabinets_first_light_casts_a_shadow_and_no_more(env: Any) -> None:
    """With the cabinet that is at hand and without a stage."""
    setup = tasks.setup(tasks.VARIANT_AGGREGATION, tasks.OPEN_DRAWER, "base", 0)
    assert setup.station is not None
    cabinet = replace(setup.station, model="mk_station_recolor")
    setup = replace(setup, stage=replace(setup.stage, model=None), station=cabinet)
    shadowless = replace(setup, lights=tuple(replace(light, shadow=False) for light in setup.lights))
    with_shadow, without = (
        env.reset(options={"setup": s})[0]["images"]["main"].astype(int) for s in (setup, shadowless)
    )
    darker = without - with_shadow
    assert darker.min() >= -2  # a shadow brightens nothing
    assert 0.01 < (darker.max(axis=-1) > 20).mean() < 0.5


@pytest.mark.slow
@pytest.mark.sim
@pytest.mark.parametrize(
    ("task", "episode_id"), [(tasks.OPEN_DRAWER, 13), (tasks.CLOSE_DRAWER, 22), (tasks.PICK_COKE_CAN, 20)]
)
def test_the_expert_solves_the_task_and_says_what_it_does(env: Any, task: str, episode_id: int) -> None:
    from dualvla_eval.experts import make_expert

    env.reset(options={"setup": tasks.setup(tasks.VISUAL_MATCHING, task, "base", episode_id)})
    expert, info = make_expert(env, np.random.default_rng(0)), {"success": False}
    for _ in range(env.task.setup.max_steps):
        decided = expert.act()
        assert parse(decided.reasoning) is not None
        *_, info = env.step(decided.action)
    assert info["success"]
