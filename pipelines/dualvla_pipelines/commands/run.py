"""The command `dualvla run`."""

from __future__ import annotations

import argparse
from typing import Any

from dualvla.cli import Command
from dualvla_cluster.resources import add_profile


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", required=True, help="tiny (20 minutes on 2 cores), tiny-long (an hour) or debug")
    parser.add_argument("--out", required=True, help="run folder; the same command again resumes it")
    parser.add_argument("--seed", type=int, default=0, help="of data, training and policies")
    parser.add_argument("--workers", type=int, help="processes of collect and eval (default: one a core)")
    add_profile(parser)
    parser.add_argument("--dry-run", action="store_true", help="print workers, machines, time and cost; start nothing")
    parser.add_argument(
        "--track",
        action="append",
        default=[],
        metavar="SETTING",
        help="of every training step, as `train --track`; may be repeated",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe, as in specialist.steps=100"
    )


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla_pipelines.run import dry_run, run

    if arguments.dry_run:
        return dry_run(arguments.recipe, arguments.set, arguments.profile or "laptop")
    return run(
        arguments.recipe,
        arguments.out,
        assignments=arguments.set,
        seed=arguments.seed,
        workers=arguments.workers,
        profile=arguments.profile,
        track=arguments.track,
    )


def _render(result: Any) -> str:
    from dualvla_pipelines import estimate, run

    return estimate.render(result) if result.get("dry_run") else run.render(result)


COMMAND = Command("the whole pipeline: data, three training stages, evaluation, report", _configure, _run, _render)
