"""Conventions: every source's numbers become metres, radians (extrinsic XYZ) and 1 = open, by golden values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from dualvla.errors import DataError, UsageError
from dualvla_pipelines.sources import conventions
from dualvla_pipelines.sources.conventions import BRIDGE_RLDS, FRACTAL_RLDS, Convention, convert

ANGLES = st.floats(-10.0, 10.0)
SCIPY = {
    "euler_xyz": lambda v: Rotation.from_euler("xyz", v),
    "euler_xyz_intrinsic": lambda v: Rotation.from_euler("XYZ", v),
    "quaternion_xyzw": lambda v: Rotation.from_quat(v),
    "quaternion_wxyz": lambda v: Rotation.from_quat(v, scalar_first=True),
    "rotation_vector": lambda v: Rotation.from_rotvec(v),
}


@pytest.mark.parametrize("kind", sorted(SCIPY))
@settings(max_examples=60, deadline=None)
@given(numbers=st.lists(ANGLES, min_size=4, max_size=4).filter(lambda v: np.linalg.norm(v) > 1e-3))
def test_rotations_agree_with_scipy(kind: str, numbers: list[float]) -> None:
    values = np.array([numbers[: 4 if kind.startswith("quaternion") else 3]])
    ours, theirs = conventions.to_matrix(values, kind), SCIPY[kind](values)
    np.testing.assert_allclose(ours, theirs.as_matrix(), atol=1e-12)
    back = Rotation.from_rotvec(conventions.matrix_to_vector(ours))
    np.testing.assert_allclose(back.as_matrix(), ours, atol=1e-7)
    back = Rotation.from_euler("xyz", conventions.matrix_to_euler(ours))
    np.testing.assert_allclose(back.as_matrix(), ours, atol=1e-7)


@pytest.mark.parametrize("vector", [[0, 0, 0], [1e-12, 0, 0], [np.pi, 0, 0], [0, -np.pi + 1e-9, 0], [2.0, -1.0, 0.5]])
def test_rotation_vectors_at_their_limits(vector: list[float]) -> None:
    values = np.array([vector], dtype=np.float64)
    back = conventions.matrix_to_vector(conventions.to_matrix(values, "rotation_vector"))
    turn = Rotation.from_rotvec(back) * Rotation.from_rotvec(values).inv()
    assert turn.magnitude()[0] < 1e-7
    assert np.linalg.norm(back) <= np.pi + 1e-9


def test_bridge_drops_its_first_step_and_relabels_actions_from_reached_poses() -> None:
    state = np.zeros((5, 7), dtype=np.float32)
    state[:, 0] = [0.0, 0.1, 0.2, 0.2, 0.5]
    state[:, 5] = [0.0, 0.0, 0.3, 0.3, -0.1]  # yaw: in the base frame a turn about z
    state[:, 6] = [1.0, 1.0, 0.7, 0.2, 0.0]
    action = np.zeros((5, 7), dtype=np.float32)
    action[:, 6] = [0.0, 1.0, 0.6, 0.02, 0.0]
    found = convert({"observation/state": state, "action": action}, BRIDGE_RLDS)
    assert set(found.dropped) == {0, 4}
    np.testing.assert_allclose(found.action[1], [0.1, 0, 0, 0, 0, 0.3, 1.0], atol=1e-6)
    np.testing.assert_allclose(found.action[2], [0.0, 0, 0, 0, 0, 0.0, 0.0], atol=1e-6)  # 0.6 is on its way to 0.02
    np.testing.assert_allclose(found.action[3], [0.3, 0, 0, 0, 0, -0.4, 0.0], atol=1e-6)
    np.testing.assert_array_equal(found.pose, state[:, :6].astype(np.float64))  # to the bit: nothing to convert
    np.testing.assert_allclose(found.gripper[:, 0], [1.0, 1.0, 0.7, 0.2, 0.0], atol=1e-6)


def test_fractal_turns_quaternions_and_closedness_around() -> None:
    steps = 6
    pose = np.zeros((steps, 7))
    pose[:, 6] = 1.0
    pose[1, 3:] = Rotation.from_euler("xyz", [0.4, -0.3, 1.2]).as_quat()
    closing = np.array([0, 0, 1.0, 0, -1.0, 0])
    columns = {
        "observation/base_pose_tool_reached": pose,
        "observation/gripper_closed": np.array([0, 0, 0.25, 1, 1, 0]),
        "action/world_vector": np.full((steps, 3), 0.02),
        "action/rotation_delta": np.tile([0.1, 0.0, -0.2], (steps, 1)),
        "action/gripper_closedness_action": closing,
    }
    found = convert(columns, FRACTAL_RLDS)
    assert not found.dropped
    np.testing.assert_allclose(found.pose[1, 3:], [0.4, -0.3, 1.2], atol=1e-12)
    np.testing.assert_allclose(found.gripper[:, 0], [1, 1, 0.75, 0, 0, 1])
    np.testing.assert_allclose(found.action[:, 6], [1, 1, 0, 0, 1, 1])
    np.testing.assert_allclose(found.action[:, :6], np.tile([0.02, 0.02, 0.02, 0.1, 0.0, -0.2], (steps, 1)))


@pytest.mark.parametrize(
    ("commands", "openings"),
    [([0, 0], [1, 1]), ([-1, 0, 1], [1, 1, 0]), ([0, -1, 0], [0, 1, 1]), ([0.05, 1, 0], [1, 0, 0]), ([], [])],
)
def test_relative_gripper_commands_are_made_absolute(commands: list[float], openings: list[float]) -> None:
    np.testing.assert_array_equal(conventions.absolute_from_closing(np.array(commands)), openings)


def test_units_and_gripper_scale_are_converted_and_two_arms_stay_apart() -> None:
    def arm(i: int) -> conventions.Arm:
        return conventions.Arm(
            f"pose[{6 * i}:{6 * i + 3}]", f"pose[{6 * i + 3}:{6 * i + 6}]", f"grip[{i}:{i + 1}]",
            f"goal[{7 * i}:{7 * i + 3}]", f"goal[{7 * i + 3}:{7 * i + 6}]", f"goal[{7 * i + 6}:{7 * i + 7}]",
        )  # fmt: skip

    convention = Convention(
        "two", (arm(0), arm(1)), position_unit="mm", angle_unit="deg", gripper_closed=100, gripper_open=0,
        action="absolute", action_gripper_closed=-1, control_hz=50,
    )  # fmt: skip
    pose = np.array([[100, 0, 0, 0, 0, 90, 200, 0, 0, 0, 0, 0]], dtype=float)
    goal = np.array([[110, 0, 0, 0, 0, 180, -1, 200, 20, 0, 90, 0, 0, 1]], dtype=float)
    found = convert({"pose": pose, "grip": np.array([[100.0, 25.0]]), "goal": goal}, convention)
    np.testing.assert_allclose(found.pose[0], [0.1, 0, 0, 0, 0, np.pi / 2, 0.2, 0, 0, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(found.gripper[0], [0.0, 0.75])
    wanted = [0.01, 0, 0, 0, 0, np.pi / 2, 0, 0, 0.02, 0, np.pi / 2, 0, 0, 1]
    np.testing.assert_allclose(found.action[0], wanted, atol=1e-12)
    assert convention.action_space == "bimanual_ee_delta_pose+gripper"


def test_what_is_not_finite_stays_so_and_spoils_no_other_step() -> None:
    state, action = np.zeros((4, 7)), np.zeros((4, 7))
    state[3, 4] = np.nan
    found = convert({"observation/state": state, "action": action}, BRIDGE_RLDS)
    assert np.isfinite(found.action[1]).all()
    assert np.isnan(found.action[2, 3:6]).all()


def test_a_convention_is_named_or_refused(tmp_path: Path) -> None:
    table = {"bridge": BRIDGE_RLDS}
    with pytest.raises(UsageError, match="do not say what its numbers mean"):
        conventions.load("auto", table, None, ())
    with pytest.raises(UsageError, match="Unknown convention 'brigde'") as caught:
        conventions.load("brigde", table, None, ())
    assert "did you mean 'bridge'" in str(caught.value)
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"name": "mine", "arms": [vars(BRIDGE_RLDS.arms[0])]}))
    found = conventions.load(str(file), table, None, ("angle_unit=deg", "control_hz=10"))
    assert (found.name, found.angle_unit, found.control_hz) == ("mine", "deg", 10.0)
    with pytest.raises(UsageError, match=r"is 1\.0 both closed and open"):
        conventions.load("bridge", table, None, ("gripper_closed=1",))


def test_a_missing_or_narrow_column_is_named() -> None:
    with pytest.raises(DataError, match="no column 'observation/state'"):
        convert({"action": np.zeros((2, 7))}, BRIDGE_RLDS)
    with pytest.raises(DataError, match="more than the 5 numbers"):
        convert({"observation/state": np.zeros((2, 5)), "action": np.zeros((2, 7))}, BRIDGE_RLDS)
