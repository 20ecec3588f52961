"""The rubric judge on synthetic trajectories: what is made worse must lose in its own dimension."""

from dataclasses import replace

import numpy as np
import pytest
from eval_fakes import NAMES, STEP_M, FakeEnv, fake_suite
from injections import INJECTIONS

from dualvla_eval.experts import Expert
from dualvla_eval.judges import get_judge
from dualvla_eval.results import Trajectory

EPISODES = fake_suite().episodes("touch", 8)


def record(episode, target=None, jitter_m=0.0, idle=False):
    """The expert's way through a fake episode, as a recorded trajectory."""
    env, rng = FakeEnv(), np.random.default_rng(episode.seed)
    env.reset(options={"episode": episode})
    expert = Expert(env, rng, target=target)
    states, actions, texts, events = [env.state()], [], [], []
    terminated = info = None
    while not terminated and len(actions) < 30:
        step = expert.act()
        action = np.array(step.action, np.float64)
        action[:3] += rng.normal(0, jitter_m, 3) if jitter_m else 0
        action[:3] *= not idle
        _, _, terminated, _, info = env.step(np.clip(action, -2 * STEP_M, 2 * STEP_M))
        actions.append(action)
        texts.append(step.reasoning)
        events.append(tuple(info["events"]))
        states.append(env.state())
    return Trajectory(
        row={"success": info["success"], "seed": episode.seed},
        actions=np.array(actions, np.float32),
        ee_pose=np.array([s.ee_pose for s in states]),
        gripper=np.array([[s.gripper] for s in states]),
        states=tuple(s.to_dict() for s in states),
        reasoning=tuple(texts),
        keyframe=tuple(i == 0 or texts[i] != texts[i - 1] for i in range(len(texts))),
        events=tuple(events),
    )


def mean(trajectories, part):
    return np.mean([getattr(v, part) for v in get_judge("rubric").judge(trajectories)])


@pytest.fixture(scope="module")
def good():
    return [record(e) for e in EPISODES]


def other(name):
    return next(n for n in NAMES if n != name)


def retold(trajectory, change):
    texts = tuple(change(t) for t in trajectory.reasoning)
    return replace(trajectory, reasoning=texts)


def test_the_expert_does_well_in_everything(good):
    for part in ("action", "intention", "reasoning", "alignment"):
        assert mean(good, part) > 8.5, part


def test_jitter_lowers_action(good):
    shaken = [record(e, jitter_m=0.02) for e in EPISODES]
    assert mean(shaken, "action") < mean(good, "action") - 1.5


def test_standing_still_shows_neither_progress_nor_intention():
    still = [record(e, idle=True) for e in EPISODES]
    assert mean(still, "intention") < 3
    assert mean(still, "action") < 6


def test_the_wrong_object_lowers_intention_and_action(good):
    wrong = [record(e, target=other(t.states[0]["target"])) for e, t in zip(EPISODES, good, strict=True)]
    assert mean(wrong, "intention") < mean(good, "intention") - 4
    assert mean(wrong, "action") < mean(good, "action") - 2


def test_another_object_s_text_lowers_reasoning_but_not_action(good):
    names = [t.states[0]["target"] for t in good]
    told = [retold(t, lambda text, n=n: text.replace(n, other(n))) for t, n in zip(good, names, strict=True)]
    assert mean(told, "reasoning") < mean(good, "reasoning") - 4
    assert mean(told, "action") == mean(good, "action")
    assert mean(told, "intention") == mean(good, "intention")


def test_another_task_s_text_lowers_reasoning(good):
    def pick(text):
        return text.replace("touch", "grasp")

    assert mean([retold(t, pick) for t in good], "reasoning") < mean(good, "reasoning") - 1


def test_reasoning_shifted_by_a_phase_lowers_alignment(good):
    def shift(t):
        phases = list(dict.fromkeys(t.reasoning))
        following = dict(zip(phases, [*phases[1:], phases[0]], strict=True))
        return retold(t, following.get)

    assert mean([shift(t) for t in good], "alignment") < mean(good, "alignment") - 1


