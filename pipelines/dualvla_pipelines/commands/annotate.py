"""`dualvla annotate DATA`: people mark event boundaries in a local page. The work is `dualvla_pipelines.annotate`."""

from __future__ import annotations

import argparse
import getpass
import sys
from collections.abc import Mapping
from typing import Any

from dualvla.cli import Command
from dualvla.errors import UsageError


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="data set folder")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON file the marks are kept in; gone on with")
    parser.add_argument("--episodes", type=int, default=50, help="how many episodes to offer, mixed from all tasks")
    parser.add_argument("--by", default=None, metavar="NAME", help="who annotates (None: your login name)")
    parser.add_argument("--port", type=int, default=0, help="of the page, on this machine only (0: a free one)")


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla.webpage import PageServer
    from dualvla_pipelines.annotate import Annotator

    annotator = Annotator(arguments.data, arguments.out, arguments.by or _login_name(), arguments.episodes)
    server = PageServer(annotator.page(), arguments.port)
    print(f"annotate at {server.url}   (Ctrl-C when done)", file=sys.stderr, flush=True)
    server.serve()
    return {"out": arguments.out, "annotated": annotator.done, "offered": len(annotator.offered)}


def _login_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:  # a container may run under a number that has no name
        raise UsageError("This user has no login name.", "pass --by NAME") from error


def _render(result: Mapping[str, Any]) -> str:
    return (
        f"{result['annotated']} of {result['offered']} episodes annotated in {result['out']}\n"
        f"next: dualvla detector train DATA OUT --labels {result['out']}"
    )


COMMAND = Command("mark event boundaries by hand, in a page on this machine", _configure, _run, _render)
