"""`dualvla ingest --format F SRC OUT`: other people's robot data as a data set folder, converted and checked."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from dualvla.cli import Command


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="LeRobot folder (v2.1, v3), or folder of TFRecord files")
    parser.add_argument("out", metavar="OUT", help="data set folder to write")
    parser.add_argument("--format", required=True, choices=("lerobot", "rlds"))
    parser.add_argument("--annotations", default=None, help="VLA-IT JSON, joined to steps by its key")
    parser.add_argument(
        "--annotation-steps",
        choices=("source", "kept"),
        default="source",
        help="what the steps of the annotations count: those of the source, or those its convention keeps",
    )
    parser.add_argument(
        "--convention",
        default="auto",
        help="how the source writes poses, grippers and actions: dualvla, bridge, fractal, or a JSON file; "
        "auto: recognised by its columns, refused if unknown",
    )
    parser.add_argument(
        "--set", dest="assignments", metavar="key=value", action="append", default=[],
        help="change one setting of the convention, as in --set angle_unit=deg (repeatable)",
    )  # fmt: skip
    parser.add_argument(
        "--frames",
        choices=("jpeg", "png"),
        default="jpeg",
        help="how video frames are stored (images that are encoded already are never touched)",
    )
    parser.add_argument("--jpeg-quality", type=int, default=95, help="of --frames jpeg, 1 to 100")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a CPU)")
    parser.add_argument("--strict", action="store_true", help="stop at the first unfit row instead of quarantining it")


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla_pipelines.ingest import IngestConfig, ingest

    config = IngestConfig(
        format=arguments.format,
        convention=arguments.convention,
        overrides=tuple(arguments.assignments),
        frames=arguments.frames,
        jpeg_quality=arguments.jpeg_quality,
        annotation_steps=arguments.annotation_steps,
        strict=arguments.strict,
    )
    return ingest(arguments.source, arguments.out, config, arguments.annotations, arguments.workers)


def _render(result: Mapping[str, Any]) -> str:
    lines = [
        f"Ingested {result['episodes']} episodes into {result['out']}"
        + (" (finished before: nothing to do)" if result["skipped"] else ""),
        f"{result['rows_in']} rows in = {result['rows_out']} out + {result['rows_quarantined']} quarantined",
    ]
    lines += [f"  {count} x {reason}" for reason, count in result["quarantine_reasons"].items()]
    lines += [f"  damaged: {file}: {reason}" for file, reason in result["damaged_files"].items()]
    if result["columns_left_out"]:
        lines.append(f"columns without a place here: {', '.join(result['columns_left_out'])}")
    if result["annotations"]:
        counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in result["annotations"].items())
        lines.append(f"annotation keys: {counts} (listed in {result['out']}/annotations.json)")
    return "\n".join(lines)


COMMAND = Command("read LeRobot or RLDS data, with annotations, into a data set folder", _configure, _run, _render)
