"""`dualvla kb build` and `dualvla kb edit`: the knowledge base of scored trajectories. Knows the command line only."""

from __future__ import annotations

import argparse
import getpass
from collections.abc import Mapping
from typing import Any

from dualvla.cli import Command
from dualvla_eval.commands.score import add_judge, make_judge


def _configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="build | edit")
    build = actions.add_parser(
        "build",
        formatter_class=parser.formatter_class,
        help="from filmed evaluations, with a judge's marks to begin with",
    )
    build.add_argument("folders", nargs="+", metavar="EVAL_DIR", help="finished evaluations, filmed (--videos all)")
    build.add_argument("out", metavar="OUT", help="the knowledge base folder")
    build.add_argument("--entries", type=int, default=100, help="how many, spread over policies, tasks and outcomes")
    build.add_argument("--seed", type=int, default=0, help="which ones")
    add_judge(build)
    edit = actions.add_parser(
        "edit",
        formatter_class=parser.formatter_class,
        help="a page on this machine to watch rollouts and correct their marks",
    )
    edit.add_argument("folder", metavar="KB", help="a knowledge base folder")
    edit.add_argument("--as", dest="author", help="your name, kept with every correction (default: the user's)")
    edit.add_argument("--port", type=int, default=0, help="0 takes a free one")
    for each in (build, edit):
        for name, text in (("--json", "print the result as JSON on stdout"), ("--verbose", "log more (to stderr)")):
            each.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=text)


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    return _build(arguments) if arguments.action == "build" else _edit(arguments)


def _build(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla.errors import UsageError
    from dualvla.io import storage
    from dualvla_eval.knowledge import BuildConfig, build

    if arguments.entries < 1:
        raise UsageError("--entries must be 1 or more.", "leave it out for the default")
    judge = make_judge(arguments, storage.join(arguments.out, "verdicts"), arguments.kb)
    made = build(arguments.folders, arguments.out, judge, BuildConfig(arguments.entries, arguments.seed))
    return {"ok": True, "out": arguments.out, **made}


def _edit(arguments: argparse.Namespace) -> dict[str, Any]:
    import sys

    from dualvla.webpage import PageServer
    from dualvla_eval.kb_page import make_page
    from dualvla_eval.knowledge import KnowledgeBase

    base = KnowledgeBase(arguments.folder)
    server = PageServer(make_page(base, arguments.author or _user()), arguments.port)
    print(f"Open {server.url}   (Ctrl-C ends; every correction is saved at once)", file=sys.stderr, flush=True)
    server.serve()
    entries = base.entries()
    return {"ok": True, "out": arguments.folder, "entries": len(entries), "reviewed": _reviewed(entries)}


def _user() -> str:
    """Raises: UsageError in a container whose user has no name."""
    from dualvla.errors import UsageError

    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:
        raise UsageError("A correction needs the name of who makes it.", "pass --as NAME") from error


def _reviewed(entries: list[Any]) -> int:
    return sum(e.current.reviewed for e in entries)


def _render(result: Mapping[str, Any]) -> str:
    if "reviewed" in result:
        return f"{result['reviewed']} of {result['entries']} entries reviewed by people\n{result['out']}"
    return f"{result['entries']} entries" + (", unchanged" if result["skipped"] else "") + f"\n{result['out']}"


COMMAND = Command("the knowledge base a judge learns from: build it, correct it", _configure, _run, _render)
