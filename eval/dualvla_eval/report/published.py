"""The published rows, and ours in the layouts of the paper's tables (arXiv 2511.22134, Tables 2 and 4 to 8).

A cell nobody ran is absent. Which of our checkpoints is which ablation is read from how it was made (its manifest and
that of its data), never from its name. Knows what was gathered; nothing of HTML.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from dualvla_eval import statistics
from dualvla_eval.reference import SUITES, cell_of, published
from dualvla_eval.report.gather import Answers, Checkpoint, Gathered, PolicyResult, Pruned
from dualvla_eval.report.leaderboard import (
    PARTS,
    SCORE_HELP,
    Palette,
    part_columns,
    part_mean,
    score_mean,
    success_rate,
)
from dualvla_eval.report.tables import Column, Number, Row, Table, interval, number

_CELL_NAMES = {
    "gr_drawer": "drawer", "gr_coke": "pick can", "gr_near": "move near", "gr_apple": "apple in drawer",
    "wx_spoon": "spoon", "wx_carrot": "carrot", "wx_stack": "stack", "wx_eggplant": "eggplant",
}  # fmt: skip

# Tables 6 to 8: setting -> how the paper calls it. The same three tables, here by what they vary.
_ABLATIONS = {
    "components": {
        "base": "base (reasoning VLA)", "base_finetuned": "base, fine-tuned", "no_pruning": "without pruning",
        "no_distillation": "without distillation", "full": "DualVLA",
    },
    "pruning": {
        "random_pruning": "random pruning", "no_scene_label": "without scene label",
        "no_action_label": "without action label", "full": "DualVLA",
    },
    "teachers": {
        "no_action_teacher": "without action teacher", "no_reasoning_teacher": "without reasoning teacher",
        "full": "DualVLA",
    },
}  # fmt: skip
_GROUPS = ("GR", "WR", "MM", "Average")
_BY_MODE = {
    "both": "full",
    "none": "no_pruning",
    "random": "random_pruning",
    "scene": "no_action_label",
    "action": "no_scene_label",
}


# --- Table 2: SimplerEnv by cell --------------------------------------------------------------------------------------


def simplerenv(found: Gathered, palette: Palette) -> Table:
    """Success per cell with the 9-cell and the 12-cell mean, printed and recomputed."""
    cells, nine = published()["cells"], published()["nine_cell_definition"]
    rows = []
    for label, results in _by_label(found).items():
        ours = {cell: _cell(results, cell) for cell in cells}
        if any(ours.values()):
            means = {"nine": _mean(ours, nine), "twelve": _mean(ours, cells)}
            kind = results[0].summary["kind"]
            rows.append(Row({"policy": label, "kind": kind, **ours, **means}, mark=palette[label]))
    for row in published()["simplerenv"]:
        values = dict(zip(cells, row["values"], strict=True))
        numbers = {cell: number(value) for cell, value in values.items()}
        means = {"printed": number(row["printed_mean"]), "nine": _mean(numbers, nine), "twelve": _mean(numbers, cells)}
        about = {"policy": row["model"], "kind": row["kind"], "source": row["source"]}
        rows.append(Row({**about, **numbers, **means}, origin="published"))
    columns = (
        Column("policy", "policy", "text"),
        Column("kind", "kind", "text"),
        *(Column(cell, _cell_label(cell)) for cell in nine),
        Column("nine", "9-cell mean", help="recomputed from the nine cells of the paper's Table 2"),
        *(Column(cell, _cell_label(cell)) for cell in cells if cell not in nine),
        Column("twelve", "12-cell mean", help="adds apple in drawer (VM, VA) and eggplant; needs all twelve cells"),
        Column("printed", "printed mean", help="as the source prints it, whatever cells it was taken over"),
        Column("source", "source", "text"),
    )
    caption = (
        "Success in percent. GR: Google Robot, VM: visual matching, VA: variant aggregation; WX: WidowX. A mean is "
        "given only where all of its cells are; printed means use other cells in some sources."
    )
    return Table("table-2-simplerenv", "SimplerEnv by cell (layout of Table 2)", caption, columns, tuple(rows))


def _cell_label(cell: str) -> str:
    name, _, kind = cell.rpartition("_") if cell.startswith("gr_") else (cell, "", "")
    return f"{name[:2].upper()} {_CELL_NAMES[name]}" + (f" {kind.upper()}" if kind else "")


def _by_label(found: Gathered) -> dict[str, list[PolicyResult]]:
    """A policy's results over all suites."""
    policies = [p for p in found.policies if not p.control]
    return {label: [p for p in policies if p.label == label] for label in dict.fromkeys(p.label for p in policies)}


