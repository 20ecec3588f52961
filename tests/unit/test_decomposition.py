"""A difference between two policies, taken apart: the parts add up, and each gets what it alone changes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dualvla_eval.decomposition import PARTS, differences, shapley
from dualvla_eval.score import vla_score

UNIT = st.floats(0, 1)
POLICIES = arrays(np.float64, (4, 5), elements=UNIT)


def eq8(row):
    r, a, i, ra, b = row
    return vla_score(a, i, float(round(b)), r, ra)


@settings(deadline=None)
@given(POLICIES, POLICIES)
def test_shares_add_up_to_the_difference(a, b):
    a[:, 4], b[:, 4] = np.round(a[:, 4]), np.round(b[:, 4])
    total = [eq8(x) - eq8(y) for x, y in zip(a, b, strict=True)]
    assert np.allclose(shapley(a, b).sum(axis=1), total)
    assert np.allclose(shapley(a, b), -shapley(b, a))


@settings(deadline=None)
@given(POLICIES, st.integers(0, 4))
def test_what_is_equal_gets_nothing(a, part):
    b = a.copy()
    b[:, part] = 1 - b[:, part]
    shares = shapley(a, b)
    assert np.allclose(np.delete(shares, part, axis=1), 0)


def row(policy, episode_id, a, i, r=None, ra=None, success=True, unjudged=None):
    return {
        "policy": policy, "task": "touch", "variant": "base", "episode_id": episode_id,
        "A": a, "I": i, "R": r, "RA": ra, "success": success, "unjudged": unjudged,
    }  # fmt: skip


def test_a_policy_that_does_not_reason_is_compared_by_its_own_formula():
    mute = [row("mute", e, 8, 5) for e in range(3)]
    speaks = [row("speaks", e, 8, 5, 10, 5) for e in range(3)]
    (found,) = differences([*speaks, *mute])
    assert (found["a"], found["b"], found["n"]) == ("speaks", "mute", 3)
    assert found["difference"] == pytest.approx(100 * ((1 + 0.4) / 2 * 0.5 - 0.4))
    assert sum(found["parts"].values()) == pytest.approx(found["difference"])
    assert found["parts"]["R"] > 0 > found["parts"]["RA"]
    assert found["parts"]["success"] == found["parts"]["A"] == 0


def test_only_shared_judged_episodes_count():
    one = [row("one", 0, 10, 10), row("one", 1, 10, 10), row("one", 2, None, None, unjudged="away")]
    two = [row("two", 1, 10, 10, success=False), row("two", 2, 10, 10), row("two", 3, 10, 10)]
    (found,) = differences([*one, *two])
    assert found["n"] == 1
    assert found["parts"] == pytest.approx({**dict.fromkeys(PARTS, 0), "success": 100})
    assert differences(one) == []
