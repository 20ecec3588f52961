"""The command `dualvla plan`."""

from __future__ import annotations

import argparse
from typing import Any

from dualvla.cli import Command
from dualvla.errors import UsageError, did_you_mean

_STAGES = ("specialist", "reasoning", "dual")


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", required=True, help="tiny, tiny-long, debug, or a variant")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs, one worker each")
    parser.add_argument("--gpu-memory", type=float, required=True, metavar="GB", help="of each, in GB (10^9 bytes)")
    parser.add_argument("--stage", default="dual", help="specialist, reasoning or dual")
    parser.add_argument("--teacher-cache", action="store_true", help="teachers come from a cache, not from memory")
    parser.add_argument("--answers", type=int, help="questions in the data (default: the recipe's)")
    parser.add_argument("--gpu-tflops", type=float, default=400.0, help="peak of one GPU in the recipe's dtype")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe, as in model.image_size=224"
    )


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.stage not in _STAGES:
        raise UsageError(f"Unknown stage '{arguments.stage}'.", did_you_mean(arguments.stage, _STAGES))
    from dualvla_pipelines.plan import plan

    return plan(
        arguments.recipe,
        gpus=arguments.gpus,
        gpu_memory_gb=arguments.gpu_memory,
        stage=arguments.stage,
        assignments=tuple(arguments.set),
        teacher_cache=arguments.teacher_cache,
        gpu_tflops=arguments.gpu_tflops,
        answers=arguments.answers,
    )


def _render(result: Any) -> str:
    from dualvla_pipelines.plan import render

    return render(result)


COMMAND = Command("estimate memory, batch, cache size and speed of a recipe on some GPUs", _configure, _run, _render)
