"""The pruning rules: properties that any episode must keep, and parity with Eq. 4 written as a plain loop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from dualvla.errors import DataError, UsageError
from dualvla.pruning import (
    MODES,
    FrameDifferences,
    action_labels,
    action_labels_ragged,
    combine,
    motion_changes,
)

GRID = 1 / 1024  # poses on a binary grid, so that shifting them is exact and a label can only change by a wrong rule
OPEN, SHUT = 1.0, 0.0

lengths = st.integers(1, 30)
poses = lengths.flatmap(
    lambda n: npst.arrays(np.float64, (n, 6), elements=st.integers(-3000, 3000).map(lambda i: i * GRID))
)


def eq4_by_the_book(pose: np.ndarray, gripper: np.ndarray) -> list[bool]:
    """One arm, one frame after the other, as method.md words it."""
    count = len(pose)
    pose = np.concatenate([pose[:, :3], np.unwrap(pose[:, 3:], axis=0)], axis=1)
    norms = [0.0] * count
    if count >= 3:
        for k in range(1, count - 1):
            norms[k] = float(np.linalg.norm(pose[k + 1] - 2 * pose[k] + pose[k - 1]))
        norms[0], norms[-1] = norms[1], norms[-2]
    labels, state = [], None
    for k in range(count):
        before = state
        if gripper[k] > 0.55:
            state = 1
        elif gripper[k] < 0.45:
            state = 0
        elif before is None:
            state = int(gripper[k] >= 0.5)
        flips = before is not None and state != before
        labels.append(flips or (count >= 3 and norms[k] > sum(norms) / count + 1e-9))
    return labels


@given(pose=poses, data=st.data())
def test_equals_a_loop_over_frames(pose: np.ndarray, data: st.DataObject) -> None:
    gripper = data.draw(npst.arrays(np.float64, len(pose), elements=st.floats(0, 1)))
    assert action_labels(pose, gripper).tolist() == eq4_by_the_book(pose, gripper)


@given(episodes=st.lists(poses, min_size=1, max_size=5), seed=st.integers(0, 99))
def test_episodes_end_to_end_do_not_see_each_other(episodes: list[np.ndarray], seed: int) -> None:
    grippers = [np.random.default_rng([seed, i]).random(len(pose)) for i, pose in enumerate(episodes)]
    alone = [action_labels(pose, gripper) for pose, gripper in zip(episodes, grippers, strict=True)]
    together = action_labels_ragged(
        np.concatenate(episodes), np.concatenate(grippers), np.array([len(pose) for pose in episodes])
    )
    assert together.tolist() == np.concatenate(alone).tolist()


@given(pose=poses, shift=npst.arrays(np.float64, 3, elements=st.integers(-4096, 4096).map(float)))
def test_moving_the_frame_of_reference_changes_nothing(pose: np.ndarray, shift: np.ndarray) -> None:
    moved = pose + np.concatenate([shift, np.zeros(3)])
    still = np.zeros(len(pose))
    assert action_labels(moved, still).tolist() == action_labels(pose, still).tolist()


@given(pose=poses)
def test_motion_rule_is_symmetric_in_time(pose: np.ndarray) -> None:
    still = np.zeros(len(pose))
    assert action_labels(pose[::-1], still)[::-1].tolist() == action_labels(pose, still).tolist()


@given(data=st.data(), length=st.integers(1, 30))
def test_whole_turns_in_an_angle_change_nothing(data: st.DataObject, length: int) -> None:
    changes = data.draw(npst.arrays(np.float64, (length, 6), elements=st.integers(-1000, 1000).map(lambda i: i * GRID)))
    turns = data.draw(npst.arrays(np.float64, (length, 3), elements=st.integers(-2, 2).map(float)))
    pose = changes.cumsum(axis=0)
    turned = pose + np.concatenate([np.zeros((length, 3)), 2 * np.pi * turns], axis=1)
    still = np.zeros(length)
    assert action_labels(turned, still).tolist() == action_labels(pose, still).tolist()


@given(
    length=st.integers(1, 60),
    start=npst.arrays(np.float64, 6, elements=st.floats(-3, 3)),
    velocity=npst.arrays(np.float64, 6, elements=st.floats(-0.5, 0.5)),
)
def test_constant_velocity_never_fires_even_where_angles_wrap(
    length: int, start: np.ndarray, velocity: np.ndarray
) -> None:
    pose = start + np.arange(length)[:, None] * velocity
    pose[:, 3:] = (pose[:, 3:] + np.pi) % (2 * np.pi) - np.pi
    assert not action_labels(pose, np.zeros(length)).any()


@given(length=st.integers(2, 30), data=st.data())
def test_gripper_flip_always_fires_at_the_first_frame_after_it(length: int, data: st.DataObject) -> None:
    flip = data.draw(st.integers(1, length - 1))
    gripper = np.where(np.arange(length) < flip, OPEN, SHUT)
    assert np.flatnonzero(action_labels(np.zeros((length, 6)), gripper)).tolist() == [flip]


def test_gripper_inside_the_hysteresis_band_keeps_its_state() -> None:
    gripper = np.array([1.0, 0.52, 0.48, 0.52, 0.46, 0.44, 0.48, 0.54, 0.56])
    assert np.flatnonzero(action_labels(np.zeros((9, 6)), gripper)).tolist() == [5, 8]


@given(left=poses, data=st.data())
def test_two_arms_fire_where_either_does(left: np.ndarray, data: st.DataObject) -> None:
    right = data.draw(npst.arrays(np.float64, left.shape, elements=st.integers(-3000, 3000).map(lambda i: i * GRID)))
    gripper = np.random.default_rng(0).random((len(left), 2))
    both = action_labels(np.concatenate([left, right], axis=1), gripper)
    assert both.tolist() == (action_labels(left, gripper[:, 0]) | action_labels(right, gripper[:, 1])).tolist()


@given(left=poses)
def test_motion_changes_are_what_the_rule_compares(left: np.ndarray) -> None:
    pose = np.concatenate([left, left[::-1]], axis=1)
    norm, mean = motion_changes(pose)
    fires = (norm > mean + 1e-9).any(axis=1)
    assert fires.tolist() == action_labels(pose, np.zeros((len(pose), 2))).tolist()


def test_a_stop_fires_and_what_surrounds_it_does_not() -> None:
    x = np.concatenate([np.arange(6) * 0.02, np.full(5, 0.1)])
    pose = np.zeros((11, 6))
    pose[:, 0] = x
    assert np.flatnonzero(action_labels(pose, np.zeros(11))).tolist() == [5]


@pytest.mark.parametrize("length", [0, 1, 2])
def test_episodes_too_short_to_have_an_acceleration(length: int) -> None:
    pose = np.random.default_rng(0).normal(size=(length, 6))
    assert action_labels(pose, np.linspace(0, 1, length)).tolist() == [False, True][:length]


@pytest.mark.parametrize(
    ("pose", "gripper"),
    [
        (np.zeros((4, 7)), np.zeros(4)),
        (np.zeros((4, 12)), np.zeros(4)),
        (np.zeros((4, 6)), np.zeros(3)),
        (np.full((4, 6), np.nan), np.zeros(4)),
        (np.zeros((4, 6)), np.full(4, np.inf)),
    ],
)
def test_unfit_input_is_refused(pose: np.ndarray, gripper: np.ndarray) -> None:
    with pytest.raises(DataError):
        action_labels(pose, gripper)


labels = st.integers(0, 40).flatmap(lambda n: st.tuples(npst.arrays(bool, n), npst.arrays(bool, n)))


@given(pair=labels, seed=st.integers(0, 2**63))
def test_modes_of_combine(pair: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    scene, action = pair
    keep = {mode: combine(scene, action, mode, seed) for mode in MODES}
    assert keep["both"].tolist() == [s and a for s, a in zip(scene, action, strict=True)]
    assert keep["scene"].tolist() == scene.tolist()
    assert keep["action"].tolist() == action.tolist()
    assert keep["none"].all()
    assert keep["random"].sum() == keep["both"].sum()
    assert keep["random"].tolist() == combine(scene, action, "random", seed).tolist()


def test_random_depends_on_the_seed_and_favours_no_frame() -> None:
    scene = np.arange(20) < 5
    drawn = np.mean([combine(scene, scene, "random", seed) for seed in range(2000)], axis=0)
    assert np.allclose(drawn, 0.25, atol=0.05)  # 5 standard errors


def test_unknown_mode_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'random'"):
        combine(np.zeros(3, bool), np.zeros(3, bool), "randon")


def moving_square(path: np.ndarray, size: int = 32) -> np.ndarray:
    frames = np.zeros((len(path), size, size, 3), dtype=np.uint8)
    for frame, (x, y) in zip(frames, path, strict=True):
        frame[y : y + 6, x : x + 6] = (220, 60, 30)
    return frames


def test_scene_fires_where_motion_starts_turns_and_stops_and_not_in_between() -> None:
    still, right, down = [(4, 4)] * 4, [(4 + t, 4) for t in range(1, 9)], [(12, 4 + t) for t in range(1, 9)]
    path = still + right + down + [down[-1]] * 4
    scores = FrameDifferences().scores(moving_square(np.array(path)))
    events = [3, 11, 19]  # the last still frame, the corner, the last moved frame
    assert set(np.argsort(scores)[-3:].tolist()) == set(events)
    assert min(scores[events]) > 1.5 * max(np.delete(scores, events))


def test_scene_fires_where_something_appears() -> None:
    frames = moving_square(np.array([(2 * t, 4) for t in range(12)]))
    frames[8:, 16:, 8:16] = (30, 220, 60)
    assert FrameDifferences()([frames])[0][[7, 8]].any()


def test_camera_noise_alone_does_not_look_like_motion() -> None:
    noise = np.random.default_rng(0).normal(scale=3.0, size=(40, 64, 64, 3))
    assert FrameDifferences().scores((128 + noise).astype(np.uint8)).max() < 0.5


def test_a_still_scene_fires_only_at_its_start() -> None:
    frames = np.full((9, 16, 16, 3), 77, dtype=np.uint8)
    assert np.flatnonzero(FrameDifferences()([frames])[0]).tolist() == [0]


@pytest.mark.parametrize("length", [0, 1, 2])
@pytest.mark.parametrize("size", [(4, 6), (64, 64), (50, 70)])
def test_scene_labels_of_short_episodes_and_odd_sizes(length: int, size: tuple[int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (length, *size, 3)).astype(np.uint8)
    (fires,) = FrameDifferences()([frames])
    assert fires.shape == (length,)
    assert fires[:1].all()
