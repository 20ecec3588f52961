"""`dualvla export --format lerobot SRC OUT`: a data set folder as a LeRobotDataset v3."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from dualvla.cli import Command


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="data set folder, pruned or not")
    parser.add_argument("out", metavar="OUT", help="LeRobotDataset v3 folder to write")
    parser.add_argument("--format", required=True, choices=("lerobot",))
    parser.add_argument(
        "--images",
        choices=("video", "embedded"),
        default="video",
        help="cameras as H.264 video, or as the encoded images they are, inside the parquet files (lossless, larger)",
    )
    parser.add_argument("--crf", type=int, default=18, help="of --images video: 0 (lossless) to 51 (smallest)")
    parser.add_argument("--robot-type", default="unknown", help="for meta/info.json")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a CPU)")


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla_pipelines.export import ExportConfig, export

    config = ExportConfig(images=arguments.images, crf=arguments.crf, robot_type=arguments.robot_type)
    return export(arguments.source, arguments.out, config, arguments.workers)


def _render(result: Mapping[str, Any]) -> str:
    done = " (finished before: nothing to do)" if result["skipped"] else ""
    lines = [
        f"Exported {result['episodes']} episodes, {result['rows_out']} frames into {result['out']}{done}",
        f"{result['rows_in']} rows in = {result['rows_out']} out + {result['rows_left_out']} left out (multimodal)",
    ]
    if result["timestamps_made_uniform"]:
        lines.append(f"{result['timestamps_made_uniform']} timestamps moved to the frame grid that LeRobot requires")
    return "\n".join(lines)


COMMAND = Command("write a data set folder as a LeRobotDataset v3", _configure, _run, _render)