def _cell(results: Sequence[PolicyResult], cell: str) -> Number | None:
    """Over all episodes of the cell's tasks, without the variants that only test robustness."""
    found = [
        e
        for p in results
        for e in p.episodes
        if cell_of(p.suite, e.row["task"]) == cell
        and e.row["variant"] not in p.evaluation.summary.get("robustness_variants", ())
    ]
    if not found:
        return None
    return interval(statistics.wilson(sum(e.row["success"] for e in found), len(found)).to_dict())


def _mean(cells: Mapping[str, Number | None], names: Sequence[str]) -> Number | None:
    values = [found.value for name in names if (found := cells[name]) is not None]
    return Number(float(np.mean(values))) if len(values) == len(names) else None


# --- Tables 4 and 5: VLA Score ----------------------------------------------------------------------------------------


def vla_score(found: Gathered, suite: str, palette: Palette, kind: str) -> Table:
    """Table 4 (kind "specialist": A, I, Sim, Score) or Table 5 ("reasoning": R, A, I, RA, Sim, Score)."""
    parts = PARTS if kind == "reasoning" else ("A", "I")
    ours = [
        Row(
            {
                "policy": p.label,
                "judge": p.evaluation.judge,
                **{part: part_mean(p.judged, part) for part in parts},
                "sim": success_rate([e for e in p.episodes if e.judged]),
                "score": score_mean(p.judged),
            },
            mark=palette[p.label],
        )
        for p in found.on(suite)
        if p.judged and (p.summary["kind"] == "reasoning") == (kind == "reasoning")
    ]
    theirs = [
        Row(
            {
                "policy": r["model"],
                "judge": "GPT-4o",
                **{part: number(r[part]) for part in (*parts, "sim", "score")},
            },
            origin="published",
        )
        for r in published()["vla_score"]
        if (r["R"] is not None) == (kind == "reasoning")
    ]
    columns = (
        Column("policy", "policy", "text"),
        Column("judge", "judge", "text"),
        *(c for c in part_columns() if c.key in parts),
        Column("sim", "Sim", help="success in simulation, percent of the judged trajectories; published: its mean"),
        Column("score", "VLA Score", help=SCORE_HELP),
    )
    table = 4 if kind == "specialist" else 5
    return Table(
        f"table-{table}-vla-score",
        f"VLA Score, {'policies without reasoning' if table == 4 else 'reasoning policies'} (layout of Table {table})",
        f"Ours on suite {suite}; published on SimplerEnv with GPT-4o as judge: another judge and other tasks. Scores "
        "are means of per-trajectory products, so they cannot be recomputed from the means of the parts.",
        columns,
        tuple(ours + theirs),
    )


# --- Tables 6 to 8: ablations -----------------------------------------------------------------------------------------


