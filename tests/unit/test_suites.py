"""Suites, layouts and success tests of `blocks`: what must hold without a simulator."""

import dataclasses
import itertools

import numpy as np
import pytest

from dualvla.errors import UsageError
from dualvla_eval.sim.base import ObjectState, SceneState
from dualvla_eval.suites import get_suite, scene_seed
from dualvla_eval.tasks.blocks import BIN, TASKS, sample_layout


def test_no_training_scene_is_ever_an_evaluation_scene():
    suite = get_suite("blocks")
    evaluation = {e.seed for task in suite.tasks for e in suite.episodes(task.name)}
    assert len(evaluation) == sum(task.num_episodes for task in suite.tasks)
    for seed in range(3):
        training = {e.seed for task in suite.tasks for e in suite.training_episodes(task.name, 500, seed)}
        assert len(training) == 500 * len(suite.tasks)
        assert not training & evaluation
    purposes = ("evaluation", "training", "qa_train", "qa_test")
    tops = {purpose: {scene_seed(purpose, i) >> 56 for i in range(100)} for purpose in purposes}
    assert all(len(top) == 1 for top in tops.values())
    assert len(set.union(*tops.values())) == len(purposes)


def test_another_attempt_is_another_scene():
    suite = get_suite("blocks")
    assert suite.training_episode("pick", 3, seed=0).seed != suite.training_episode("pick", 3, seed=0, attempt=1).seed


def test_evaluation_episodes_stay_what_they_are():
    """Published numbers refer to them: a change here is a change of the benchmark."""
    suite = get_suite("blocks")
    first = suite.episodes("touch", 1)[0]
    assert first.seed == 119011466538093847
    layout = sample_layout(TASKS["touch"], first.seed)
    assert (layout.instruction(), len(layout.objects)) == ("tap the blue sphere", 3)


def test_unknown_names_come_with_the_nearest_one():
    with pytest.raises(UsageError, match="did you mean 'blocks'"):
        get_suite("block")
    with pytest.raises(UsageError, match="did you mean 'put_in_bin'"):
        get_suite("blocks").task("put_in_bins")
    with pytest.raises(UsageError, match="200 evaluation episodes, not 201"):
        get_suite("blocks").episodes("touch", 201)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda t: t.name)
def test_every_layout_names_one_object_and_leaves_room_for_the_gripper(task):
    seen_colors, seen_shapes, seen_templates = set(), set(), set()
    for seed in range(200):
        layout = sample_layout(task, seed)
        assert layout == sample_layout(task, seed)
        colors = [o.color for o in layout.objects if o.color]
        assert len(set(colors)) == len(colors)
        assert f"the {layout.target}" in layout.instruction()
        for a, b in itertools.combinations(layout.objects, 2):
            wide = BIN in (a.name, b.name)
            assert np.hypot(*np.subtract(a.position, b.position)[:2]) >= (0.14 if wide else 0.10)
        target = next(o for o in layout.objects if o.name == layout.target)
        seen_colors.add(target.color)
        seen_shapes.add(target.shape)
        seen_templates.add(layout.template)
    assert len(seen_colors) == 6
    assert seen_shapes == set(task.target_shapes)
    assert seen_templates == set(task.templates)


def test_the_instruction_of_another_object_differs_and_never_names_one_twice():
    for task in TASKS.values():
        for seed in range(50):
            layout = sample_layout(task, seed)
            for other in {o.name for o in layout.objects} - {layout.target, BIN}:
                text = layout.instruction(other)
                assert text != layout.instruction()
                assert text.count(other) == 1


def test_a_random_object_is_the_named_one_in_about_46_percent_of_touch_episodes():
    suite = get_suite("blocks")
    share = [1 / len(sample_layout(TASKS["touch"], e.seed).objects) for e in suite.episodes("touch")]
    assert 0.42 < np.mean(share) < 0.50


# --- success and failure on states made by hand -----------------------------------------------------------------------


