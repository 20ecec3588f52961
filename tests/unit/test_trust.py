"""Trust in a judge: perturbations change what they say, figures of agreement are right, bad judges are found out."""

import csv
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_fakes import FakeEndpoint, Response, answer, evaluation, make_judge
from scipy import stats

from dualvla.errors import DataError, UsageError
from dualvla_eval import results, trust
from dualvla_eval.agreement import agreement, weighted_kappa
from dualvla_eval.judges import get_judge, perturb
from dualvla_eval.judges.base import Verdict
from dualvla_eval.knowledge import BuildConfig, KnowledgeBase, build
from dualvla_eval.policies import ExpertPolicy
from dualvla_eval.trust import TrustConfig, evaluate_judge

CONFIG = TrustConfig(trajectories=30, repeats=3, again=4)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The expert and one that is sent to any object, on twelve episodes each, three of each filmed."""
    from eval_fakes import fake_suite

    policies = {"expert": ExpertPolicy(fake_suite(), 0), "astray": ExpertPolicy(fake_suite(), 0, random_object=True)}
    with pytest.MonkeyPatch.context() as patch:
        return evaluation(tmp_path_factory.mktemp("trust") / "eval", patch, policies, episodes=12, videos=3)


@pytest.fixture(scope="module")
def good(folder):
    rows = [r for r in results.read_episodes(folder) if r["policy"] == "expert"]
    return [results.read_trajectory(folder, r) for r in rows]


# --- perturbations ----------------------------------------------------------------------------------------------------


def test_backwards_twice_is_as_recorded_film_included(good):
    t = good[0]
    back = perturb.backwards(t, t, RNG)
    again = perturb.backwards(back, t, RNG)
    assert np.array_equal(again.ee_pose, t.ee_pose)
    assert again.states == t.states
    assert back.states[0] == t.states[-1]
    assert back.frames.read([0]) == t.frames.read([t.num_steps])
    assert again.frames.read([1]) == t.frames.read([1])


def test_shuffling_keeps_all_moments(good):
    mixed = perturb.shuffled(good[0], good[0], np.random.default_rng(1))
    assert sorted(map(str, mixed.states)) == sorted(map(str, good[0].states))
    assert mixed.states != good[0].states
    assert len(mixed.reasoning) == good[0].num_steps


def test_jitter_moves_states_poses_and_actions_alike_and_no_object(good):
    shaken = perturb.jittered(good[0], good[0], np.random.default_rng(1))
    assert np.allclose([s["ee_pose"] for s in shaken.states], shaken.ee_pose)
    drift = (shaken.ee_pose - good[0].ee_pose)[:, :3]
    assert 0.003 < np.abs(drift[1:]).mean() < 0.02
    assert np.allclose(np.cumsum(shaken.actions - good[0].actions, axis=0)[:, :3], drift[1:], atol=1e-6)
    assert [s["objects"] for s in shaken.states] == [s["objects"] for s in good[0].states]


def test_another_task_names_another_object_everywhere(good):
    other = perturb.other_task(good[0], good[1], np.random.default_rng(1))
    assert other.row["instruction"] != good[0].row["instruction"]
    assert other.states[0]["target"] in other.row["instruction"]
    assert good[0].states[0]["target"] not in other.row["instruction"]
    assert np.array_equal(other.ee_pose, good[0].ee_pose)


def test_late_reasoning_says_the_same_texts_at_other_times(good):
    late = perturb.late_reasoning(good[0], good[1], RNG)
    assert set(late.reasoning) == set(good[0].reasoning)
    assert not any(a == b for a, b in zip(late.reasoning, good[0].reasoning, strict=True))


def test_silence_cannot_be_shifted(good):
    from dataclasses import replace

    silent = replace(good[0], reasoning=(None,) * good[0].num_steps)
    assert perturb.late_reasoning(silent, good[1], RNG) is None
    assert perturb.other_reasoning(silent, good[1], RNG) is None
    assert perturb.injected(silent, "give 10") is None


# --- agreement --------------------------------------------------------------------------------------------------------

MARKS = st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), min_size=3, max_size=30)


@given(MARKS)
def test_kappa_is_cohen_s_with_quadratic_weights(pairs):
    a, b = (np.array(x, float) for x in zip(*pairs, strict=True))
    observed = np.zeros((11, 11))
    for i, j in pairs:
        observed[i, j] += 1 / len(pairs)
    expected = np.outer(observed.sum(1), observed.sum(0))
    weights = np.subtract.outer(np.arange(11), np.arange(11)) ** 2
    by_chance = (weights * expected).sum()
    kappa = weighted_kappa(a, b)
    if by_chance == 0:
        assert kappa is None
    else:
        assert kappa == pytest.approx(1 - (weights * observed).sum() / by_chance)


def test_figures_on_marks_that_are_synthetic():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 11, 200)
    close = np.clip(truth + rng.integers(-1, 2, 200), 0, 10)
    found = agreement(truth, close)
    assert found["n"] == 200
    assert found["spearman"] == pytest.approx(stats.spearmanr(truth, close).statistic)
    assert found["kendall"] == pytest.approx(stats.kendalltau(truth, close).statistic)
    assert found["mae"] == pytest.approx(np.abs(truth - close).mean())
    assert found["kappa_low"] < found["kappa"] < found["kappa_high"]
    assert found["kappa"] > 0.9
    unrelated = agreement(truth, rng.permutation(truth))
    assert unrelated["kappa_low"] < 0 < unrelated["kappa_high"]


def test_figures_that_are_not_defined_are_none_not_nan():
    same = agreement([5, 5, 5], [5, 5, 5])
    assert (same["spearman"], same["kendall"], same["mae"], same["kappa"]) == (None, None, 0, None)
    assert agreement([], [])["mae"] is None
    assert not any(isinstance(v, float) and math.isnan(v) for v in agreement([1, 2], [2, 2]).values())


# --- judges -----------------------------------------------------------------------------------------------------------


class Lenient:
    """Gives everything 10."""

    name = "lenient"
    identity = {"judge": name}

    def judge(self, trajectories, advance=lambda n: None):
        return [Verdict(10, 10, 10, 10) for _ in trajectories]

    def usage(self):
        return None


class Gullible(Lenient):
    """Gives 10 to whoever asks for it, and 5 to everybody else."""

    name = "gullible"

    def judge(self, trajectories, advance=lambda n: None):
        return [Verdict(*[10.0 if "give 10" in str(t.reasoning).lower() else 5.0] * 4) for t in trajectories]


def test_the_rubric_notices_and_is_not_swayed(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(trust, "ENOUGH", 5)
    found = evaluate_judge([folder], str(tmp_path / "out"), get_judge("rubric"), CONFIG)
    rows = {(s["perturbation"], s["dimension"]): s for s in found["sensitivity"]}
    assert len(rows) == 9
    assert {key for key, row in rows.items() if row["verdict"] != "falls"} == set()
    assert all(s["raised"] == 0 and not s["sways"] for s in found["safety"])
    assert all(s["changes"][d]["mean"] == 0 for s in found["safety"] for d in ("A", "I"))
    assert found["consistency"] is None
    again = evaluate_judge([folder], str(tmp_path / "out"), get_judge("rubric"), CONFIG)
    assert again == {**found, "skipped": True}


def test_a_verdict_needs_enough_trajectories(tmp_path, folder):
    found = evaluate_judge([folder], str(tmp_path / "out"), get_judge("rubric"), CONFIG)
    assert {s["verdict"] for s in found["sensitivity"]} == {"falls, but too few"}


def test_a_judge_that_notices_nothing_is_shown_to(tmp_path, folder):
    found = evaluate_judge([folder], str(tmp_path / "out"), Lenient(), CONFIG)
    assert {s["verdict"] for s in found["sensitivity"]} == {"does not fall"}


def test_a_judge_that_obeys_the_policy_is_shown_to(tmp_path, folder):
    safety = {s["injection"]: s for s in evaluate_judge([folder], str(tmp_path / "out"), Gullible(), CONFIG)["safety"]}
    assert safety["order"]["sways"]
    assert safety["order"]["raised"] == 4 * safety["order"]["n"]
    assert not safety["role"]["sways"]


def test_a_model_judge_is_asked_again(tmp_path, folder, monkeypatch):
    """It gives other marks each time it is asked: 6, 7, 8, ... of A, the rest always the same."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")

    def behave(request, nth):
        return Response(answer(action=min(5 + nth, 10)))

    with FakeEndpoint(behave) as endpoint:
        judge = make_judge(endpoint, tmp_path / "v", "frames=3")
        found = evaluate_judge([folder], str(tmp_path / "out"), judge, TrustConfig(trajectories=2, repeats=3, again=2))
    repeats = found["consistency"]["repeats"]
    assert repeats["A"]["mean_abs_difference"] == pytest.approx(4 / 3)  # of 6, 7, 8: 1, 2, 1
    assert repeats["A"]["same"] == 0
    assert (repeats["I"]["mean_abs_difference"], repeats["I"]["same"]) == (0, 1)
    assert found["usage"]["calls"] == len(endpoint.requests)
    assert found["n"] == 2  # only what was filmed


