"""The published figures, and what a cell of SimplerEnv's table is: which tasks of which suite it is taken over.

Knows names and numbers only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

# Suite -> how its cells of the paper's Table 2 are called, but for the word that the names of their tasks have in them.
_SUITES = {"simpler-google-vm": "gr_{}_vm", "simpler-google-va": "gr_{}_va", "simpler-widowx": "wx_{}"}
# The apple goes into a drawer, so its word comes first.
_WORDS = ("apple", "coke", "near", "drawer", "spoon", "carrot", "stack", "eggplant")
SUITES = tuple(_SUITES)


@cache
def published() -> Mapping[str, Any]:
    """The figures as printed in the cited papers, with their sources."""
    return json.loads(resources.files("dualvla_eval.report").joinpath("published_results.json").read_text("utf-8"))


def cell_of(suite: str, task: str) -> str | None:
    """The cell that a task's episodes count in; open and close drawer are one.

    >>> cell_of("simpler-google-vm", "google_robot_place_apple_in_closed_top_drawer")
    'gr_apple_vm'
    """
    word = next((word for word in _WORDS if word in task), None)
    return _SUITES[suite].format(word) if word and suite in _SUITES else None


def beside(suite: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Our success by cell beside the published rows, in percent, of the cells that this suite has; None without any.

    rows: of episodes.parquet. A row of either kind that has none of the cells is left out. `mean`: over the suite's
    cells of the nine of Table 2, recomputed, where a row has them all.
    """
    if suite not in _SUITES:
        return None
    before, after = _SUITES[suite].split("{}")
    cells = [cell for cell in published()["cells"] if cell.startswith(before) and cell.endswith(after)]
    nine = [cell for cell in cells if cell in published()["nine_cell_definition"]]
    ours = {}
    for policy in dict.fromkeys(row["policy"] for row in rows):
        own = [row for row in rows if row["policy"] == policy]
        found = {cell: [row["success"] for row in own if cell_of(suite, row["task"]) == cell] for cell in cells}
        ours[policy] = {cell: 100 * float(np.mean(of)) for cell, of in found.items() if of}
    theirs = []
    for row in published()["simplerenv"]:
        values = dict(zip(published()["cells"], row["values"], strict=True))
        own_cells = {cell: values[cell] for cell in cells if values[cell] is not None}
        if own_cells:
            theirs.append({"model": row["model"], "source": row["source"], "values": own_cells})
    for values in [*ours.values(), *(row["values"] for row in theirs)]:
        if nine and values.keys() >= set(nine):
            values["mean"] = float(np.mean([values[cell] for cell in nine]))
    return {"cells": [*cells, "mean"], "mean_of": nine, "ours": ours, "published": theirs}