def _object(name, position, initial=None):
    return ObjectState(name, "cube", name.split()[0], position, initial or position, 0.0, (0.05, 0.05, 0.05))


def _state(task, objects, reference="blue cube", **changes):
    state = SceneState(
        task=task,
        instruction="",
        target="red cube",
        reference=reference,
        step=1,
        objects=tuple(objects),
        ee_pose=(0.5, 0.0, 0.3, np.pi, 0.0, 0.0),
        gripper=1.0,
        contacts=(),
        held=None,
        touched=(),
        still=True,
    )
    return dataclasses.replace(state, **changes)


_SUPPORT = _object("blue cube", (0.5, 0.1, 0.025))
_ON_TOP = _object("red cube", (0.51, 0.1, 0.075), (0.5, -0.1, 0.025))
_RESTING = (("blue cube", "red cube"), ("blue cube", "table"))


@pytest.mark.parametrize(
    ("changes", "stacked"),
    [
        ({}, True),
        ({"held": "red cube"}, False),
        ({"contacts": (*_RESTING, ("red cube", "robot"))}, False),
        ({"contacts": (*_RESTING, ("red cube", "table"))}, False),
        ({"still": False}, False),
        ({"objects": (_SUPPORT, _object("red cube", (0.54, 0.1, 0.075)))}, False),
        ({"objects": (_SUPPORT, _object("red cube", (0.51, 0.1, 0.12)))}, False),
    ],
)
def test_stacked_means_resting_on_the_support_alone(changes, stacked):
    state = _state("stack", (_SUPPORT, _ON_TOP), contacts=_RESTING)
    state = dataclasses.replace(state, **changes)
    assert TASKS["stack"].success(state) is stacked


@pytest.mark.parametrize(
    ("x", "other", "near"),
    [
        (0.58, (0.3, -0.2, 0.025), True),
        (0.60, (0.3, -0.2, 0.025), False),  # too far from the reference
        (0.58, (0.60, 0.15, 0.025), False),  # nearer to something else
    ],
)
def test_near_means_near_the_reference_and_nearer_than_to_the_rest(x, other, near):
    target = _object("red cube", (x, 0.1, 0.025), (0.5, -0.1, 0.025))
    objects = (_SUPPORT, target, _object("green cube", other))
    state = _state("move_near", objects, contacts=(("red cube", "table"),))
    assert TASKS["move_near"].success(state) is near


def test_moving_or_lifting_another_object_fails():
    moved = _object("green cube", (0.6, 0.0, 0.025), (0.6, 0.05, 0.025))
    assert TASKS["move_near"].failure(_state("move_near", (_SUPPORT, _ON_TOP, moved))) == "moved the green cube"
    lifted = _object("green cube", (0.6, 0.0, 0.07), (0.6, 0.0, 0.025))
    state = _state("pick", (_ON_TOP, lifted), reference=None, held="green cube")
    assert TASKS["pick"].failure(state) == "lifted the green cube"
    assert TASKS["pick"].failure(dataclasses.replace(state, held="red cube")) is None


def test_only_the_first_touch_counts():
    state = _state("touch", (_SUPPORT, _ON_TOP), reference=None, touched=("red cube", "blue cube"))
    assert TASKS["touch"].success(state)
    assert TASKS["touch"].failure(state) is None
    wrong = dataclasses.replace(state, touched=("blue cube", "red cube"))
    assert not TASKS["touch"].success(wrong)
    assert TASKS["touch"].failure(wrong) == "touched the blue cube first"


def test_a_lost_object_fails():
    fallen = _object("red cube", (0.95, 0.0, 0.025), (0.6, 0.0, 0.025))
    assert TASKS["put_in_bin"].failure(_state("put_in_bin", (fallen,), reference=None)) == "lost the red cube"


def test_state_is_json_ready():
    import json

    state = _state("stack", (_SUPPORT, _ON_TOP), contacts=_RESTING)
    assert json.loads(json.dumps(state.to_dict()))["objects"][1]["name"] == "red cube"
