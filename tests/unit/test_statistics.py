"""Intervals against published values and their defining properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dualvla_eval.statistics import bootstrap_mean, bootstrap_mean_of_means, holm, mcnemar, paired_difference, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_agrees_with_published_intervals(successes, n, low, high):
    p = wilson(successes, n)
    assert (p.low, p.high) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric_and_covers_its_rate():
    for n in (1, 7, 100):
        for k in range(n + 1):
            p, mirrored = wilson(k, n), wilson(n - k, n)
            assert 0 <= p.low <= p.rate <= p.high <= 1
            assert p.low == pytest.approx(1 - mirrored.high)


def test_wilson_of_no_trials_knows_nothing():
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="5 successes of 4"):
        wilson(5, 4)


def test_bootstrap_interval_holds_the_mean_and_matches_the_normal_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    mean, low, high = bootstrap_mean(values)
    assert mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.03)
    assert bootstrap_mean(values) == (mean, low, high)


def test_mean_of_means_weighs_groups_equally():
    mean, low, high = bootstrap_mean_of_means([[1.0] * 10, [0.0] * 1000])
    assert (mean, low, high) == (0.5, 0.5, 0.5)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(first, second):
    expected = stats.binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected)


def test_a_thousand_discordant_pairs_do_not_overflow():
    assert mcnemar(0, 1200) == 0.0
    assert mcnemar(600, 600) == 1.0


def test_pairs_share_their_noise_so_their_difference_is_narrow():
    rng = np.random.default_rng(0)
    scene = rng.normal(50, 20, 200)  # easy and hard episodes
    mean, low, high = paired_difference(scene + 2, scene)
    assert (mean, low, high) == pytest.approx((2.0, 2.0, 2.0))
    with pytest.raises(ValueError, match="3 values against 2"):
        paired_difference([1, 2, 3], [1, 2])


def test_holm_follows_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.7, 0.9]) == [1.0, 1.0]
