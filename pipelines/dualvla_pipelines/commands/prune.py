"""`dualvla prune`: the command line of pruning; the work is `dualvla_pipelines.prune`."""

import argparse
from collections.abc import Mapping
from typing import Any

from dualvla.cli import Command
from dualvla_cluster.resources import add_profile, apply_profile


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="data set folder")
    parser.add_argument("out", metavar="OUT", help="data set folder to write")
    parser.add_argument(
        "--mode",
        default="both",
        help="where reasoning stays: both (labels), scene, action, random (as many as both), none (no pruning)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --mode random")
    parser.add_argument(
        "--detector",
        metavar="FOLDER",
        help="learned scene label (default: one that needs no training)",
    )
    parser.add_argument("--camera", help="whose images the scene label sees (default: each step's first)")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a CPU)")
    add_profile(parser)
    parser.add_argument(
        "--worker-gpus",
        type=float,
        default=None,
        help="share of a GPU for each worker, with --detector (default: the cluster's, divided evenly; 0: CPUs only)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first unfit row or file instead of putting it aside"
    )
    parser.add_argument("--timelines", type=int, default=6, help="example episodes to draw into OUT/report")
    parser.add_argument(
        "--tokenizer",
        metavar="CHECKPOINT",
        help="also estimate this policy's reasoning tokens (or tokenizer.json)",
    )


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla_pipelines.prune import PruneConfig, prune
    from dualvla_pipelines.prune_report import ReportConfig
    from dualvla_pipelines.ray_parts import Workers

    apply_profile(arguments, "prune")
    config = PruneConfig(mode=arguments.mode, seed=arguments.seed, strict=arguments.strict, camera=arguments.camera)
    return prune(
        arguments.source,
        arguments.out,
        config,
        detector=arguments.detector,
        workers=Workers(arguments.workers, arguments.worker_gpus),
        report=ReportConfig(timelines=arguments.timelines, tokenizer=arguments.tokenizer),
    )


def _render(result: Mapping[str, Any]) -> str:
    from dualvla.console import table

    rows = [
        [
            task,
            f"{counts['episodes']}",
            f"{counts['frames']}",
            f"{counts['kept_frames'] / counts['frames']:.1%}",
            f"{counts['episodes_without_reasoning']}",
            f"{counts['tokens_before']}",
            f"{counts['tokens_after']}",
        ]
        for task, counts in result["tasks"].items()
    ]
    header = ("task", "episodes", "frames", "kept", "episodes without", "reasoning tokens", "after pruning")
    lines = [table(f"Pruned ({result['mode']}) into {result['out']}", header, rows)]
    lines.append(
        f"{result['rows_in']} rows in = {result['rows_out']} out + {result['rows_quarantined']} quarantined"
        + (" (finished before: nothing to do)" if result["skipped"] else "")
    )
    lines += [f"  {count} x {reason}" for reason, count in result["quarantine_reasons"].items()]
    if result["files_lost"]:
        lines.append(f"{result['rows_lost']} rows lost in {len(result['files_lost'])} files that cannot be read:")
    lines += [f"  {name}: {why}" for name, why in result["files_lost"].items()]
    lines.append(f"report: {result['report']}")
    return "\n".join(lines)


COMMAND = Command("remove reasoning where neither scene nor action changes", _configure, _run, _render)
