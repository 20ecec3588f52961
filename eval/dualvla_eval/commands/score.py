"""`dualvla score`: VLA Score of an evaluation. Knows the command line only."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from dualvla.cli import Command


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="EVAL_DIR", help="a finished evaluation folder; scores are written into it")
    parser.add_argument("--judge", default="rubric", help="who judges: rubric (deterministic, free)")


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla_eval.judges import get_judge
    from dualvla_eval.score import score_folder

    return {"ok": True, "out": arguments.folder, **score_folder(arguments.folder, get_judge(arguments.judge))}


def _render(result: Mapping[str, Any]) -> str:
    from dualvla.console import table

    rows = [
        [
            name,
            str(p["n"]),
            *[_figure(p[part]) for part in ("R", "A", "I", "RA", "success")],
            f"{_figure(p['score'])} ({_figure(p['low'])} .. {_figure(p['high'])})",
            str(p["unjudged"]),
        ]
        for name, p in result["policies"].items()
    ]
    header = ["policy", "n", "R", "A", "I", "RA", "success", "VLA Score (95 %)", "unjudged"]
    title = f"VLA Score, judge {result['judge']}"
    return f"{table(title, header, rows)}\n{result['out']}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


COMMAND = Command("VLA Score of an evaluation: reasoning, action, intention, alignment", _configure, _run, _render)