def ablations(found: Gathered, palette: Palette) -> list[Table]:
    """Our runs beside the paper's, setting by setting; columns beyond the paper's hold what ours were measured on."""
    settings = {
        label: setting
        for label, results in _by_label(found).items()
        if (setting := setting_of(results[0].source_digest, found.checkpoints, found.pruned))
    }
    suites = [s for s in found.suites if s not in SUITES]
    answers = {a.name: a for a in found.answers}
    columns = (
        Column("setting", "setting", "text"),
        Column("policy", "policy", "text"),
        Column("GR", "GR", help="Google Robot: mean of the six cells of Table 2"),
        Column("WR", "WR", help="WidowX: mean of spoon, carrot, stack"),
        Column("MM", "MM", help="mean of the multimodal benchmarks: the paper's eight, ours those that were asked"),
        Column("Average", "Average", help="mean of GR, WR and MM"),
        *(Column(f"suite_{s}", s, help="mean of the tasks of this suite; not in the paper") for s in suites),
        *([Column("questions", "questions", help="held-out questions; not in the paper")] if answers else []),
    )
    tables = []
    for what, names in _ABLATIONS.items():
        rows = []
        for setting, name in names.items():
            for label, of in settings.items():
                if of == setting:
                    cells = _ours(_by_label(found)[label], suites)
                    cells |= _answered(answers[label]) if label in answers else {}
                    rows.append(Row({"setting": name, "policy": label, **cells}, mark=palette[label]))
            if setting not in settings.values():
                rows.append(Row({"setting": name, "policy": "ours: not run"}))
            values = dict(zip(_GROUPS, published()["ablations_gr_wr_mm_mean"][setting], strict=True))
            paper = {group: number(value) for group, value in values.items()}
            rows.append(Row({"setting": name, "policy": "paper", **paper}, origin="published"))
        tables.append(
            Table(
                f"ablation-{what}",
                f"Ablation: {what} (layout of Tables 6 to 8)",
                "Percent. An absent cell was not run. Which run is which setting is read from how its checkpoint and "
                "its data were made.",
                columns,
                tuple(rows),
            )
        )
    return tables


def _ours(results: Sequence[PolicyResult], suites: Sequence[str]) -> dict[str, Number | str | None]:
    nine = published()["nine_cell_definition"]
    cells = {cell: _cell(results, cell) for cell in nine}
    groups = {
        "GR": _mean(cells, [c for c in nine if c.startswith("gr_")]),
        "WR": _mean(cells, [c for c in nine if c.startswith("wx_")]),
    }
    on = {p.suite: p for p in results}
    means = {s: on[s].summary["means"]["mean of tasks"] for s in suites if s in on}
    return {
        **groups,
        **{
            f"suite_{s}": Number(100 * m["value"], 100 * m["low"], 100 * m["high"], m["trials"])
            for s, m in means.items()
        },
    }


def _answered(answers: Answers) -> dict[str, Number | str | None]:
    """MM where several benchmarks were asked; the questions of one data set are none."""
    overall = interval(answers.overall)
    if len(answers.benchmarks) == 1 or overall is None:
        return {"questions": overall}
    return {"MM": dataclasses.replace(overall, note=f"of {', '.join(answers.benchmarks)}")}


def setting_of(digest: str | None, checkpoints: Sequence[Checkpoint], pruned: Sequence[Pruned]) -> str | None:
    """The ablation a checkpoint is, or None if it is none of the paper's or cannot be told.

    digest: of the checkpoint's manifest. A reasoning VLA is the "base" that post-training starts from.
    """
    checkpoint = next((c for c in checkpoints if c.digest == digest), None)
    if checkpoint is None:
        return None
    config, inputs = checkpoint.about["config"], checkpoint.about["inputs"]
    if config["stage"] == "reasoning":
        return "base"
    data = next((p for p in pruned if p.digest == inputs["data"]), None)
    if config["stage"] != "dual" or data is None:
        return None
    distilled = config["train"]["losses"]["kd"] > 0
    if not distilled:
        return {"both": "no_distillation", "none": "base_finetuned"}.get(data.mode)
    if "action_teacher" not in inputs:
        return "no_action_teacher" if data.mode == "both" else None
    return _BY_MODE.get(data.mode)