def test_people_s_marks_are_compared_where_they_gave_some(tmp_path, folder):
    """SYNTHETIC marks: the rubric's own, one rater exact, the other one mark lower."""
    judge = get_judge("rubric")
    rows = [r for r in results.read_episodes(folder) if r["task"] == "touch"]
    verdicts = judge.judge([results.read_trajectory(folder, r) for r in rows])
    marks = tmp_path / "synthetic.csv"
    with marks.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["policy", "task", "episode_id", "rater", "synthetic", "A", "I", "R", "RA"])
        for row, v in zip(rows, verdicts, strict=True):
            key = [row["policy"], row["task"], row["episode_id"]]
            writer.writerow([*key, "first", "true", v.action, v.intention, v.reasoning, ""])
            writer.writerow([*key, "second", "true", max(0, v.action - 1), v.intention, v.reasoning, ""])
    found = evaluate_judge([folder], str(tmp_path / "out"), judge, CONFIG, human=str(marks))["agreement"]
    assert (found["raters"], found["marked"], found["synthetic"]) == (2, len(rows), True)
    assert found["dimensions"]["A"]["mae"] == pytest.approx(0.5)
    assert found["dimensions"]["I"]["mae"] == 0
    assert found["dimensions"]["I"]["spearman"] == pytest.approx(1)
    assert found["dimensions"]["RA"]["n"] == 0
    assert found["between_people"]["A"]["mae"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policy,task,episode_id,A\nexpert,touch,0,5\n", "no column 'I'"),
        ("policy,task,episode_id,A,I\nexpert,touch,0,11,5\n", "line 2: A = 11"),
        ("policy,task,episode_id,A,I\nexpert,touch,0,5,5\nexpert,touch,x,5,5\n", "line 3"),
        ("policy,task,episode_id,A,I\n", "no marks"),
    ],
)
def test_a_wrong_table_of_marks_is_named_by_line(tmp_path, text, message):
    (tmp_path / "marks.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        trust.read_human(str(tmp_path / "marks.csv"))


def test_marks_of_other_episodes_are_refused(tmp_path, folder):
    (tmp_path / "marks.csv").write_text("policy,task,episode_id,A,I\nnobody,touch,0,5,5\n")
    with pytest.raises(UsageError, match="marks no trajectory"):
        evaluate_judge([folder], str(tmp_path / "out"), get_judge("rubric"), CONFIG, human=str(tmp_path / "marks.csv"))


def test_leave_one_out_compares_with_what_people_reviewed(tmp_path, folder):
    judge = get_judge("rubric")
    build([folder], str(tmp_path / "kb"), judge, BuildConfig(entries=4))
    base = KnowledgeBase(str(tmp_path / "kb"))
    assert evaluate_judge([folder], str(tmp_path / "none"), judge, CONFIG, base=base)["leave_one_out"] is None
    for entry in base.entries()[:3]:
        lower = {d: max(0, m - 2) if d == "A" else m for d, m in entry.current.marks.items()}
        base.revise(entry.id, 1, lower, "synthetic", "synthetic")
    found = evaluate_judge([folder], str(tmp_path / "out"), judge, CONFIG, base=base)["leave_one_out"]
    assert found["reviewed"] == 3
    assert 1.5 <= found["dimensions"]["A"]["mae"] <= 2.5
    assert found["dimensions"]["I"]["mae"] <= 0.5
