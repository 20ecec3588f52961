"""`dualvla doctor`: its command line; the checks are `dualvla_cluster.doctor`."""

import argparse
from collections.abc import Mapping
from typing import Any

from dualvla.cli import Command


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--install-driver",
        action="store_true",
        help="where no frame renders: install Mesa's Vulkan driver for CPUs (root and apt), or name the command",
    )


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla_cluster.doctor import examine

    return examine(arguments.install_driver)


def _render(result: Mapping[str, Any]) -> str:
    lines = []
    for check in result["checks"]:
        lines.append(f"{'ok  ' if check['ok'] else 'FAIL'}  {check['name']:<14} {check['detail']}")
        if check["fix"]:
            lines.append(f"      {'':<14} fix: {check['fix']}")
    failed = sum(not check["ok"] for check in result["checks"])
    lines.append(f"{failed} of {len(result['checks'])} checks failed" if failed else "everything works")
    return "\n".join(lines)


COMMAND = Command("check every prerequisite by using it; each failure names its fix", _configure, _run, _render)
