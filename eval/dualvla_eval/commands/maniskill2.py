"""`dualvla maniskill2`: the environment of the original simulators. Knows the command line only."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from dualvla.cli import Command


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--python", metavar="PROGRAM", help="a Python of our version, 3.11 (default: this one)")
    parser.add_argument("--remake", action="store_true", help="from scratch, even if it is there")


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    import sys

    from dualvla.errors import PlatformError
    from dualvla_eval.maniskill2 import interpreter

    folder = interpreter.folder()
    try:
        found, made = interpreter.find("mani_skill2"), False
    except PlatformError:
        made = True
    if made or arguments.remake:
        found, made = interpreter.make(folder, arguments.python or sys.executable), True
    return {"python": found.python, "made": made, "packages": dict(found.packages)}


def _render(result: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in result["packages"].items())
    return f"{'made' if result['made'] else 'already there'}: {result['python']}\n{packages}"


COMMAND = Command("make the environment of the original simulators (suite maniskill2)", _configure, _run, _render)
