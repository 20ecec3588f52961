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
        help="evaluation, checkpoint, data set or judge check folders, or a run folder that holds them",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where the site is written; open its index.html")
    parser.add_argument(
        "--track",
        action="append",
        default=[],
        metavar="WHERE",
        help="send the same figures to tensorboard:FOLDER, wandb:PROJECT or mlflow:URI; may be repeated",
    )


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla_eval.report.site import write_report

    return {"ok": True, **write_report(arguments.folders, arguments.out, track=arguments.track)}


def _render(result: Mapping[str, Any]) -> str:
    tracked = [f"{len(runs)} runs sent to {where}" for where, runs in result["tracked"].items()]
    return "\n".join([result["index"] + (" (unchanged)" if result["skipped"] else ""), *tracked])


COMMAND = Command("a static HTML site with tables, plots and every rollout", _configure, _run, _render)
