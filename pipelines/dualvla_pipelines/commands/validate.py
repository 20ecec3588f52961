"""`dualvla validate DATA`: what is wrong with a data set, and where."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from dualvla.cli import Command


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="data set folder")
    parser.add_argument("--no-images", action="store_true", help="do not decode images (much faster)")
    parser.add_argument("--findings", type=int, default=20, help="how many findings to list of each check")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a CPU)")


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla_pipelines.validate import validate

    return validate(arguments.data, not arguments.no_images, arguments.findings, arguments.workers)


def _render(result: Mapping[str, Any]) -> str:
    verdict = "fit" if result["ok"] else "NOT fit"
    lines = [
        f"{result['data']} is {verdict}: {result['rows']} rows, {result['episodes']} episodes, "
        f"{result['errors']} errors, {result['warnings']} warnings"
    ]
    for check, count in result["counts"].items():
        lines.append(f"{check}: {count}")
        for finding in (f for f in result["findings"] if f["check"] == check):
            place = [finding["file"]]
            if finding["episode_id"] is not None:
                place.append(f"episode '{finding['episode_id']}'")
            if finding["step"] is not None:
                place.append(f"step {finding['step']}")
            lines.append(f"  {finding['severity']}: {', '.join(place)}: {finding['message']}")
    return "\n".join(lines)


COMMAND = Command("check a data set and say what is wrong where", _configure, _run, _render)
