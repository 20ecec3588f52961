"""Closed-loop rollouts on a fake suite: what is recorded, and that a bad reply ends its own episode only."""

from dataclasses import replace

import numpy as np
import pytest
from eval_fakes import FakeEnv, FakePolicy, FaultyPolicy, fake_suite

from dualvla.errors import PolicyError
from dualvla_eval.rollout import run_episodes

SUITE = fake_suite()
EPISODES = SUITE.episodes("touch", 6)


def outcomes(policy, num_envs=3, episodes=EPISODES, **options):
    envs = [FakeEnv() for _ in range(num_envs)]
    return {r.episode.episode_id: r for r in run_episodes(policy, envs, SUITE, episodes, **options)}


def test_a_good_policy_succeeds_and_its_steps_are_recorded():
    policy = FakePolicy()
    results = outcomes(policy)
    assert {r.stop_reason for r in results.values()} == {"success"}
    assert sorted(results) == [e.episode_id for e in EPISODES]
    for r in results.values():
        assert r.num_steps == len(r.steps) - 1
        assert r.steps[-1].action is None
        assert r.steps[-2].events == (f"contact:{r.steps[0].state['target']}",)
        # Each record holds the pose before its action: the next one is where that action led.
        for now, then in zip(r.steps[:-1], r.steps[1:], strict=True):
            np.testing.assert_allclose(now.ee_pose[:3] + now.action[:3], then.ee_pose[:3], atol=1e-6)
    assert policy.open_sessions == set()


def test_a_chunk_is_executed_between_queries_and_its_text_is_new_only_once():
    (r,) = outcomes(FakePolicy(), episodes=EPISODES[:1]).values()
    asked = [s.step for s in r.steps if s.infer_ms is not None]
    assert asked == list(range(0, r.num_steps, 2))
    assert [s.step for s in r.steps if s.keyframe] == list(range(0, r.num_steps, 4))
    assert r.steps[1].reasoning == r.steps[0].reasoning == "go to it, step 0"
    assert r.steps[1].reasoning_tokens == 0


def test_the_number_of_environments_changes_no_outcome():
    one, four = outcomes(FakePolicy(), 1), outcomes(FakePolicy(), 4)
    for key in one:
        assert [s.state for s in one[key].steps] == [s.state for s in four[key].steps]


def test_episodes_share_a_forward_pass():
    policy = FakePolicy()
    outcomes(policy, num_envs=3)
    assert max(policy.asked) == 3


def raise_policy_error(reply):
    raise PolicyError("out of memory")


@pytest.mark.parametrize(
    ("fault", "stop_reason"),
    [
        (lambda r: replace(r, actions=np.full((4, 7), np.nan)), "policy_nan"),
        (lambda r: replace(r, actions=np.full((4, 7), np.inf)), "policy_nan"),
        (lambda r: replace(r, actions=np.zeros((4, 6))), "policy_shape"),
        (lambda r: replace(r, actions=np.zeros(7)), "policy_shape"),
        (lambda r: replace(r, actions=np.zeros((1, 7))), "policy_shape"),
        (lambda r: replace(r, actions=np.zeros((0, 7))), "policy_empty"),
        (lambda r: None, "policy_empty"),
        (lambda r: replace(r, id="another"), "policy_mismatch"),
    ],
)
def test_a_bad_reply_ends_its_own_episode_only(fault, stop_reason):
    results = outcomes(FaultyPolicy(fault, episode_id=1, from_step=2))
    assert results[1].stop_reason == stop_reason
    assert not results[1].success
    assert results[1].num_steps == 2
    assert {r.stop_reason for i, r in results.items() if i != 1} == {"success"}


def test_a_policy_that_raises_ends_the_episodes_that_asked_and_no_more():
    results = outcomes(FaultyPolicy(raise_policy_error), num_envs=1)
    assert results[1].stop_reason == "policy_error"
    assert "out of memory" in results[1].failure
    assert {r.stop_reason for i, r in results.items() if i != 1} == {"success"}


def test_a_policy_that_answers_fewer_than_asked():
    policy = FakePolicy()
    whole = policy.infer
    policy.infer = lambda observations, sessions: whole(observations, sessions)[:1]
    reasons = [r.stop_reason for r in outcomes(policy).values()]
    assert set(reasons) == {"success", "policy_empty"}


def test_a_policy_that_does_nothing_meets_the_step_limit():
    results = outcomes(FaultyPolicy(lambda r: replace(r, actions=np.zeros((4, 7))), from_step=0))
    assert results[1].stop_reason == "step_limit"
    assert results[1].num_steps == SUITE.task("touch").max_steps


def test_the_wrong_object_is_a_failure_with_its_name():
    results = outcomes(FaultyPolicy(lambda r: replace(r, actions=r.actions * [1, -1, 1, 1, 1, 1, 1]), from_step=0))
    assert results[1].stop_reason == "failure"
    assert results[1].failure.startswith("touched the ")


def test_frames_are_kept_where_asked():
    results = outcomes(FakePolicy(), frame_size={2: 16})
    assert {i: bool(r.frames) for i, r in results.items()} == {i: i == 2 for i in results}
    assert len(results[2].frames) == len(results[2].steps)
    assert results[2].frames[0].shape == (16, 16, 3)
