"""Benchmarks of questions from files: which form it is, how it is marked, and rows that cannot be asked, by name."""

import base64
import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualvla.errors import DataError, UsageError
from dualvla.io import dataset
from dualvla_eval import qa_benchmarks
from dualvla_eval.qa_benchmarks import Benchmark, BenchmarkRef

PICTURE = base64.b64encode(dataset.encode_png(np.zeros((5, 7, 3), np.uint8))).decode()


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def _read(path: Path, rows: list[dict[str, Any]], metric: Any = None) -> Benchmark:
    return qa_benchmarks.read(BenchmarkRef(path.stem, _write(path, rows), metric))


def _row(index: int = 0, **changes: Any) -> dict[str, Any]:
    return {"index": index, "image": PICTURE, "question": "what is it?", "answer": "cup", **changes}


def test_a_choice_is_asked_with_its_hint_and_options(tmp_path: Path) -> None:
    options = {"A": "plate", "B": "cup", "C": "nan, not a number", "D": ""}
    found = _read(
        tmp_path / "MMStar.tsv", [_row(answer="b", hint="Look at\nthe table.", category="objects", **options)]
    )
    (question,) = found.questions
    assert found.metric == "choice"
    assert (question.expected, question.kind, question.problem) == (("B",), "objects", None)
    assert question.prompt == (
        "Look at\nthe table.\nwhat is it?\nOptions:\nA. plate\nB. cup\nC. nan, not a number\n"
        "Answer with the letter of the right option."
    )
    assert dataset.decode_image(question.images["main"]).shape == (5, 7, 3)


def test_the_content_or_the_name_says_how_it_is_marked(tmp_path: Path) -> None:
    people = str(["cup"] * 10)
    for name, answer, metric, number in (
        ("TextVQA_VAL", people, "vqa", 10),
        ("DocVQA_VAL", "['cup', 'mug']", "anls", 2),
        ("InfoVQA-VAL", '["cup"]', "anls", 1),
        ("Other", "cup", "exact", 1),
    ):
        found = _read(tmp_path / f"{name}.tsv", [_row(answer=answer)])
        assert (found.metric, len(found.questions[0].expected)) == (metric, number), name
    assert _read(tmp_path / "Other.tsv", [_row()], "anls").metric == "anls"


def test_rows_that_cannot_be_asked_stay_with_their_problem(tmp_path: Path) -> None:
    choice = {"A": "plate", "B": "cup", "answer": "A"}
    rows = [
        _row(1, **choice),
        _row(2, **{**choice, "image": "1"}),
        _row(3, **{**choice, "image": "77"}),
        _row(4, **{**choice, "image": "no base64 " * 20}),
        _row(5, **{**choice, "image": str([PICTURE, PICTURE])}),
        _row(6, **{**choice, "answer": "C"}),
        _row(7, **{**choice, "B": ""}),
        _row(8, **{**choice, "question": " "}),
        _row(1, **choice),
        {**_row(9, **choice), "index": ""},
    ]
    url = Path(_write(tmp_path / "q.tsv", rows))
    url.write_text(url.read_text() + f"10\t{PICTURE}\n")
    found = qa_benchmarks.read(BenchmarkRef("q", str(url)))
    problems = [q.problem for q in found.questions]
    assert problems[:2] == [None, None]
    assert found.questions[1].images == found.questions[0].images
    for problem, reason in zip(
        problems[2:],
        ("no image", "no base64", "2 images", "'C' is none", "fewer than two", "no question", "1 stands twice",
         "no index", "another number of columns"),
        strict=True,
    ):  # fmt: skip
        assert problem is not None
        assert reason in problem
    ids = [q.id for q in found.questions]
    assert len(set(ids)) == len(ids)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries({n: st.text(max_size=20) for n in ("question", "answer", "image", "A", "B")}), max_size=4
    )
)
def test_any_text_is_a_question_or_has_a_problem(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> None:
    folder = tmp_path_factory.mktemp("any")
    clean = [{k: v.replace("\x00", "").replace("\r", " ") for k, v in row.items()} for row in rows]
    found = _read(
        folder / "q.tsv", [_row(A="plate", B="cup", answer="A"), *(_row(i + 1, **r) for i, r in enumerate(clean))]
    )
    assert len(found.questions) == len(rows) + 1
    assert found.questions[0].problem is None
    for question in found.questions:
        assert question.problem is not None or question.expected[0] in question.options


def test_what_is_no_benchmark_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("index\timage\tquestion\n1\tx\ty\n")
    with pytest.raises(DataError, match=r"no column 'answer' \(it has: index, image, question\)"):
        qa_benchmarks.read(BenchmarkRef("a", str(tmp_path / "a.tsv")))
    (tmp_path / "b.tsv").write_bytes(b"PAR1\xff\xfe")
    with pytest.raises(DataError, match="is no text"):
        qa_benchmarks.read(BenchmarkRef("b", str(tmp_path / "b.tsv")))
    with pytest.raises(DataError, match=r"no question that can be asked .*no image"):
        _read(tmp_path / "c.tsv", [_row(image="")])
    with pytest.raises(DataError, match="does not exist"):
        qa_benchmarks.content_digest(BenchmarkRef("d", str(tmp_path / "d.tsv")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("qa:runs/tiny/data", ("data", "runs/tiny/data", None)),
        ("qa:x/DocVQA_VAL.tsv#anls", ("DocVQA_VAL", "x/DocVQA_VAL.tsv", "anls")),
        ("qa:mine=s3://bucket/a=b/q.tsv", ("mine", "s3://bucket/a=b/q.tsv", None)),
        ("qa:s3://bucket/a=b/q.tsv", ("q", "s3://bucket/a=b/q.tsv", None)),
    ],
)
def test_a_suites_name(text: str, expected: tuple[str, str, str | None]) -> None:
    found = qa_benchmarks.parse(text)
    assert (found.name, found.path, found.metric) == expected


def test_a_wrong_suite_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no metric 'anlz'.*did you mean 'anls'"):
        qa_benchmarks.parse("qa:x.tsv#anlz")
    with pytest.raises(UsageError, match="names no benchmark"):
        qa_benchmarks.parse("qa:")
