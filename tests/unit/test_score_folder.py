"""Scoring an evaluation folder: once, honestly for silent policies, by a judge that exists."""

from dataclasses import replace

import pytest
from eval_fakes import FakePolicy, SayingPolicy, evaluate_fake

from dualvla.errors import UsageError
from dualvla_eval.judges import get_judge
from dualvla_eval.score import score_folder


class Silent(SayingPolicy):
    def __init__(self):
        super().__init__(None)

    def reply(self, observation, session):
        return replace(super().reply(observation, session), keyframe=False, reasoning_tokens=0)


def test_scores_are_kept_until_the_judge_or_the_evaluation_changes(tmp_path, monkeypatch):
    folder = evaluate_fake(str(tmp_path / "mine"), "mine", FakePolicy(), monkeypatch)
    first = score_folder(folder, get_judge("rubric"))
    assert first["policies"]["mine"]["n"] == 3
    assert score_folder(folder, get_judge("rubric")) == {**first, "skipped": True}


def test_a_reasoning_policy_that_says_nothing_has_no_reasoning_and_no_alignment(tmp_path, monkeypatch):
    folder = evaluate_fake(str(tmp_path / "silent"), "silent", Silent(), monkeypatch)
    scored = score_folder(folder, get_judge("rubric"))["policies"]["silent"]
    assert (scored["R"], scored["RA"], scored["score"]) == (0, 0, 0)
    assert scored["without_reasoning"] == scored["n"] == 3
    assert scored["success"] == 100


def test_an_unknown_judge_is_named_with_the_nearest_one():
    with pytest.raises(UsageError, match="did you mean 'rubric'"):
        get_judge("rubrik")
    with pytest.raises(UsageError, match=r"choose from: .*rubric"):
        get_judge("gpt-4o")
