"""`dualvla assets`: the files that SimplerEnv's suites need. Knows the command line only."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from dualvla.cli import Command


def _configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    fetch = actions.add_parser("fetch", help="download upstream's data at the pinned commit, check it, resume")
    fetch.add_argument("--assets", metavar="DIR", help="where to (default: DUALVLA_ASSETS, or the user's cache)")
    fetch.add_argument("--url", help="another server's address of the archive; {repository} and {commit} are filled in")


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla.io.assets import assets_folder
    from dualvla_eval.simpler.assets import upstream
    from dualvla_eval.simpler.fetch import FetchOptions, fetch

    folder = str(assets_folder(arguments.assets))
    known = upstream()
    options = FetchOptions(arguments.url) if arguments.url else FetchOptions()
    found = fetch(folder, options)
    return {"folder": folder, "repository": known.repository, "commit": known.commit, "license": known.license, **found}


def _render(result: Mapping[str, Any]) -> str:
    state = "already there" if result["skipped"] else "fetched"
    return (
        f"{result['files']} files of {result['repository']} at {result['commit'][:12]} {state}: {result['folder']}\n"
        f"{result['verified']} agree with their pinned sha256; {len(result['unverified'])} have none pinned\n"
        f"Licence: {result['license']}"
    )


COMMAND = Command("bring the files of SimplerEnv's suites", _configure, _run, _render)