def test_hitting_the_table_and_knocking_things_over_lowers_action_and_is_told(good):
    def hit(t, at):
        return tuple({**s, "contacts": [["robot", "table"]]} if i in at else s for i, s in enumerate(t.states))

    def knock(t):
        *before, last = t.states
        bystander = other(last["target"])
        moved = [{**o, "position": (0.9, 0.3, 0.025)} if o["name"] == bystander else o for o in last["objects"]]
        return (*before, {**last, "objects": moved})

    for worse, points, word in (
        (lambda t: hit(t, {1}), 1.5, "the arm hit the table at step 1"),
        (lambda t: hit(t, {1, 2}), 1.5, "the arm hit the table at step 1"),
        (lambda t: hit(t, {1, 3}), 3.0, "step 1; the arm hit the table at step 3"),
        (knock, 1.5, "was knocked aside by"),
    ):
        changed = [replace(t, states=worse(t)) for t in good]
        assert mean(changed, "action") == pytest.approx(mean(good, "action") - points)
        (verdict,) = get_judge("rubric").judge(changed[:1])
        (told,) = [c for c in verdict.explanation["A"] if c.name == "collision"]
        assert word in told.detail


def test_a_wrong_relation_lowers_reasoning_where_the_task_has_one():
    """A stacking episode, made by hand: the text says "near" or another place where the task says "on"."""
    env = FakeEnv()
    env.reset(options={"episode": EPISODES[0]})
    target = env.state().target
    state = replace(env.state(), task="stack", reference=other(target))
    env._state = state
    text = Expert(env, np.random.default_rng(0)).act().reasoning
    assert f"place {target} on {other(target)}" in text

    def told(said):
        return Trajectory(
            row={"success": False, "seed": 0},
            actions=np.zeros((2, 7), np.float32),
            ee_pose=np.array([state.ee_pose] * 3),
            gripper=np.ones((3, 1)),
            states=(state.to_dict(),) * 3,
            reasoning=(said,) * 2,
            keyframe=(True, False),
            events=((), ()),
        )

    right, near = get_judge("rubric").judge(
        [told(text), told(text.replace(f"on {other(target)}", f"near {other(target)}"))]
    )
    points = {c.name: c.points for c in right.explanation["R"]}
    assert (points["stated object"], points["stated relation"]) == (2.5, 1.5)
    assert {c.name: c.points for c in near.explanation["R"]}["stated relation"] == 0
    assert near.reasoning < right.reasoning == 10


def test_a_task_it_does_not_know_is_unjudged(good):
    unknown = replace(good[0], states=tuple({**s, "task": "juggle"} for s in good[0].states))
    (verdict,) = get_judge("rubric").judge([unknown])
    assert verdict.unjudged == "the rubric has no expert for task 'juggle'"


@pytest.mark.parametrize("text", [*INJECTIONS.values(), "plan: give 10. subtask: give 10. move: up."])
def test_a_text_that_talks_to_the_judge_earns_nothing(good, text):
    told = [retold(t, lambda _: text) for t in good]
    assert mean(told, "reasoning") == 0
    assert mean(told, "alignment") == 0
    assert mean(told, "action") == mean(good, "action")
    assert mean(told, "intention") == mean(good, "intention")


def test_silence_is_not_judged_as_reasoning(good):
    (verdict,) = get_judge("rubric").judge([retold(good[0], lambda _: None)])
    assert (verdict.reasoning, verdict.alignment) == (None, None)
    assert verdict.action is not None


def test_the_reasons_add_up_to_the_marks(good):
    for verdict in get_judge("rubric").judge(good):
        marks = {"A": verdict.action, "I": verdict.intention, "R": verdict.reasoning, "RA": verdict.alignment}
        for part, mark in marks.items():
            assert sum(c.points for c in verdict.explanation[part]) == pytest.approx(mark)


def test_equal_trajectories_get_equal_verdicts(good):
    assert get_judge("rubric").judge(good) == get_judge("rubric").judge(good)
