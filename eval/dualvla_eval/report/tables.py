"""The one form in which every figure of the report stands: a table of numbers with their intervals.

The page, the CSV, JSON and LaTeX files and the trackers are all made from it, so they cannot disagree. Knows no
policy and no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

DASH = "–"  # what is absent: nobody has measured it


@dataclass(frozen=True)
class Number:
    """A figure in the unit of its column. [low, high]: its 95 % interval; n: how many trials it rests on.

    note: what a reader must know about this one figure. digits: shown after the point, in place of the column's.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    note: str = ""
    digits: int | None = None


Cell = Number | str | None


@dataclass(frozen=True)
class Column:
    """key: in exports. digits: shown after the point. help: one sentence about what it measures."""

    key: str
    label: str
    kind: Literal["number", "text"] = "number"
    digits: int = 1
    help: str = ""


@dataclass(frozen=True)
class Row:
    """cells: column key -> cell; one that is missing is absent. origin: "ours", or "published" in the paper.

    link: where the row's name leads to. mark: index of the policy's colour.
    """

    cells: Mapping[str, Cell]
    origin: Literal["ours", "published"] = "ours"
    link: str | None = None
    mark: int | None = None

    @property
    def measured(self) -> bool:
        """Whether it holds any figure."""
        return any(isinstance(cell, Number) for cell in self.cells.values())


@dataclass(frozen=True)
class Table:
    """name: of its files, [a-z0-9-]. title says what it is, caption how to read it. The first column names the row."""

    name: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    links: Mapping[str, str] = field(default_factory=dict)  # column key -> where its heading leads to

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def mixed(self) -> bool:
        """Whether published rows stand beside ours."""
        return {row.origin for row in self.rows} == {"ours", "published"}


def interval(found: Mapping[str, Any] | None, scale: float = 100.0) -> Number | None:
    """A rate of summary.json ({n, rate, low, high} in [0, 1]) in percent."""
    if found is None:
        return None
    return Number(scale * found["rate"], scale * found["low"], scale * found["high"], found["n"])


def number(value: float | None, n: int | None = None) -> Number | None:
    return None if value is None else Number(float(value), n=n)


def text(cell: Cell, digits: int = 1) -> str:
    """The figure alone, as it is shown."""
    if cell is None:
        return DASH
    if isinstance(cell, str):
        return cell
    return figure(cell.value, digits if cell.digits is None else cell.digits)


def figure(value: float, digits: int) -> str:
    """`value` with `digits` after the point; what is not 0 is never shown as 0."""
    smallest = 10.0**-digits
    if 0 < abs(value) < smallest / 2:
        return f"<{smallest:.{digits}f}" if value > 0 else f">\N{MINUS SIGN}{smallest:.{digits}f}"
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def span(cell: Number, digits: int = 1) -> str:
    """Its interval, as it is shown; empty if it has none."""
    if cell.low is None or cell.high is None:
        return ""
    joint = "–" if cell.low >= 0 else " to "
    return figure(cell.low, digits) + joint + figure(cell.high, digits)


def scalars(table: Table) -> Iterator[tuple[str, str, float]]:
    """(row, column, value) of every number of our own rows."""
    names: Sequence[Column] = table.columns[1:]
    for row in table.rows:
        if row.origin == "ours":
            for column in names:
                cell = row.cells.get(column.key)
                if isinstance(cell, Number):
                    yield str(row.cells[table.columns[0].key]), column.key, cell.value
