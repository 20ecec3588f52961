"""The command `dualvla teach`."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

from dualvla.cli import Command
from dualvla.errors import UsageError
from dualvla_cluster.resources import add_profile, apply_profile

log = logging.getLogger(__name__)


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", nargs="?", help="data set folder; its training rows are asked about")
    parser.add_argument("out", metavar="OUT", nargs="?", help="cache folder to make; goes on with what is there")
    parser.add_argument("--action-teacher", metavar="C", help="the specialist's checkpoint (Eq. 5)")
    parser.add_argument("--reasoning-teacher", metavar="C", help="the checkpoint that stage dual starts from (Eq. 6)")
    parser.add_argument("--top-k", type=int, default=50, help="tokens kept at every position of an answer")
    parser.add_argument(
        "--tail-draws", type=int, default=8, help="how many of these are drawn from all but the likeliest"
    )
    parser.add_argument("--temperature", type=float, default=2.0, help="that training will soften by")
    parser.add_argument("--views", type=int, default=4, help="(colour jitter, tau, noise) a sample: training takes one")
    parser.add_argument("--packed", action="store_true", help="fewer bytes a token, a little less exact")
    parser.add_argument("--seed", type=int, default=0, help="of the views")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; changes no result")
    add_profile(parser)
    parser.add_argument(
        "--serve",
        metavar="C",
        help="no cache: answer students elsewhere (`train --action-teacher ws://...`) with this checkpoint until"
        " Ctrl-C; those on other machines need the key in DUALVLA_TEACHER_KEY",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address that --serve listens on")
    parser.add_argument("--port", type=int, default=8020, help="port that --serve listens on; 0: any free one")


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.serve is not None:
        return _serve(arguments)
    if arguments.data is None or arguments.out is None:
        raise UsageError("teach needs DATA and OUT.", "or --serve C, to answer students elsewhere")
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
            arguments.top_k,
            arguments.temperature,
            arguments.views,
            arguments.seed,
            arguments.packed,
            arguments.tail_draws,
        ),
        workers=arguments.workers,
    )


def _serve(arguments: argparse.Namespace) -> dict[str, Any]:
    """Until interrupted."""
    if arguments.data is not None:
        raise UsageError(f"--serve beside a data set '{arguments.data}'.", "make a cache, or serve: one of them")
    import torch

    from dualvla.distill.teacher_server import KEY_VARIABLE, TeacherService, serving

    service = TeacherService(arguments.serve, "cuda" if torch.cuda.is_available() else "cpu")
    key = os.environ.get(KEY_VARIABLE)
    with serving(service, arguments.host, arguments.port, key) as server:
        host, port = server.socket.getsockname()[:2]
        log.info("teacher %s listens on ws://%s:%d (%s)", arguments.serve, host, port, "key" if key else "no key")
        server.serve_forever()
    return {}


def _render(result: Any) -> str:
    from dualvla_pipelines.teach import render

    return render(result)


COMMAND = Command("ask the teachers once about every training sample, into a cache", _configure, _run, _render)
