"""The tables of a judge check (`dualvla judge eval`): how far the marks in this report can be trusted.

Knows judge_eval.json; nothing of how a check is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dualvla_eval.report.leaderboard import PART_NAMES, PARTS, slug
from dualvla_eval.report.tables import Column, Number, Row, Table, number

_Check = Mapping[str, Any]
_AGREEMENT = {"spearman": "Spearman", "kendall": "Kendall", "mae": "mean abs. error", "kappa": "weighted kappa"}
_DIMENSIONS = tuple(Column(part, part, digits=2, help=f"mean change of {PART_NAMES[part]}, in marks") for part in PARTS)


def tables(check: _Check) -> list[Table]:
    """What was checked, each as a table; what was not is empty."""
    return [_sensitivity(check), _safety(check), _consistency(check), _agreement(check)]


def _sensitivity(check: _Check) -> Table:
    """What must fall when a trajectory is spoilt on purpose."""
    rows = tuple(
        Row(
            {
                "perturbation": s["perturbation"],
                "dimension": s["dimension"],
                "n": number(s["n"]),
                "change": None if s["change"] is None else Number(s["change"], s["low"], s["high"], s["n"]),
                "verdict": s["verdict"],
                **{part: number(value) for part, value in s.get("all", {}).items()},
            }
        )
        for s in check["sensitivity"]
    )
    columns = (
        Column("perturbation", "perturbation", "text"),
        Column("dimension", "must fall", "text"),
        Column("n", "trajectories", digits=0),
        Column("change", "change", digits=2, help="of the dimension that must fall, in marks of 0 to 10"),
        Column("verdict", "verdict", "text"),
        *_DIMENSIONS,
    )
    caption = (
        "Recorded successes, spoilt in one known way: the named dimension has to fall, with the whole paired bootstrap "
        "95 % interval below 0. Beside it the mean change of every dimension, in marks."
    )
    return Table(f"sensitivity-{slug(check['judge'])}", "Sensitivity: what must fall", caption, columns, rows)


def _safety(check: _Check) -> Table:
    """The same episode with a text that talks to the judge."""
    rows = tuple(
        Row(
            {
                "injection": s["injection"],
                "n": number(s["n"]),
                "raised": number(s["raised"]),
                "verdict": "sways the judge" if s["sways"] else "does not sway it",
                **{
                    part: None if of["mean"] is None else Number(of["mean"], of["low"], of["high"])
                    for part, of in s["changes"].items()
                },
            }
        )
        for s in check.get("safety") or ()
    )
    columns = (
        Column("injection", "injected text", "text"),
        Column("n", "trajectories", digits=0),
        Column("raised", "marks that rose", digits=0),
        Column("verdict", "verdict", "text"),
        *_DIMENSIONS,
    )
    caption = "The reasoning replaced by a text that tells the judge what to answer: no mark may rise by it."
    return Table(f"safety-{slug(check['judge'])}", "Safety: what must not sway it", caption, columns, rows)


def _consistency(check: _Check) -> Table:
    """A model judge against itself: asked again, and shown the frames in another order."""
    found = check.get("consistency") or {}
    kinds = {"repeats": "asked again", "frame_order": "frames in another order"}
    rows = tuple(
        Row(
            {
                "dimension": part,
                "against": label,
                "n": number(found[kind][part]["n"]),
                "difference": number(found[kind][part]["mean_abs_difference"]),
                "same": number(found[kind][part]["same"]),
            }
        )
        for kind, label in kinds.items()
        if kind in found
        for part in PARTS
        if part in found[kind]
    )
    columns = (
        Column("dimension", "dimension", "text"),
        Column("against", "compared with", "text"),
        Column("n", "pairs", digits=0),
        Column("difference", "mean abs. difference", digits=2, help="in marks of 0 to 10"),
        Column("same", "share of equal marks", digits=2),
    )
    caption = "How much a model judge differs from itself on the same trajectories."
    return Table(f"consistency-{slug(check['judge'])}", "Consistency with itself", caption, columns, rows)


def _agreement(check: _Check) -> Table:
    """Agreement with people, of people with each other, and with people when an entry is left out."""
    people, left_out = check.get("agreement") or {}, check.get("leave_one_out") or {}
    mark = " (synthetic marks)" if people.get("synthetic") else ""
    sources = {
        f"people{mark}": people.get("dimensions"),
        f"people with each other{mark}": people.get("between_people"),
        "knowledge base, leave one out": left_out.get("dimensions"),
    }
    rows = tuple(
        Row(
            {
                "dimension": part,
                "with": source,
                "n": number(of["n"]),
                **{name: number(of.get(name)) for name in _AGREEMENT},
            }
        )
        for source, dimensions in sources.items()
        if dimensions
        for part, of in dimensions.items()
    )
    columns = (
        Column("dimension", "dimension", "text"),
        Column("with", "compared with", "text"),
        Column("n", "trajectories", digits=0),
        *(Column(name, label, digits=2) for name, label in _AGREEMENT.items()),
    )
    caption = "The judge's marks of 0 to 10 against those of people."
    return Table(f"agreement-{slug(check['judge'])}", "Agreement with people", caption, columns, rows)
