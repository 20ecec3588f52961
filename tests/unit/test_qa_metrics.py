"""How answers are marked: against hand-computed values of the published metrics, and properties of any text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualvla_eval import qa_metrics
from dualvla_eval.qa_metrics import anls, chosen, edit_distance, mark, normalise, vqa_accuracy, vqa_normalise

OPTIONS = {"A": "a red cube", "B": "a blue cube", "C": "cup", "D": "No, it is not"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("B. a blue cube", "B"), ("(C) the cup", "C"),
        ("The answer is B.", "B"), ("Answer: D", "D"), ("**C**", "C"), ("A blue cube", "B"), ("It is the cup.", "C"),
        ("A", "A"), ("a cube", None), ("", None), ("E", None), ("a red cube or a blue cube", None),
        ("no it is not", "D"), ("The answer is A or B, option B", None),
    ],
)  # fmt: skip
def test_the_option_that_an_answer_chooses(answer: str, letter: str | None) -> None:
    assert chosen(answer, OPTIONS) == letter
    assert mark("choice", answer, [letter or "A"], OPTIONS) == (letter is not None)


@given(st.text(max_size=30))
def test_no_answer_chooses_what_is_not_offered(answer: str) -> None:
    assert chosen(answer, OPTIONS) in (*OPTIONS, None)


def test_what_counts_as_the_same_answer() -> None:
    assert normalise("The red  cube.") == normalise("a RED cube")
    assert normalise("left of it") != normalise("right of it")
    assert mark("exact", "Two!", ["2", "two"]) == 1.0


@pytest.mark.parametrize(("agreeing", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_leaves_each_person_out_once(agreeing: int, accuracy: float) -> None:
    """The official figures: with 3 of 10, 7 subsets hold all three and 3 hold two of them."""
    assert vqa_accuracy("yes", ["yes"] * agreeing + ["no"] * (10 - agreeing)) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Two.", "2"), ("the  dog", "dog"), ("dont", "don't"), ("1,000", "1000"), ("3.5", "3.5"),
        ("t-shirt", "t shirt"), ("yes!", "yes"), ("a, b", "b"), ("none", "0"), ("U.S.", "us"),
    ],
)  # fmt: skip
def test_vqa_answers_are_compared_as_the_official_evaluation_does(text: str, same: str) -> None:
    assert vqa_normalise(text) == same


def test_anls_is_the_best_similarity_above_one_half() -> None:
    assert anls("Hello  World", ["hello world"]) == 1.0
    assert anls("1998", ["1989", "1999"]) == pytest.approx(0.75)
    assert anls("abcd", ["abxy"]) == pytest.approx(0.5)  # just at the threshold
    assert anls("abcd", ["axyz"]) == 0.0
    assert anls("", ["a"]) == 0.0


@given(st.text(max_size=12), st.text(max_size=12), st.text(max_size=12))
def test_the_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, b) == edit_distance(b, a) <= max(len(a), len(b))
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


def test_right_or_wrong_has_wilsons_interval_and_graded_marks_the_bootstraps() -> None:
    right = qa_metrics.measured("exact", [1.0, 0.0, 1.0, 1.0])
    assert (right["successes"], right["n"]) == (3, 4)
    assert 0.0 < right["low"] < 0.75 < right["high"] < 1.0
    graded = qa_metrics.measured("anls", [0.5, 0.75, 1.0, 0.0])
    assert graded["rate"] == pytest.approx(0.5625)
    assert graded["low"] < 0.5625 < graded["high"]
    mean = qa_metrics.mean_of_benchmarks({"large": [0.0] * 90, "small": [1.0] * 10})
    assert mean["rate"] == 0.5  # each benchmark counts the same
