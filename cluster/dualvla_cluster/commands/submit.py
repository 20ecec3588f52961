"""`dualvla submit -- COMMAND...`: any dualvla command as a job of a running Ray cluster. Submitted again while it runs,
it is followed; after an interruption, it resumes."""

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
    add_authority(parser)
    parser.add_argument("--detach", action="store_true", help="return as soon as the job is accepted")
    parser.add_argument("--python", default="python", help="name or path of the Python to run it with, on the cluster")
    parser.add_argument(
        "--code",
        choices=("installed", "image"),
        default="installed",
        help="bring the DualVLA that is installed here (packages only, never a folder), or use the cluster's own",
    )
    parser.add_argument(
        "--environment",
        choices=("cluster", "pinned"),
        default="cluster",
        help="use the cluster's packages, refused if their versions differ from those here, or have Ray install these",
    )
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for every process of the job")
    parser.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="NAME=env:VARIABLE | NAME=file:/PATH",
        help="a variable of the job, by where its value lies on the cluster's nodes; the value never travels",
    )
    parser.add_argument(
        "--profile", metavar="NAME", help="what the command is told, after a look whether there is room"
    )
    parser.add_argument(
        "--queue", action="store_true", help="submit though there is no room yet, as machines will come"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="a dualvla command and its options, after --")


def add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        default=argparse.SUPPRESS,
        help="the head's dashboard, http://HOST:PORT (default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)",
    )


def add_authority(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ca", metavar="FILE", help="certificate authority of an https address (or DUALVLA_CA_FILE)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla_cluster import resources, secrets
    from dualvla_cluster.jobs import Jobs, Shipment

    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        raise UsageError("Nothing to submit.", "name a command: `dualvla submit -- COMMAND ...`")
    if command[0] not in cli.commands():
        raise UsageError(f"Unknown command '{command[0]}'.", did_you_mean(command[0], cli.commands()))
    if arguments.environment == "pinned" and arguments.python != "python":
        raise UsageError(
            f"--python {arguments.python} would not see what --environment pinned installs.", "leave one of them out"
        )
    variables = _variables(arguments.env)
    shipment = Shipment(
        arguments.code, arguments.environment, variables, secrets.parse(arguments.secret), arguments.python
    )
    profile = resources.get_profile(arguments.profile) if arguments.profile else None
    jobs = Jobs(getattr(arguments, "address", None), arguments.ca)
    if profile is not None:
        variables[resources.VARIABLE] = resources.portable(arguments.profile)
        if not arguments.queue:
            jobs.require(profile, _stages(command[0]))
    job_id = jobs.submit(command, shipment)
    log.info("job %s accepted", job_id)
    if arguments.detach:
        return {"id": job_id, "status": jobs.status(job_id).status}
    try:
        job = jobs.follow(job_id, sys.stderr.write, lambda text: log.warning("job %s %s", job_id, text))
    except KeyboardInterrupt:
        log.warning("job %s goes on: `dualvla jobs logs %s` shows it, `dualvla jobs stop %s` ends it", *[job_id] * 3)
        raise
    return {**dataclasses.asdict(job), "exit_code": job.process_exit_code}


def _variables(texts: list[str]) -> dict[str, str]:
    """Raises: UsageError, without repeating a value that might be meant to be secret."""
    found = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise UsageError(f"--env '{name}' is not NAME=VALUE.", "for secrets there is --secret NAME=env:VARIABLE")
        found[name] = value
    return found


def _stages(command: str) -> tuple[str, ...]:
    """Whose workers the command starts, by a profile's names."""
    from dualvla_cluster.resources import STAGES

    return ("collect", "prune", "train", "eval") if command == "run" else (command,) if command in STAGES else ()


COMMAND = cli.Command(
    "run a command as a job of a running Ray cluster",
    configure,
    run,
    render=lambda result: f"job {result['id']}: {result['status']}",
)
