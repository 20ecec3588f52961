"""Eq. 8: its values, its properties, and what it refuses."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualvla_eval.score import summarise, vla_score

UNIT = st.floats(0, 1)


def test_eq_8_by_hand():
    assert vla_score(0.8, 0.5, 1) == pytest.approx(0.4)
    assert vla_score(0.8, 0.5, 1, reasoning=0.6, alignment=0.5) == pytest.approx(0.25)


@given(UNIT, UNIT, UNIT, UNIT)
def test_a_failure_scores_nothing_and_a_success_stays_in_range(a, i, r, ra):
    assert vla_score(a, i, 0) == 0
    assert vla_score(a, i, 0, r, ra) == 0
    assert 0 <= vla_score(a, i, 1, r, ra) <= 1
    assert vla_score(a, i, 1, r, 0) == 0


@given(UNIT, UNIT, UNIT, UNIT, UNIT)
def test_no_part_can_lower_the_score_by_rising(a, i, r, ra, more):
    base = vla_score(a, i, 1, r, ra)
    for better in (
        vla_score(max(a, more), i, 1, r, ra),
        vla_score(a, max(i, more), 1, r, ra),
        vla_score(a, i, 1, max(r, more), ra),
        vla_score(a, i, 1, r, max(ra, more)),
    ):
        assert better >= base


@pytest.mark.parametrize(
    "arguments",
    [
        {"action": 8, "intention": 1, "success": 1},
        {"action": -0.1, "intention": 1, "success": 1},
        {"action": math.nan, "intention": 1, "success": 1},
        {"action": 1, "intention": 1, "success": 0.5},
        {"action": 1, "intention": 1, "success": 1, "reasoning": 1},
        {"action": 1, "intention": 1, "success": 1, "alignment": 1},
        {"action": 1, "intention": None, "success": 1},
    ],
)
def test_anything_else_is_refused(arguments):
    with pytest.raises(ValueError, match=r"neither|in \[0, 1\]"):
        vla_score(**arguments)


def row(score, unjudged=None, **columns):
    parts = {"A": 5.0, "I": 5.0, "R": None, "RA": None} if unjudged is None else dict.fromkeys(("A", "I", "R", "RA"))
    return {
        "policy": "p", "policy_kind": "specialist", "task": "touch", "success": True, "score": score,
        "unjudged": unjudged, "without_reasoning": False, **parts, **columns,
    }  # fmt: skip


def test_unjudged_trajectories_are_counted_and_left_out_of_the_mean():
    found = summarise([row(0.5), row(None, unjudged="crashed"), row(0.7)])["p"]
    assert found["score"] == pytest.approx(60)
    assert (found["n"], found["unjudged"]) == (3, 1)
    assert (found["A"], found["R"]) == (50.0, None)


def test_a_policy_of_which_nothing_could_be_judged_has_no_score():
    found = summarise([row(None, unjudged="crashed")])["p"]
    assert found["score"] is None
    assert found["unjudged"] == 1
