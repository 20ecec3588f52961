"""Boundaries: merging of events, peaks, and F1 at relative distances against hand-computed cases and brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualvla.pruning.boundaries import (
    RELATIVE_DISTANCES,
    Counts,
    EveryKth,
    best_every_kth,
    best_threshold,
    bootstrap_f1_difference,
    count_matches,
    merge_frames,
    pick_peaks,
)

frame_sets = st.lists(st.integers(0, 30), max_size=6, unique=True).map(lambda frames: np.array(sorted(frames), int))


@pytest.mark.parametrize(
    ("frames", "gap", "expected"),
    [
        ([], 2, []),
        ([4], 2, [4]),
        ([4, 4, 4], 0, [4]),
        ([10, 12, 14, 20], 2, [12, 20]),  # a chain is one event, in its middle
        ([10, 13], 2, [10, 13]),
        ([3, 4], 1, [3]),  # the earlier of two middles
        ([20, 3], 2, [3, 20]),
    ],
)
def test_events_close_in_time_are_one_boundary(frames, gap, expected):
    assert merge_frames(frames, gap).tolist() == expected


@pytest.mark.parametrize(
    ("found", "true", "frames", "distance", "matched"),
    [
        ([5], [5], 100, 0.05, 1),
        ([10], [5], 100, 0.05, 1),  # exactly 5 % away
        ([11], [5], 100, 0.05, 0),
        ([3, 5, 7], [5], 100, 0.05, 1),  # one true boundary is found once
        ([5], [3, 7], 100, 0.05, 1),
        ([4, 8], [8, 12], 80, 0.05, 2),  # 4 must take 8, or 12 would get none
        ([0], [1], 19, 0.05, 0),  # less than a frame: only the very frame counts
        ([0], [1], 20, 0.05, 1),
        ([], [1], 20, 0.5, 0),
    ],
)
def test_matches_by_hand(found, true, frames, distance, matched):
    assert count_matches(np.array(found), np.array(true), frames, distance) == matched


@settings(deadline=None)
@given(frame_sets, frame_sets, st.sampled_from(RELATIVE_DISTANCES))
def test_the_matching_is_the_largest_there_is(found, true, distance):
    def largest(found, true):
        if not len(found):
            return 0
        partners = [j for j, t in enumerate(true) if abs(found[0] - t) <= distance * 31 + 1e-9]
        taken = [1 + largest(found[1:], np.delete(true, j)) for j in partners]
        return max([largest(found[1:], true), *taken])

    assert count_matches(found, true, 31, distance) == largest(found, true)


def test_f1_by_hand():
    """Two episodes of 20 frames (one frame is 5 %): matched 2 + 0, found 3 + 1, true 2 + 2."""
    counts = Counts.of([np.array([2, 9, 15]), np.array([0])], [np.array([3, 15]), np.array([10, 12])], [20, 20])
    assert counts.f1()[0] == pytest.approx(2 * 2 / (4 + 4))
    precision, recall = counts.precision_recall()
    assert (precision[0], recall[0]) == (2 / 4, 2 / 4)
    assert counts.f1()[9] == pytest.approx(2 * 3 / 8)  # at 0.5, ten frames off is near enough
    assert counts.take(np.array([False, True])).f1()[0] == 0


def test_f1_rises_with_the_distance_and_is_one_only_for_the_same_boundaries():
    rng = np.random.default_rng(0)
    true = [np.flatnonzero(rng.random(30) < 0.1) for _ in range(20)]
    other = [np.flatnonzero(rng.random(30) < 0.1) for _ in range(20)]
    assert (np.diff(Counts.of(other, true, [30] * 20).f1()) >= 0).all()
    assert (Counts.of(true, true, [30] * 20).f1() == 1).all()
    nothing = [np.zeros(0, int)]
    assert (Counts.of(nothing, nothing, [30]).f1() == 1).all()
    assert (Counts.of([np.array([3])], nothing, [30]).f1() == 0).all()


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=30), st.floats(0, 1), st.integers(0, 5))
def test_peaks_are_apart_above_the_threshold_and_leave_no_higher_frame_out(scores, threshold, gap):
    scores = np.array(scores)
    peaks = pick_peaks(scores, threshold, gap)
    assert (np.diff(peaks) > gap).all()
    assert (scores[peaks] >= threshold).all()
    for frame in np.flatnonzero(scores >= threshold):
        near = peaks[np.abs(peaks - frame) <= gap]
        assert len(near)
        assert scores[near].max() >= scores[frame]


def test_an_interval_of_the_difference_excludes_zero_only_where_there_is_one():
    rng = np.random.default_rng(1)
    true = [np.array([5, 15])] * 60
    good = [np.array([5, 15]) if rng.random() < 0.8 else np.array([10]) for _ in true]
    bad = [np.array([5, 10]) if rng.random() < 0.8 else np.array([10]) for _ in true]
    ours, theirs = (Counts.of(found, true, [20] * 60) for found in (good, bad))
    difference, low, high = bootstrap_f1_difference(ours, theirs)
    assert difference == pytest.approx(ours.f1()[0] - theirs.f1()[0])
    assert 0 < low < difference < high
    assert bootstrap_f1_difference(ours, ours) == (0, 0, 0)
    assert bootstrap_f1_difference(ours, theirs) == (difference, low, high)  # the same draws every time


def test_the_threshold_is_the_best_of_all():
    rng = np.random.default_rng(2)
    true = [np.array([6, 14])] * 30
    scores = [rng.random(20) * 0.6 for _ in true]
    for each in scores:
        each[[6, 14]] += 0.4
    chosen = best_threshold(scores, true, 2, 0.05)

    def f1(threshold):
        return Counts.of([pick_peaks(s, threshold, 2) for s in scores], true, [20] * 30).f1()[0]

    assert f1(chosen) >= max(f1(threshold) for threshold in np.linspace(0, 1, 21)) - 0.01


def test_every_kth_frame_is_the_best_of_all_also_from_the_end():
    true, frames = [np.array([4, 14, 24]), np.array([4, 14])], [30, 20]
    assert best_every_kth(true, frames, 0.01) == EveryKth(10, 4)
    late = best_every_kth([np.array([27]), np.array([17]), np.array([6])], [30, 20, 9], 0.01)
    assert late.from_end
    assert [late(frames)[-1] for frames in (30, 20, 9)] == [27, 17, 6]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(2, 15), frame_sets), min_size=1, max_size=4))
def test_no_every_kth_frame_beats_the_one_that_is_chosen(episodes):
    frames = [n for n, _ in episodes]
    true = [marks[marks < n] for n, marks in episodes]

    def f1(choice):
        return Counts.of([choice(n) for n in frames], true, frames, [0.05]).f1()[0]

    everything = [EveryKth(k, offset, end) for k in range(2, 16) for offset in range(k) for end in (False, True)]
    assert f1(best_every_kth(true, frames, 0.05)) >= max(f1(c) for c in everything if c.k <= max(frames))
