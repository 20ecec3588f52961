"""Tables of the report: what is exported is what was measured, in every format, and no text can do harm there."""

import csv
import io
import json
import shutil
import subprocess

import pytest

from dualvla_eval.report import leaderboard, published
from dualvla_eval.report.exports import to_csv, to_json, to_latex
from dualvla_eval.report.gather import Answers, Checkpoint, Episode, Evaluation, Gathered, PolicyResult, Pruned
from dualvla_eval.report.leaderboard import Palette
from dualvla_eval.report.tables import Column, Number, Row, Table, scalars, span, text

TABLE = Table(
    "things",
    "Things & 100 %",
    "How {odd} they_are.",
    (Column("policy", "policy", "text"), Column("score", "score"), Column("note", "note", "text")),
    (
        Row({"policy": "=cmd()", "score": Number(-12.34, -20.0, -5.0, 30), "note": r"\input{x} 5% a_b ~^#"}),
        Row({"policy": "absent", "score": None}),
        Row({"policy": "paper", "score": Number(50.0)}, origin="published"),
    ),
)


def test_csv_keeps_intervals_and_counts_and_starts_no_formula():
    rows = list(csv.DictReader(io.StringIO(to_csv(TABLE))))
    assert rows[0]["policy"] == "'=cmd()"
    assert (float(rows[0]["score"]), float(rows[0]["score_low"]), int(rows[0]["score_n"])) == (-12.34, -20.0, 30)
    assert rows[1]["score"] == ""
    assert rows[2]["origin"] == "published"


def test_json_says_null_where_nothing_was_measured():
    rows = json.loads(to_json(TABLE))["rows"]
    assert rows[0]["score"] == {"value": -12.34, "low": -20.0, "high": -5.0, "n": 30}
    assert rows[1]["score"] is None
    assert rows[1]["note"] is None


def test_latex_escapes_every_special_character_and_keeps_the_interval():
    latex = to_latex(TABLE)
    assert r"\textbackslash{}input\{x\} 5\% a\_b \textasciitilde{}\textasciicircum{}\#" in latex
    assert r"$-$12.3 {\scriptsize [$-$20.0, $-$5.0]}" in latex
    assert latex.index("absent") < latex.index("paper")
    assert latex.count(r"\\") == 4  # a line each for the heading and the three rows


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no pdflatex")
def test_latex_compiles(tmp_path):
    page = r"\documentclass{article}\usepackage{booktabs}\begin{document}" + to_latex(TABLE) + r"\end{document}"
    (tmp_path / "t.tex").write_text(page)
    subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"], cwd=tmp_path, check=True)


def test_what_is_not_zero_is_never_shown_as_zero():
    assert text(Number(0.0002), 3) == "<0.001"
    assert text(Number(0.0), 3) == "0.000"
    assert text(None) == "–"
    assert span(Number(1, 0.5, 2.0)) == "0.5–2.0"
    assert span(Number(-1, -2.0, 0.5)) == "−2.0 to 0.5"


def test_trackers_get_our_numbers_only():
    assert list(scalars(TABLE)) == [("=cmd()", "score", -12.34)]


# --- what is computed -------------------------------------------------------------------------------------------------


def result(name, suite, outcomes, scores=None, kind="reasoning", digest=None):
    """A policy's episodes: outcomes maps (task, episode) -> success; scores likewise -> Eq. 8 score."""
    tasks = {task: {"n": 1, "rate": 1.0, "low": 0.0, "high": 1.0} for task, _ in outcomes}
    mean = {"value": 0.5, "low": 0.4, "high": 0.6, "trials": len(outcomes)}
    summary = {"suite": suite, "kind": kind, "control": False, "tasks": tasks, "means": {"mean of tasks": mean}}
    evaluation = Evaluation("e", suite, {"control_hz": 5, **summary}, {"judge": "rubric"} if scores else None)
    episodes = tuple(
        Episode(
            f"{name}-{task}-{i}",
            name,
            evaluation,
            {"task": task, "variant": "base", "episode_id": i, "seed": i, "success": success},
            {"score": scores[task, i], "unjudged": None} if scores else None,
        )
        for (task, i), success in outcomes.items()
    )
    return PolicyResult(name, evaluation, summary, None, digest, episodes)


def test_policies_are_compared_on_the_episodes_both_ran_and_on_no_other():
    first = result("a", "s", {("t", i): True for i in range(10)}, {("t", i): 0.9 for i in range(10)})
    second = result("b", "s", {("t", i): i > 20 for i in range(4, 30)}, {("t", i): 0.4 for i in range(4, 30)})
    (row,) = leaderboard.differences([second, first], "paired", "Paired").rows
    assert row.cells["pair"] == "a − b"
    assert (row.cells["n"].value, row.cells["only_first"].value, row.cells["only_second"].value) == (6, 6, 0)
    assert row.cells["p"].value == pytest.approx(2 / 2**6)
    assert row.cells["success"].value == 100
    assert row.cells["score"].value == pytest.approx(50)
    assert row.cells["verdict"] == "a"


