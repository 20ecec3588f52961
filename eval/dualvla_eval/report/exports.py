"""A table as CSV, JSON and LaTeX. Pure functions from a `Table` to text; every format holds what the page shows.

Texts may come from policies and judges: a spreadsheet must not take one for a formula, nor LaTeX for a command.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from typing import Any

from dualvla_eval.report.tables import Cell, Column, Number, Table, text

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_PARTS = ("low", "high", "n")
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "×": r"$\times$", "−": r"$-$", "λ": r"$\lambda$",
    "<": r"$<$", ">": r"$>$", "Δ": r"$\Delta$",
}  # fmt: skip


def to_csv(table: Table) -> str:
    """One line a row; a number with an interval or a count has columns KEY_low, KEY_high, KEY_n beside it."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    extras = {c.key: [p for p in _PARTS if any(_part(r.cells.get(c.key), p) is not None for r in table.rows)]
              for c in table.columns}  # fmt: skip
    writer.writerow(["origin", *(k for c in table.columns for k in (c.key, *(f"{c.key}_{p}" for p in extras[c.key])))])
    for row in table.rows:
        line: list[Any] = [row.origin]
        for column in table.columns:
            cell = row.cells.get(column.key)
            line.append(_harmless(cell) if isinstance(cell, str) else _part(cell, "value"))
            line += [_part(cell, part) for part in extras[column.key]]
        writer.writerow(line)
    return sink.getvalue()


def _part(cell: Cell, name: str) -> Any:
    return getattr(cell, name) if isinstance(cell, Number) else None


def _harmless(word: str) -> str:
    return f"'{word}" if word.startswith(_FORMULA) else word


def to_json(table: Table) -> str:
    """{name, title, caption, columns, rows}: a number is {value, low, high, n}, what is absent is null."""
    columns = [{"key": c.key, "label": c.label, "help": c.help} for c in table.columns]
    rows = [
        {"origin": row.origin, **{c.key: _plain(row.cells.get(c.key)) for c in table.columns}} for row in table.rows
    ]
    about = {"name": table.name, "title": table.title, "caption": table.caption}
    return json.dumps({**about, "columns": columns, "rows": rows}, indent=1) + "\n"


def _plain(cell: Cell) -> Any:
    if not isinstance(cell, Number):
        return cell
    given = {"value": cell.value, "low": cell.low, "high": cell.high, "n": cell.n, "note": cell.note or None}
    return {name: value for name, value in given.items() if value is not None}


def to_latex(table: Table) -> str:
    """A booktabs table; intervals stand as subscripts. Published rows come after ours, under a rule."""
    lines = [
        "% \\usepackage{booktabs}",
        r"\begin{table}",
        rf"\caption{{{_escape(table.title)}. {_escape(table.caption)}}}",
        rf"\label{{tab:{table.name}}}",
        r"\begin{tabular}{" + "".join("r" if c.kind == "number" else "l" for c in table.columns) + "}",
        r"\toprule",
        " & ".join(_escape(c.label) for c in table.columns) + r" \\",
        r"\midrule",
    ]
    ours, published = ([r for r in table.rows if r.origin == origin] for origin in ("ours", "published"))
    for i, group in enumerate(g for g in (ours, published) if g):
        lines += [r"\midrule"] * (i > 0)
        lines += [" & ".join(_latex_cell(r.cells.get(c.key), c) for c in table.columns) + r" \\" for r in group]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _latex_cell(cell: Cell, column: Column) -> str:
    shown = _escape(text(cell, column.digits))
    if not isinstance(cell, Number) or cell.low is None or cell.high is None:
        return shown
    low, high = (_escape(text(Number(end), column.digits)) for end in (cell.low, cell.high))
    return rf"{shown} {{\scriptsize [{low}, {high}]}}"


def _escape(words: str) -> str:
    return "".join(_LATEX.get(c, c) for c in words)


FORMATS: dict[str, Callable[[Table], str]] = {"csv": to_csv, "json": to_json, "tex": to_latex}
