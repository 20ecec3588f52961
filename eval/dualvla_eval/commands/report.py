"""`dualvla report`: one static HTML site from the folders of a run. Knows the command line only."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from dualvla.cli import Command


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="DIR",
        help="evaluation, checkpoint or data set folders, or a run folder that holds them",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where the site is written; open its index.html")


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla_eval.report.site import write_report

    return {"ok": True, **write_report(arguments.folders, arguments.out)}


def _render(result: Mapping[str, Any]) -> str:
    return result["index"] + (" (unchanged)" if result["skipped"] else "")


COMMAND = Command("one static HTML page with tables, plots and films", _configure, _run, _render)
