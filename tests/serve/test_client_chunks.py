"""Chunks joined in time: what is executed when replies are late, early, out of order or absent."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualvla.client import ChunkBuffer
from dualvla.client.chunks import old_weights
from dualvla.errors import WireError
from dualvla.hold import hold_action
from dualvla.schema import ACTION_SPACES

ARM = ACTION_SPACES["ee_delta_pose+gripper"]


def chunk(first: float, horizon: int, gripper: float = 1.0) -> np.ndarray:
    """Action i commands first + i in every dimension but the gripper."""
    actions = np.repeat(first + np.arange(horizon, dtype=np.float32)[:, None], ARM.size, axis=1)
    actions[:, 6] = gripper
    return actions


def executed(buffer: ChunkBuffer, steps: range) -> list[float | None]:
    return [None if (action := buffer.action(step)) is None else float(action[0]) for step in steps]


def test_a_chunk_is_executed_in_order_and_ends() -> None:
    buffer = ChunkBuffer(ARM)
    assert buffer.add(chunk(10, 3), asked_at=0, now=0) == 3
    assert executed(buffer, range(5)) == [10, 11, 12, None, None]
    assert [buffer.remaining(step) for step in range(5)] == [3, 2, 1, 0, 0]


def test_the_elapsed_part_of_a_late_chunk_is_left_out() -> None:
    buffer = ChunkBuffer(ARM)
    buffer.add(chunk(0, 4), asked_at=0, now=0)
    assert buffer.add(chunk(100, 6), asked_at=1, now=4) == 3  # asked before step 1, there before step 4
    assert executed(buffer, range(4, 8)) == [103, 104, 105, None]


def test_over_the_overlap_the_weight_moves_from_old_to_new() -> None:
    buffer = ChunkBuffer(ARM)
    buffer.add(np.zeros((8, 7), np.float32), asked_at=0, now=0)
    buffer.add(np.ones((8, 7), np.float32), asked_at=2, now=4)
    values = executed(buffer, range(4, 10))
    np.testing.assert_allclose(values[:4], 1 - np.array(old_weights(4)), rtol=1e-6)
    assert values[4:] == [1, 1]
    assert values == sorted(values)


def test_the_weights_are_the_papers() -> None:
    """Eq. 5 of real-time chunking for d <= i < H - s, written as there; H = 8, s = 2, d = 2."""
    horizon, new, delay = 8, 2, 2
    c = np.array([(horizon - new - i) / (horizon - new - delay + 1) for i in range(delay, horizon - new)])
    np.testing.assert_allclose(old_weights(horizon - new - delay), c * (np.exp(c) - 1) / (np.e - 1))


def test_a_gripper_is_never_half_open() -> None:
    buffer = ChunkBuffer(ARM)
    buffer.add(chunk(0, 8, gripper=1.0), asked_at=0, now=0)
    buffer.add(chunk(0, 8, gripper=0.0), asked_at=0 + 1, now=2)
    openings = [float(buffer.action(step)[6]) for step in range(2, 9)]
    assert set(openings) == {0.0, 1.0}
    assert openings == sorted(openings, reverse=True)


def test_an_answer_to_an_earlier_observation_changes_nothing() -> None:
    buffer = ChunkBuffer(ARM)
    buffer.add(chunk(50, 4), asked_at=2, now=2)
    assert buffer.add(chunk(0, 9), asked_at=1, now=3) == 0
    assert executed(buffer, range(3, 6)) == [51, 52, 53]
    buffer.clear()
    assert buffer.add(chunk(7, 1), asked_at=0, now=0) == 1


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 6)), np.zeros(7), np.full((2, 7), np.nan), np.full((2, 7), np.inf), np.zeros((1, 2, 7))]
)
def test_what_is_no_chunk_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(WireError, match="chunk"):
        ChunkBuffer(ARM).add(bad, asked_at=0, now=0)


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=12))
def test_whatever_the_delays_only_the_present_is_executed(replies: list[tuple[int, int, int]]) -> None:
    """Action i of a chunk asked at step s commands s + i, so every command must be its own step's number, blended or
    not; and none is given for a step that no chunk covers."""
    buffer, step, covered = ChunkBuffer(ARM), 0, 0
    for horizon, delay, gap in replies:
        asked_at = step
        for _ in range(delay + gap):
            action = buffer.action(step)
            assert (action is not None) == (step < covered)
            if action is not None:
                np.testing.assert_allclose(action[:6], step, rtol=1e-5)
            step += 1
        useful = buffer.add(chunk(asked_at, horizon), asked_at, step)
        assert useful == max(0, asked_at + horizon - step)
        covered = asked_at + horizon if useful else covered


def test_holding_moves_nothing_and_drops_nothing() -> None:
    last = np.arange(14, dtype=np.float32)
    held = hold_action(ACTION_SPACES["bimanual_ee_delta_pose+gripper"], last)
    assert held[[6, 13]].tolist() == [6, 13]
    assert not np.delete(held, [6, 13]).any()
    assert hold_action(ARM, None).tolist() == [0] * 6 + [1]
