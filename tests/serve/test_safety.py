"""What may reach a robot: limits on actions, bad observations, holds. Plain arrays, no server."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dualvla.errors import PolicyError, UnsafeError, UsageError
from dualvla.schema import Observation, PolicySpec
from dualvla_serve.safety import (
    EMBODIMENTS,
    Embodiment,
    FrozenError,
    Watch,
    check_actions,
    check_observation,
    embodiment,
    hold,
)

ONE = PolicySpec("ee_delta_pose+gripper", 5.0, ("main",), "specialist", horizon=4, execute_steps=2)
TWO = replace(ONE, action_space="bimanual_ee_delta_pose+gripper")
TIGHT = Embodiment(
    max_position_m=0.05,
    max_rotation_rad=0.2,
    gripper=(0.0, 1.0),
    max_position_change_m=0.02,
    max_rotation_change_rad=0.1,
    workspace_low_m=(0.2, -0.3, 0.02),
    workspace_high_m=(0.6, 0.3, 0.5),
)
POSE = np.array([0.4, 0.0, 0.2, 3.14, 0.0, 0.0])
FINITE = st.floats(-10, 10, width=32)


def chunk(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


def row(
    position: tuple[float, ...] = (0, 0, 0), rotation: tuple[float, ...] = (0, 0, 0), gripper: float = 1
) -> list[float]:
    return [*position, *rotation, gripper]


@settings(max_examples=100, deadline=None)
@given(
    actions=hnp.arrays(np.float32, (4, 14), elements=FINITE),
    previous=st.none() | hnp.arrays(np.float32, 14, elements=st.floats(-0.015625, 0.015625, width=32)),
    pose=hnp.arrays(np.float64, 12, elements=st.floats(-1, 1)),
)
def test_whatever_a_policy_says_stays_within_every_limit(
    actions: np.ndarray, previous: np.ndarray | None, pose: np.ndarray
) -> None:
    limits = replace(TIGHT, workspace_low_m=None)  # braking for the workspace may change faster
    safe = check_actions(actions, TWO, limits, previous, pose).actions
    for arm in (0, 7):
        position, rotation = safe[:, arm : arm + 3], safe[:, arm + 3 : arm + 6]
        assert np.linalg.norm(position, axis=1).max() <= 0.05 + 1e-6
        assert np.linalg.norm(rotation, axis=1).max() <= 0.2 + 1e-6
        before = position if previous is None else np.vstack([previous[arm : arm + 3], position])
        if previous is None or np.linalg.norm(previous[arm : arm + 3]) <= 0.05:
            assert np.linalg.norm(np.diff(before, axis=0), axis=1).max(initial=0) <= 0.02 + 1e-5
        assert 0 <= safe[:, arm + 6].min() <= safe[:, arm + 6].max() <= 1
    within = check_actions(actions, TWO, TIGHT, previous, pose).actions
    for number, arm in enumerate((0, 7)):
        start = pose[6 * number : 6 * number + 3]
        path = start + np.cumsum(within[:, arm : arm + 3], axis=0)
        low = np.minimum(TIGHT.workspace_low_m, start)
        high = np.maximum(TIGHT.workspace_high_m, start)
        assert (path >= low - 1e-4).all()
        assert (path <= high + 1e-4).all()


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float32, (4, 7), elements=st.floats(-0.0078125, 0.0078125, width=32)))
def test_what_is_within_the_limits_is_left_as_it_is(actions: np.ndarray) -> None:
    actions[:, 6] = np.abs(actions[:, 6])
    checked = check_actions(actions, ONE, TIGHT, np.zeros(7, np.float32), POSE)
    np.testing.assert_array_equal(checked.actions, actions)
    assert checked.interventions == ()


def test_each_intervention_is_named() -> None:
    assert check_actions(chunk(row((1, 0, 0))), ONE, TIGHT, None, POSE).interventions == ("range",)
    jump = chunk(row((0.04, 0, 0)), row((-0.04, 0, 0)))
    assert check_actions(jump, ONE, TIGHT, None, POSE).interventions == ("step",)
    low = np.array([0.4, 0.0, 0.03, 0, 0, 0])
    checked = check_actions(chunk(row((0, 0, -0.02)), row((0, 0, -0.02))), ONE, TIGHT, None, low)
    assert checked.interventions == ("workspace",)
    np.testing.assert_allclose(checked.actions[:, 2], [-0.01, 0.0], atol=1e-7)
    assert check_actions(chunk(row((1, 0, 0))), ONE, EMBODIMENTS["unlimited"], None, POSE).interventions == ()


def test_a_shortened_move_keeps_its_direction() -> None:
    safe = check_actions(chunk(row((0.3, 0.4, 0))), ONE, TIGHT, None, None).actions
    np.testing.assert_allclose(safe[0, :3], [0.03, 0.04, 0], atol=1e-7)


def test_a_robot_outside_its_workspace_may_only_come_back() -> None:
    outside = np.array([0.7, 0.0, 0.2, 0, 0, 0])
    checked = check_actions(chunk(row((0.01, 0, 0)), row((-0.01, 0, 0))), ONE, TIGHT, None, outside)
    np.testing.assert_allclose(checked.actions[:, 0], [0.0, -0.01], atol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_limit_lets_a_value_pass_that_is_not_finite(bad: float) -> None:
    with pytest.raises(PolicyError, match="finite"):
        check_actions(chunk(row((bad, 0, 0))), ONE, EMBODIMENTS["unlimited"], None, None)


def seen(value: int, x: float = 0.0, pose: bool = True) -> Observation:
    image = np.full((4, 4, 3), value, np.uint8)
    measured = np.array([x, 0, 0, 0, 0, 0])
    return Observation({"main": image}, "go", None if pose else measured.astype(np.float32), measured if pose else None)


def test_an_old_observation_is_refused() -> None:
    limits = Embodiment(max_age_ms=100)
    assert check_observation(seen(0), 99.0, limits, Watch()) == Watch()
    assert check_observation(seen(0), None, limits, Watch()) == Watch()
    with pytest.raises(UnsafeError, match="150 ms old"):
        check_observation(seen(0), 150.0, limits, Watch())


@pytest.mark.parametrize("pose", [True, False])
def test_a_camera_that_stands_still_while_the_robot_moves_is_frozen(pose: bool) -> None:
    limits, watch = Embodiment(frozen_after=3), Watch()
    for i in range(3):
        watch = check_observation(seen(7, 0.01 * i, pose), None, limits, watch)
    for i in (3, 4):  # it stays so until the image changes
        with pytest.raises(FrozenError, match="'main'") as error:
            check_observation(seen(7, 0.01 * i, pose), None, limits, watch)
        watch = error.value.watch
    watch = check_observation(seen(8, 0.05, pose), None, limits, watch)
    check_observation(seen(8, 0.06, pose), None, limits, watch)


def test_a_robot_that_stands_still_may_see_the_same_for_ever() -> None:
    limits, watch = Embodiment(frozen_after=3), Watch()
    for i in range(50):
        watch = check_observation(seen(7, 0.001 * (i % 2)), None, limits, watch)


def test_one_frozen_camera_of_two_is_found() -> None:
    def watched(steps: int) -> Watch:
        watch = Watch()
        for i in range(steps):
            both = {"main": seen(i).images["main"], "wrist": seen(0).images["main"]}
            watch = check_observation(replace(seen(0, 0.01 * i), images=both), None, Embodiment(frozen_after=3), watch)
        return watch

    watched(2)
    with pytest.raises(FrozenError, match="'wrist'"):
        watched(10)


def test_a_hold_moves_nothing_and_keeps_the_gripper() -> None:
    last = np.arange(14, dtype=np.float32)
    still = hold(TWO, Embodiment(), last, None)
    assert still.shape == (4, 14)
    assert not np.delete(still, [6, 13], axis=1).any()
    assert (still[:, [6, 13]] == [6, 13]).all()


def test_the_hold_of_an_absolute_controller_is_the_current_pose() -> None:
    limits = Embodiment(controller="absolute")
    still = hold(ONE, limits, np.zeros(7, np.float32), replace(seen(0), ee_pose=POSE))
    np.testing.assert_allclose(still[0, :6], POSE, atol=1e-6)
    assert hold(ONE, limits, np.zeros(7, np.float32), seen(0, pose=False)) is None


def test_before_the_first_action_a_hold_needs_a_measured_gripper() -> None:
    observation = Observation({}, "go", np.array([0.1, 0.7], np.float32))
    assert hold(ONE, Embodiment(), None, observation) is None
    assert hold(ONE, Embodiment(gripper_state=1), None, observation)[0, 6] == pytest.approx(0.7)
    assert hold(ONE, Embodiment(gripper_state=5), None, observation) is None


def test_an_embodiment_is_a_name_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "arm.json"
    file.write_text(json.dumps({"max_position_m": 0.1, "workspace_low_m": [0, 0, 0]}))
    assert embodiment(str(file)) == Embodiment(max_position_m=0.1, workspace_low_m=(0.0, 0.0, 0.0))
    assert embodiment("widowx").max_position_m == 0.05
    with pytest.raises(UsageError, match="did you mean 'widowx'"):
        embodiment("windowx")
    file.write_text('{"max_positon_m": 1}')
    with pytest.raises(UsageError, match="max_position_m"):
        embodiment(str(file))
    file.write_text("[]")
    with pytest.raises(UsageError, match="no JSON object"):
        embodiment(str(file))
