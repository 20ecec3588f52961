"""`dualvla jobs list|status|logs|stop`: what was submitted, and how it goes."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from dualvla import console
from dualvla.cli import Command
from dualvla.errors import UsageError
from dualvla_cluster.commands.submit import add_address, add_authority


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "status", "logs", "stop"))
    parser.add_argument("id", nargs="?", help="the job, for all but list")
    add_address(parser)
    add_authority(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla_cluster.jobs import Jobs

    if (arguments.id is None) != (arguments.action == "list"):
        raise UsageError(f"`dualvla jobs {arguments.action}` needs {'no' if arguments.id else 'a'} job id.")
    jobs = Jobs(getattr(arguments, "address", None), arguments.ca)
    if arguments.action == "list":
        return {"jobs": [dataclasses.asdict(job) for job in jobs.list()]}
    if arguments.action == "logs":
        return {"id": arguments.id, "logs": jobs.logs(arguments.id)}
    job = jobs.stop(arguments.id) if arguments.action == "stop" else jobs.status(arguments.id)
    return {"jobs": [dataclasses.asdict(job)]}


def _render(result: Mapping[str, Any]) -> str:
    if "logs" in result:
        return result["logs"].rstrip("\n")
    rows = [
        [job["id"], job["status"], _time(job["started"]), _code(job["exit_code"]), job["command"]]
        for job in result["jobs"]
    ]
    return console.table("jobs", ["id", "status", "started", "exit code", "command"], rows)


def _time(seconds: float | None) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds") if seconds else "-"


def _code(code: int | None) -> str:
    return "-" if code is None else str(code)


COMMAND = Command("list, watch and stop submitted jobs", configure, run, _render)
