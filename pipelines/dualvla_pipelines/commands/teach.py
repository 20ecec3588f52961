"""The command `dualvla teach`."""

from __future__ import annotations

import argparse
import os
from typing import Any

from dualvla.cli import Command
from dualvla.errors import UsageError
from dualvla_cluster.resources import add_profile, apply_profile


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="data set folder; its training rows are asked about")
    parser.add_argument("out", metavar="OUT", help="cache folder to make; goes on with what is there")
    parser.add_argument("--action-teacher", metavar="C", help="the specialist's checkpoint (Eq. 5)")
    parser.add_argument("--reasoning-teacher", metavar="C", help="the checkpoint that stage dual starts from (Eq. 6)")
    parser.add_argument("--top-k", type=int, default=50, help="likeliest tokens kept at every position of an answer")
    parser.add_argument("--temperature", type=float, default=2.0, help="that training will soften by")
    parser.add_argument("--views", type=int, default=4, help="(colour jitter, tau, noise) a sample: training takes one")
    parser.add_argument("--packed", action="store_true", help="fewer bytes a token, a little less exact")
    parser.add_argument("--seed", type=int, default=0, help="of the views")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; changes no result")
    add_profile(parser)


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    apply_profile(arguments, "teach")
    if arguments.workers < 1:
        raise UsageError(f"--workers {arguments.workers} is not a number of workers.", "pass 1 or more")
    from dualvla.distill.cache import CacheSettings
    from dualvla_pipelines.teach import teach

    return teach(
        arguments.data,
        arguments.out,
        action_teacher=arguments.action_teacher,
        reasoning_teacher=arguments.reasoning_teacher,
        settings=CacheSettings(
            arguments.top_k, arguments.temperature, arguments.views, arguments.seed, arguments.packed
        ),
        workers=arguments.workers,
    )


def _render(result: Any) -> str:
    from dualvla_pipelines.teach import render

    return render(result)


COMMAND = Command("ask the teachers once about every training sample, into a cache", _configure, _run, _render)
