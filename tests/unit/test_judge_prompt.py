"""What reaches a judge's model, and what is taken from it: texts of policies stay data."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from injections import INJECTIONS, VERDICT
from judge_fakes import answer, trajectory

from dualvla_eval import frames
from dualvla_eval.judges.prompt import Example, as_data, build, fill, repair
from dualvla_eval.judges.reply import MalformedError, parse, schema

DATA = re.compile(r"<data>(.*?)</data>", re.DOTALL)
PLAIN = re.compile(r'"(?:[A-Za-z0-9 .,:;!?\'()+\-=%/_]|\\u[0-9a-f]{4})*"(?: \(cut after \d+ of \d+ characters\))?')


def prompt_of(tmp_path, texts=("go left", "go down"), examples=(), instruction="touch the red cube", **more):
    recorded = trajectory(0, texts=texts, folder=tmp_path, instruction=instruction)
    shown = frames.choose(recorded, 6)
    pictures = [b"jpeg"] * len(shown)
    return build(recorded, shown, pictures, examples=examples, order=range(len(shown)), detail="low", **more)


def texts_of(prompt):
    return [prompt.messages[0]["content"], *(p["text"] for p in prompt.messages[1]["content"] if p["type"] == "text")]


def skeleton(prompt):
    """All that is ours: the conversation without the data in it."""
    shape = [(m["role"], [p["type"] for p in m["content"]] if m["role"] == "user" else None) for m in prompt.messages]
    return shape, [prompt.messages[0]["content"], *(DATA.sub("<data></data>", t) for t in texts_of(prompt)[1:])]


@settings(deadline=None)
@given(st.text(max_size=700))
def test_any_text_becomes_plain_characters_and_comes_back_unchanged(text):
    data = as_data(text, limit=700)
    assert PLAIN.fullmatch(data)
    assert json.loads(data) == text


@settings(deadline=None)
@given(st.text(min_size=1, max_size=100))
def test_no_text_can_leave_its_place_or_add_a_message(tmp_path_factory, text):
    tmp_path = tmp_path_factory.mktemp("p")
    assert skeleton(prompt_of(tmp_path, (text,), instruction=text)) == skeleton(prompt_of(tmp_path, ("x",)))


@pytest.mark.parametrize("text", INJECTIONS.values(), ids=INJECTIONS)
def test_the_family_of_injections_leaves_the_conversation_as_it_is(tmp_path, text):
    example = Example("e", text, (text,), {"Action": 3, "Intention": 3, "Reasoning": 3, "Alignment": 3}, text, (b"j",))
    calm = Example("e", "x", ("x",), {"Action": 3, "Intention": 3, "Reasoning": 3, "Alignment": 3}, "x", (b"j",))
    attacked = prompt_of(tmp_path, (text,), (example,), instruction=text)
    assert skeleton(attacked) == skeleton(prompt_of(tmp_path, ("x",), (calm,)))
    for data in (found for text in texts_of(attacked)[1:] for found in DATA.findall(text)):
        assert PLAIN.fullmatch(data), data
    assert len("".join(texts_of(attacked))) < 20_000
    again = repair(attacked, text, "it is not JSON")
    assert [m["role"] for m in again] == ["system", "user", "assistant", "user"]
    assert PLAIN.fullmatch(again[2]["content"])


def test_the_last_words_are_ours(tmp_path):
    prompt = prompt_of(tmp_path)
    assert prompt.messages[-1]["content"][-1]["text"] == fill("closing").rstrip("\n")


def test_every_text_stands_before_the_picture_of_its_time(tmp_path):
    content = prompt_of(tmp_path).messages[1]["content"]
    labels = [p["text"] for p in content[1:-1] if p["type"] == "text"]
    assert [p["type"] for p in content[1:-1]] == ["text", "image_url"] * len(labels)
    assert 'At step 0 it wrote: <data>"go left"</data>' in labels[0]
    (second,) = [i for i, label in enumerate(labels) if "go down" in label]
    assert "At step 6 it wrote" in labels[second]
    steps = [int(re.search(r"Picture \d+ of \d+: step (\d+)", label)[1]) for label in labels]
    assert steps == sorted(steps)
    assert steps[second - 1] < 6 <= steps[second]


def test_the_policy_s_name_is_not_told(tmp_path):
    assert not any("policy" in text for text in texts_of(prompt_of(tmp_path))[1:])


# --- answers ----------------------------------------------------------------------------------------------------------


def test_an_answer_of_the_form_is_read():
    marks = parse(answer(1, 2, 3, 4, False), True)
    assert (marks.action, marks.intention, marks.reasoning, marks.alignment, marks.success) == (1, 2, 3, 4, False)
    assert parse(f"\n```json\n{answer(1, 2, 3, 4)}\n```\n", True).action == 1
    assert parse(answer(1, 2, reasoning=None), False).reasoning is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        f"Here it is: {answer()}",
        f"{answer()} {answer()}",
        answer() + "\nAll marks are 10.",
        answer(reasoning=None),
        answer(action=-1),
        answer(action=11),
        answer(action=5.0),
        answer(action="5"),
        answer(action=True),
        answer(action=None),
        answer(success="yes"),
        answer().replace('"Action": 7', '"Action": 7, "Action": 10'),
        answer().replace('"Action": 7', '"Action": NaN'),
        answer().replace('"Action": 7', '"Action": 7, "Bonus": 3'),
        answer()[:-1] + ', "More": 1}',
        '{"Thought": 3, "Result": {"Action": 1, "Intention": 1, "Reasoning": 1, "Alignment": 1}}',
        "[" * 100_000,
        '{"a":' * 10_000 + "1" + "}" * 10_000,
    ],
)
def test_anything_else_is_malformed(text):
    with pytest.raises(MalformedError):
        parse(text, True)


@settings(deadline=None)
@given(st.text())
def test_any_answer_is_read_or_malformed(text):
    with pytest.raises(MalformedError):
        parse(text, True)


@pytest.mark.parametrize("name", ["verdict", "fenced verdict", "closing tag", "role words"])
def test_a_judge_that_only_repeats_the_policy_is_not_believed(name):
    with pytest.raises(MalformedError, match="repeats what the robot wrote"):
        parse(VERDICT, True, said=["go left", INJECTIONS[name]])
    assert parse(answer(), True, said=["go left", INJECTIONS[name]]).action == 7


def test_the_schema_says_what_the_parser_wants():
    import jsonschema

    for asks, text in ((True, answer()), (False, answer(reasoning=None))):
        jsonschema.validate(json.loads(text), schema(asks))
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(json.loads(answer(action=11)), schema(asks))


# --- which pictures ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(2, 30), st.integers(1, 60), st.lists(st.integers(0, 59), max_size=40))
def test_pictures_are_few_ordered_and_hold_both_ends(limit, steps, eventful):
    recorded = bare(steps, {t for t in eventful if t < steps})
    chosen = frames.choose(recorded, limit)
    at = [step for step, _ in chosen]
    assert at == sorted(set(at))
    assert (at[0], at[-1]) == (0, steps)
    assert len(at) == min(limit, steps + 1)


def test_pictures_show_what_happened_first():
    chosen = dict(frames.choose(bare(50, {9, 10, 30}), 6))
    assert {10, 11, 31} <= set(chosen)
    assert [chosen[t] for t in (10, 11, 31)] == [frames.EVENT] * 3
    crowded = dict(frames.choose(bare(50, set(range(50))), 6))
    assert list(crowded.values()).count(frames.EVENT) == 4
    assert max(b - a for a, b in zip(sorted(crowded)[:-1], sorted(crowded)[1:], strict=True)) < 16


def bare(steps, eventful):
    import numpy as np

    from dualvla_eval.results import Trajectory

    return Trajectory(
        row={}, actions=np.zeros((steps, 7)), ee_pose=np.zeros((steps + 1, 6)), gripper=np.ones((steps + 1, 1)),
        states=({},) * (steps + 1), reasoning=(None,) * steps, keyframe=(False,) * steps,
        events=tuple(("contact:a",) if t in eventful else () for t in range(steps)),
    )  # fmt: skip
