"""`dualvla deploy build|apply`: an endpoint as Ray Serve's config file, and the file onto a cluster."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from dualvla.cli import Command
from dualvla.errors import UsageError
from dualvla_cluster.commands.submit import add_address
from dualvla_serve.commands import serve

_DEFAULT_ADDRESS = "http://127.0.0.1:8265"


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="build|apply")
    build = actions.add_parser("build", help="write Serve's config file for checkpoints")
    build.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="folder or URL, or NAME=CHECKPOINT")
    build.add_argument("--out", required=True, help="file to write, such as serve.yaml")
    build.add_argument("--name", default="dualvla", help="of the endpoint in the cluster")
    serve.add_endpoint_options(build)
    apply = actions.add_parser("apply", help="make a cluster serve what a config file says")
    apply.add_argument("config", help="the file that `deploy build` wrote")
    apply.add_argument("--wait", type=float, default=600.0, metavar="SECONDS", help="until it must be ready")
    add_address(apply)
    for action in (build, apply):  # after the action, too
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    return _build(arguments) if arguments.action == "build" else _apply(arguments)


def _build(arguments: argparse.Namespace) -> dict[str, Any]:
    import dataclasses

    from dualvla.models.checkpoint import load_config
    from dualvla_serve import deploy_config

    models = _models(arguments.checkpoints)
    for folder in models.values():
        load_config(folder)  # a mistake is told here, not by every replica
    config = dataclasses.replace(serve.endpoint_config(arguments), name=arguments.name)
    document = deploy_config.build(models, config)
    deploy_config.write(arguments.out, document)
    return {"out": arguments.out, "models": models}


def _apply(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla_serve import deploy_config

    address = getattr(arguments, "address", None) or os.environ.get("RAY_API_SERVER_ADDRESS") or _DEFAULT_ADDRESS
    document = deploy_config.read(arguments.config)
    return {"address": address, "applications": deploy_config.apply(document, address, arguments.wait)}


def _models(texts: list[str]) -> dict[str, str]:
    from dualvla_serve.deploy import DEFAULT_MODEL

    models: dict[str, str] = {}
    for text in texts:
        name, sign, folder = text.partition("=")
        name, folder = (name, folder) if sign else (DEFAULT_MODEL, text)
        if not name or not folder or name in models:
            raise UsageError(f"'{text}' does not name one more checkpoint.", "write NAME=CHECKPOINT, each name once")
        models[name] = folder if "://" in folder else os.path.abspath(folder)
    return models


def _render(result: Mapping[str, Any]) -> str:
    if "out" in result:
        return f"wrote {result['out']}; `dualvla deploy apply {result['out']}` makes a cluster serve it"
    return "\n".join(f"{name}: {status}" for name, status in result["applications"].items())


COMMAND = Command("an endpoint on a cluster, by Ray Serve's own config file", configure, run, _render)
