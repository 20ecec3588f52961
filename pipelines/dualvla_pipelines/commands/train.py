"""The command `dualvla train`."""

from __future__ import annotations

import argparse
from typing import Any

from dualvla.cli import Command
from dualvla.errors import UsageError, did_you_mean
from dualvla_cluster.resources import add_profile, apply_profile

_STAGES = ("specialist", "reasoning", "dual")


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", required=True, help="specialist, reasoning or dual")
    parser.add_argument("--recipe", required=True, help="which recipe's stage: tiny, tiny-long, debug, or a variant")
    parser.add_argument("--data", required=True, help="data set folder (pruned, for the dual stage)")
    parser.add_argument("--out", required=True, help="checkpoint folder to make, or a URL such as s3://bucket/run")
    parser.add_argument("--init", help="checkpoint to start from (reasoning, dual)")
    parser.add_argument(
        "--action-teacher", metavar="C | ws://...", help="the specialist's checkpoint, or where it is served (dual)"
    )
    parser.add_argument(
        "--reasoning-teacher", metavar="C | ws://...", help="the same of the reasoning teacher (default: --init) (dual)"
    )
    parser.add_argument("--teacher-cache", metavar="DIR", help="what `dualvla teach` has made of both teachers (dual)")
    parser.add_argument(
        "--teacher-actors", type=int, default=0, metavar="N",
        help="hold teachers in N Ray actors each, which all workers ask, not in every worker (dual)",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, help="ZeRO-3 shards; changes losses by rounding only")
    parser.add_argument(
        "--threads", type=int, help="PyTorch threads a worker (default: the machine's cores shared out)"
    )
    parser.add_argument("--gpus", type=float, help="GPUs a worker (default: 1 if the cluster has one for each, else 0)")
    add_profile(parser)
    parser.add_argument("--seed", type=int, default=0, help="of weights, order of samples and noise")
    parser.add_argument("--stop-after", type=int, metavar="STEP", help="stop after this step, resumable")
    parser.add_argument(
        "--track",
        action="append",
        metavar="SETTING",
        help="send the figures of every step to tensorboard:FOLDER, wandb:PROJECT or mlflow:URI, or to none; may be "
        "repeated (default: tensorboard:OUT/tensorboard)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe, as in specialist.steps=100"
    )


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.stage not in _STAGES:
        raise UsageError(f"Unknown stage '{arguments.stage}'.", did_you_mean(arguments.stage, _STAGES))
    apply_profile(arguments, "train")
    if arguments.workers < 1:
        raise UsageError(f"--workers {arguments.workers} is not a number of workers.", "pass 1 or more")
    if arguments.teacher_actors < 0:
        raise UsageError(f"--teacher-actors {arguments.teacher_actors} is not a number of actors.", "pass 0 or more")
    from dualvla_pipelines.train import train

    return train(
        arguments.stage,
        arguments.recipe,
        arguments.data,
        arguments.out,
        init=arguments.init,
        action_teacher=arguments.action_teacher,
        reasoning_teacher=arguments.reasoning_teacher,
        teacher_cache=arguments.teacher_cache,
        teacher_actors=arguments.teacher_actors,
        workers=arguments.workers,
        threads=arguments.threads,
        gpus=arguments.gpus,
        seed=arguments.seed,
        assignments=arguments.set,
        stop_after=arguments.stop_after,
        track=arguments.track,
    )


def _render(result: Any) -> str:
    from dualvla_pipelines.train import render

    return render(result)


COMMAND = Command("train one stage (specialist, reasoning, dual) on Ray and ZeRO-3", _configure, _run, _render)
