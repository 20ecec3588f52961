"""The grammar of reasoning text: what is written is what is read, and nothing else is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualvla_eval.reasoning import LINKS, MOVES, VERBS, StatedReasoning, Step, motion_primitive, parse
from dualvla_eval.tasks.blocks import COLORS, SHAPES

_NAMES = st.one_of(st.just("bin"), st.builds("{} {}".format, st.sampled_from(list(COLORS)), st.sampled_from(SHAPES)))
_STEPS = st.one_of(
    st.builds(Step, st.sampled_from(VERBS), _NAMES),
    st.builds(Step, st.sampled_from(VERBS), _NAMES, st.sampled_from(LINKS), _NAMES),
)


@given(st.builds(StatedReasoning, st.lists(_STEPS, min_size=1, max_size=5).map(tuple), _STEPS, st.sampled_from(MOVES)))
def test_parse_reads_what_was_written(stated):
    assert parse(str(stated)) == stated
    assert parse(f"  {str(stated).upper()} ") == stated


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "reach the red cube",
        "plan: reach red cube. subtask: reach red cube.",
        "plan: reach red cube. subtask: reach red cube. move: sideways.",
        "plan: dance with red cube. subtask: reach red cube. move: left.",
        "plan: reach red cube. subtask: . move: left.",
        "plan: reach red cube. subtask: reach red cube. move: left. move: left.",
        "plan: reach red cube, . subtask: reach red cube. move: left.",
    ],
)
def test_anything_else_is_not_reasoning(text):
    assert parse(text) is None


@given(st.lists(st.floats(-0.03, 0.03), min_size=3, max_size=3))
def test_the_opposite_motion_has_the_opposite_word(displacement):
    opposite = dict(zip(("forward", "left", "up", "stay"), ("back", "right", "down", "stay"), strict=True))
    opposite |= {b: a for a, b in opposite.items()}
    word = motion_primitive(displacement)
    assert word in MOVES
    assert motion_primitive(-np.array(displacement)) == opposite[word]


def test_a_gripper_change_is_the_motion():
    assert motion_primitive([0.03, 0, 0], "close") == "close gripper"
