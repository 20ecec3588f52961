"""`dualvla submit -- COMMAND...`: any dualvla command as a job of a running Ray cluster."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from typing import Any

from dualvla import cli
from dualvla.errors import UsageError, did_you_mean

log = logging.getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "dualvla submit [options] -- COMMAND [options of the command]"
    add_address(parser)
    parser.add_argument("--detach", action="store_true", help="return as soon as the job is accepted")
    parser.add_argument("--python", default="python", help="name or path of the Python to run it with, on the cluster")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a dualvla command and its options, after --")


def add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        default=argparse.SUPPRESS,
        help="the head's dashboard, http://HOST:PORT (default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla_cluster.jobs import Jobs

    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        raise UsageError("Nothing to submit.", "name a command: `dualvla submit -- COMMAND ...`")
    if command[0] not in cli.commands():
        raise UsageError(f"Unknown command '{command[0]}'.", did_you_mean(command[0], cli.commands()))
    jobs = Jobs(getattr(arguments, "address", None))
    job_id = jobs.submit(command, arguments.python)
    log.info("job %s accepted", job_id)
    if arguments.detach:
        return {"id": job_id, "status": jobs.status(job_id).status}
    try:
        job = jobs.follow(job_id, sys.stderr.write)
    except KeyboardInterrupt:
        log.warning("job %s goes on: `dualvla jobs logs %s` shows it, `dualvla jobs stop %s` ends it", *[job_id] * 3)
        raise
    return {**dataclasses.asdict(job), "exit_code": job.process_exit_code}


COMMAND = cli.Command(
    "run a command as a job of a running Ray cluster",
    configure,
    run,
    render=lambda result: f"job {result['id']}: {result['status']}",
)
