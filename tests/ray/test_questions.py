"""Held-out questions on a real Ray cluster with a fake policy: counted by kind, once, of the test split only."""

import base64
import sys

import numpy as np
import pytest
from ray import cloudpickle

from dualvla.errors import DataError, UsageError
from dualvla.io import dataset, manifest
from dualvla_eval.policies import PolicyRef
from dualvla_eval.qa_suite import ANSWER_SCHEMA, run_questions
from dualvla_eval.report.gather import gather

pytestmark = pytest.mark.usefixtures("ray_cluster")
cloudpickle.register_pickle_by_value(sys.modules[__name__])

KINDS = ("colour", "count")


class Parrot:
    """Knows colours, and thinks that there are always two."""

    def answer(self, observations):
        return [self._answer(o.instruction) for o in observations]

    def _answer(self, question):
        if "Options:" in question:
            return f"({question[8].upper()})"
        return question.rsplit(" ", 1)[-1] if question.startswith("colour") else "Two."


def load_parrot(folder):
    return Parrot()


@pytest.fixture
def data(tmp_path):
    """100 training and 70 test questions, and a robot row that is none."""
    rows = [question("train", i) for i in range(100)] + [question("test", i) for i in range(70)]
    rows.append({**question("test", 999), "domain": "robot"})
    return write_data(str(tmp_path / "data"), rows)


def question(split, i):
    kind = KINDS[i % 2]
    number = "two" if i % 4 == 1 else "three"
    asked, answer = ("colour of it: red", "the red") if kind == "colour" else ("how many?", number)
    return {
        "episode_id": f"qa/{split}/{i:03d}", "step": 0, "split": split, "domain": "multimodal", "task": kind,
        "instruction": asked, "reasoning": answer,
        "images": {"main": dataset.encode_png(np.full((4, 4, 3), i % 256, np.uint8))},
    }  # fmt: skip


def write_data(folder, rows):
    manifest.begin(folder, dataset.KIND, {}, {})
    dataset.write_table(dataset.part_url(folder, 0), dataset.rows_to_table(rows))
    dataset.finish_dataset(folder, {}, {}, rows_in=len(rows))
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return str(folder)


def test_accuracy_by_kind_on_the_test_split_only(tmp_path, data, checkpoint):
    refs = [PolicyRef("a", checkpoint), PolicyRef("b", checkpoint)]
    summary = run_questions(str(tmp_path / "out"), [f"qa:{data}"], refs, workers=2, load=load_parrot)
    tasks = summary["policies"]["a"]["tasks"]
    assert (tasks["colour"]["successes"], tasks["colour"]["n"]) == (35, 35)
    assert (tasks["count"]["successes"], tasks["count"]["n"]) == (18, 35)
    assert (tasks["all"]["successes"], tasks["all"]["n"]) == (53, 70)
    rows = dataset.read_table(str(tmp_path / "out" / "answers.parquet"), ANSWER_SCHEMA.names).to_pylist()
    keys = [(r["policy"], r["question_id"]) for r in rows]
    assert len(keys) == len(set(keys)) == 140
    assert all("/test/" in question_id for _, question_id in keys)

    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "parts" / "b-data-000000.parquet").unlink()
    assert run_questions(str(tmp_path / "out"), [f"qa:{data}"], refs, workers=1, load=load_parrot) == summary
    assert run_questions(str(tmp_path / "out"), [f"qa:{data}"], refs, workers=1)["skipped"]


def test_a_data_set_without_questions_is_refused(tmp_path, checkpoint):
    data = write_data(str(tmp_path / "data"), [question("train", 0)])
    with pytest.raises(DataError, match="no multimodal rows of split 'test'"):
        run_questions(str(tmp_path / "out"), [f"qa:{data}"], [PolicyRef("a", checkpoint)], workers=1)


def test_a_policy_that_cannot_answer_is_refused(tmp_path, data):
    with pytest.raises(UsageError, match="'expert' cannot answer questions"):
        run_questions(str(tmp_path / "out"), [f"qa:{data}"], [PolicyRef("expert", "expert")], workers=1)


def test_several_benchmarks_get_a_column_each_and_their_mean(tmp_path, data, checkpoint):
    """A choice, and questions whose marks are graded, with rows that cannot be asked; killed and resumed."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 5, 3), np.uint8)
    picture = base64.b64encode(dataset.encode_png(noise)).decode()
    truncated = base64.b64encode(dataset.encode_png(noise)[:90]).decode()
    choice = tmp_path / "Choice.tsv"
    choice.write_text(
        "index\timage\tquestion\tA\tB\tanswer\tcategory\n"
        f"1\t{picture}\tcolour? b\tred\tblue\tB\tlook\n"
        f"2\t{truncated}\tcolour? b\tred\tblue\tB\tlook\n"
        "3\t1\tcolour? a\tred\tblue\tB\tlook\n"
        f"4\t{picture}\t\tred\tblue\tB\tlook\n"
    )
    free = tmp_path / "Free.tsv"
    people = ["two"] * 2 + ["three"] * 8
    free.write_text(f'index\timage\tquestion\tanswer\n7\t{picture}\thow many?\t"{people}"\n')
    suites = [f"qa:{choice}", f"qa:docs={free}", f"qa:{data}"]
    summary = run_questions(str(tmp_path / "out"), suites, [PolicyRef("a", checkpoint)], workers=2, load=load_parrot)

    columns = summary["policies"]["a"]["benchmarks"]
    assert [(c["metric"], c["n"]) for c in columns.values()] == [("choice", 2), ("vqa", 1), ("exact", 70)]
    assert [c["rate"] for c in columns.values()] == pytest.approx([0.5, 0.6, 53 / 70])
    mean = summary["policies"]["a"]["MM"]
    assert mean["rate"] == pytest.approx(np.mean([0.5, 0.6, 53 / 70]))
    assert mean["low"] < mean["rate"] < mean["high"]
    about = summary["benchmarks"]["Choice"]
    assert (about["rows"], about["bad_rows"]) == (4, 2)
    assert "cannot be decoded" in about["problems"][0]
    assert about["problems"][1] == "4: it has no question"

    (tmp_path / "out" / "manifest.json").unlink()
    for part in ("a-Choice-000000", "a-data-000064"):
        (tmp_path / "out" / "parts" / f"{part}.parquet").unlink()
    again = run_questions(str(tmp_path / "out"), suites, [PolicyRef("a", checkpoint)], workers=1, load=load_parrot)
    assert again == summary

    alone = run_questions(
        str(tmp_path / "alone"), suites[:1], [PolicyRef("a", checkpoint)], workers=1, load=load_parrot
    )
    assert alone["policies"]["a"]["tasks"]["all"] == columns["Choice"]
    run_questions(str(tmp_path / "rest"), suites[1:], [PolicyRef("a", checkpoint)], workers=1, load=load_parrot)
    for folders in (["out"], ["alone", "rest"]):
        (answers,) = gather([str(tmp_path / f) for f in folders]).answers
        assert answers.benchmarks == columns
        assert answers.overall == mean


def test_two_benchmarks_of_one_name_are_refused(tmp_path, data, checkpoint):
    with pytest.raises(UsageError, match="2 benchmarks are called 'data'"):
        run_questions(str(tmp_path / "out"), [data, data], [PolicyRef("a", checkpoint)], workers=1)
