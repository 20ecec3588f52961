"""The command `dualvla run`."""

from __future__ import annotations

import argparse
from typing import Any

from dualvla.cli import Command


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", required=True, help="tiny (20 minutes on 2 cores), tiny-long (an hour) or debug")
    parser.add_argument("--out", required=True, help="run folder; the same command again resumes it")
    parser.add_argument("--seed", type=int, default=0, help="of data, training and policies")
    parser.add_argument("--workers", type=int, help="processes of collect and eval (default: one a core)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe, as in specialist.steps=100"
    )


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla_pipelines.run import run

    return run(
        arguments.recipe, arguments.out, assignments=arguments.set, seed=arguments.seed, workers=arguments.workers
    )


def _render(result: Any) -> str:
    from dualvla_pipelines.run import render

    return render(result)


COMMAND = Command("the whole pipeline: data, three training stages, evaluation, report", _configure, _run, _render)