def test_policies_without_a_common_episode_are_not_compared():
    first, second = result("a", "s", {("t", 0): True}), result("b", "s", {("u", 0): True})
    assert not leaderboard.differences([first, second], "paired", "Paired")


def test_published_means_are_recomputed_from_their_cells_and_given_only_where_all_are_there():
    table = published.simplerenv(Gathered(), Palette(Gathered()))
    rows = {row.cells["policy"]: row.cells for row in table.rows}
    for row in published.published()["simplerenv"]:
        assert rows[row["model"]]["nine"].value == pytest.approx(row["nine_cell"], abs=0.051)
        assert (rows[row["model"]]["twelve"] is None) == (None in row["values"])
    assert rows["DualVLA"]["printed"].value == 61.0
    assert round(rows["DualVLA"]["nine"].value, 2) == 60.93


def test_our_simplerenv_cells_pool_the_tasks_of_a_cell_and_invent_no_mean():
    tasks = ("google_robot_open_drawer", "google_robot_close_drawer")
    found = Gathered([result("mine", "simpler-google-vm", {(t, i): i < 3 for t in tasks for i in range(4)})])
    row = published.simplerenv(found, Palette(found)).rows[0]
    assert row.cells["policy"] == "mine"
    assert (row.cells["gr_drawer_vm"].value, row.cells["gr_drawer_vm"].n) == (75, 8)
    assert row.cells["gr_drawer_va"] is row.cells["nine"] is row.cells["twelve"] is None


def checkpoint(name, stage="dual", kd=0.15, data="d-both", teacher=True):
    inputs = {"data": data} | ({"action_teacher": "t"} if teacher else {})
    about = {"config": {"stage": stage, "train": {"losses": {"kd": kd}}}, "inputs": inputs}
    return Checkpoint(name, about, f"c-{name}", ())


PRUNED = [Pruned(mode, mode, mode, {}, f"d-{mode}", None) for mode in ("both", "scene", "action", "random", "none")]


@pytest.mark.parametrize(
    ("made", "setting"),
    [
        (checkpoint("x"), "full"),
        (checkpoint("x", data="d-none"), "no_pruning"),
        (checkpoint("x", data="d-scene"), "no_action_label"),
        (checkpoint("x", data="d-action"), "no_scene_label"),
        (checkpoint("x", data="d-random"), "random_pruning"),
        (checkpoint("x", kd=0.0), "no_distillation"),
        (checkpoint("x", kd=0.0, data="d-none"), "base_finetuned"),
        (checkpoint("x", teacher=False), "no_action_teacher"),
        (checkpoint("x", stage="reasoning"), "base"),
        (checkpoint("x", stage="specialist"), None),
        (checkpoint("x", data="unknown"), None),
    ],
)
def test_a_checkpoint_is_the_ablation_it_was_made_as(made, setting):
    assert published.setting_of("c-x", [made], PRUNED) == setting
    assert published.setting_of("another", [made], PRUNED) is None


def test_a_setting_nobody_ran_stays_absent_beside_the_paper():
    found = Gathered([result("mine", "blocks", {("t", 0): True}, digest="c-x")], checkpoints=[checkpoint("x")])
    found.pruned = PRUNED
    components = published.ablations(found, Palette(found))[0]
    ours = {row.cells["setting"]: row for row in components.rows if row.origin == "ours"}
    assert ours["DualVLA"].cells["policy"] == "mine"
    assert ours["DualVLA"].cells["suite_blocks"].value == 50
    assert ours["DualVLA"].cells["GR"] is None
    assert not ours["without pruning"].measured
    paper = next(r for r in components.rows if r.origin == "published" and r.cells["setting"] == "DualVLA")
    assert [paper.cells[c].value for c in ("GR", "WR", "MM", "Average")] == [73.4, 31.1, 65.4, 56.6]


def test_mm_is_the_mean_of_our_benchmarks_and_no_single_one():
    """The questions of one data set are no MM; several benchmarks are, with a column each."""

    def answered(name, rates):
        columns = {b: {"metric": "exact", "n": 9, "rate": r, "low": r, "high": r} for b, r in rates.items()}
        mean = {"n": 9, "rate": 0.4, "low": 0.3, "high": 0.5}
        several = len(rates) > 1
        return Answers(name, columns, {**columns, "MM": mean} if several else {"all": mean}, mean, ())

    found = Gathered([result("mine", "blocks", {("t", 0): True}, digest="c-x")], checkpoints=[checkpoint("x")])
    found.pruned = PRUNED
    for rates, column, other in (({"MMMU": 0.3, "MMStar": 0.5}, "MM", "questions"), ({"data": 0.4}, "questions", "MM")):
        found.answers = [answered("mine", rates)]
        table = leaderboard.questions(found.answers, Palette(found))
        assert [c.key for c in table.columns[1:]] == ([*rates, "MM"] if column == "MM" else ["all"])
        ablation = published.ablations(found, Palette(found))[0]
        ours = next(row for row in ablation.rows if row.cells["policy"] == "mine")
        assert ours.cells[column].value == 40
        assert ours.cells.get(other) is None
