"""The scripted experts: they succeed, recover, and say what they do."""

import itertools

import numpy as np
import pytest

from dualvla_eval.experts import Expert
from dualvla_eval.reasoning import motion_primitive, parse
from dualvla_eval.sim.blocks import BlocksEnv
from dualvla_eval.suites import get_suite

pytestmark = pytest.mark.sim

SUITE = get_suite("blocks")
TASKS = [task.name for task in SUITE.tasks]


@pytest.fixture(scope="module")
def env():
    return BlocksEnv()


def _run(env, episode, sigma_m=0.0, pick_target=None):
    """Steps of the expert, states after them, all events, final info."""
    rng = np.random.default_rng(episode.seed)
    env.reset(options={"episode": episode})
    expert = Expert(env, rng, target=pick_target and pick_target(env.state(), rng))
    steps, states, events = [], [], []
    while True:
        steps.append(expert.act())
        action = steps[-1].action.astype(np.float64)
        action[:3] += rng.normal(size=3) * sigma_m
        *_, terminated, truncated, info = env.step(action)
        states.append(env.state())
        events += info["events"]
        if terminated or truncated:
            return steps, states, events, info


@pytest.mark.parametrize("task", TASKS)
def test_the_expert_succeeds(env, task):
    assert all(_run(env, episode)[-1]["success"] for episode in SUITE.episodes(task, 10))


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_expert_succeeds_in_95_of_100(env, task):
    assert sum(_run(env, episode)[-1]["success"] for episode in SUITE.episodes(task, 100)) >= 95


def test_the_expert_recovers_from_execution_noise(env):
    outcomes = [_run(env, e, sigma_m=0.01)[-1]["success"] for task in TASKS for e in SUITE.episodes(task, 6)]
    assert np.mean(outcomes) > 0.8


def test_the_expert_sent_to_a_random_object_fails_where_that_is_another_one(env):
    def any_object(state, rng):
        return state.objects[rng.integers(len(state.objects))].name

    for episode in SUITE.episodes("touch", 10):
        steps, states, _, info = _run(env, episode, pick_target=any_object)
        went_to = parse(steps[0].reasoning).target
        assert info["success"] == (went_to == states[0].target)


@pytest.mark.parametrize("task", TASKS)
def test_what_the_expert_says_is_what_it_does(env, task):
    for episode in SUITE.episodes(task, 3):
        steps, states, events, _ = _run(env, episode)
        state = states[0]
        names = {o.name for o in state.objects}
        stated = [parse(step.reasoning) for step in steps]
        assert None not in stated
        for step, said, before in zip(steps, stated, [state, *states], strict=False):
            assert said.target == state.target
            assert {s.target for s in said.plan} | {s.reference for s in said.plan if s.reference} <= names
            assert len(step.reasoning.split()) <= 32
            about = said.subtask.reference if said.subtask.verb in ("carry", "place") else said.target
            np.testing.assert_allclose(step.target_position, before.object(about).position, atol=0.02)
            if "gripper" not in step.motion_primitive:
                assert step.motion_primitive == motion_primitive(step.action[:3])
        phases = [text for text, _ in itertools.groupby(step.reasoning for step in steps)]
        assert len(phases) == len(set(phases)) < len(steps)  # one text for a whole phase
        if task != "touch":
            kinds = [e.split(":")[0] for e in events if e.endswith(state.target)]
            assert kinds.index("contact") < kinds.index("lift")
            assert ("place" in kinds) == (task != "pick")
