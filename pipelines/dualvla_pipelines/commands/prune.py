"""`dualvla prune`: the command line of pruning; the work is `dualvla_pipelines.prune`."""

import argparse
from collections.abc import Mapping
from typing import Any

from dualvla.cli import Command


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="data set folder")
    parser.add_argument("out", metavar="OUT", help="data set folder to write")
    parser.add_argument(
        "--mode",
        default="both",
        help="where reasoning stays: both (labels), scene, action, random (as many as both), none (no pruning)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --mode random")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a CPU)")
    parser.add_argument("--strict", action="store_true", help="stop at the first unfit row instead of quarantining it")


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla_pipelines.prune import PruneConfig, prune

    config = PruneConfig(mode=arguments.mode, seed=arguments.seed, strict=arguments.strict)
    return prune(arguments.source, arguments.out, config, arguments.workers)


def _render(result: Mapping[str, Any]) -> str:
    from dualvla.console import table

    rows = [
        [
            task,
            f"{counts['episodes']}",
            f"{counts['frames']}",
            f"{counts['kept_frames'] / counts['frames']:.1%}",
            f"{counts['episodes_without_reasoning']}",
            f"{counts['words_before']}",
            f"{counts['words_after']}",
        ]
        for task, counts in result["tasks"].items()
    ]
    header = ("task", "episodes", "frames", "kept", "episodes without", "reasoning words", "after pruning")
    lines = [table(f"Pruned ({result['mode']}) into {result['out']}", header, rows)]
    lines.append(
        f"{result['rows_in']} rows in = {result['rows_out']} out + {result['rows_quarantined']} quarantined"
        + (" (finished before: nothing to do)" if result["skipped"] else "")
    )
    lines += [f"  {count} x {reason}" for reason, count in result["quarantine_reasons"].items()]
    return "\n".join(lines)


COMMAND = Command("remove reasoning where neither scene nor action changes", _configure, _run, _render)
