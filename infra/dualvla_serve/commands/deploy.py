"""`dualvla deploy`: an endpoint as Ray Serve's config file and onto a cluster; a profile as manifests of a cluster."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

from dualvla.cli import Command
from dualvla.errors import UsageError
from dualvla_cluster.commands.submit import add_address
from dualvla_serve.commands import serve

_DEFAULT_ADDRESS = "http://127.0.0.1:8265"


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="build|apply|kubernetes|ray-up|profile")
    build = actions.add_parser("build", help="write Serve's config file for checkpoints")
    build.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="folder or URL, or NAME=CHECKPOINT")
    build.add_argument("--out", required=True, help="file to write, such as serve.yaml")
    build.add_argument("--name", default="dualvla", help="of the endpoint in the cluster")
    serve.add_endpoint_options(build)
    apply = actions.add_parser("apply", help="make a cluster serve what a config file says")
    apply.add_argument("config", help="the file that `deploy build` wrote")
    apply.add_argument("--wait", type=float, default=600.0, metavar="SECONDS", help="until it must be ready")
    add_address(apply)
    machines = (
        actions.add_parser("kubernetes", help="write KubeRay manifests, as a kustomize base"),
        actions.add_parser("ray-up", help="write the YAML that `ray up` makes a cluster of AWS machines from"),
        actions.add_parser("profile", help="print a profile as JSON, to start one of your own from"),
    )
    kubernetes, ray_up, profile = machines
    for action in machines:
        action.add_argument("--profile", required=True, metavar="NAME", help="nodes:N, spot:N, node8, or a JSON file")
    kubernetes.add_argument("--image", required=True, metavar="REPOSITORY:TAG", help="for pipelines (Dockerfile.train)")
    kubernetes.add_argument("--serve-image", metavar="REPOSITORY:TAG", help="for policies (default: --image)")
    kubernetes.add_argument("--job", default="doctor", metavar="COMMAND", help="the dualvla command of the RayJob")
    kubernetes.add_argument("--serve", metavar="FILE", help="what `deploy build` wrote; adds a RayService")
    kubernetes.add_argument("--redis", default="", metavar="HOST:PORT", help="keeps the state of a head that is lost")
    kubernetes.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    ray_up.add_argument("--image", required=True, metavar="REPOSITORY:TAG")
    ray_up.add_argument("--region", default="us-east-1")
    ray_up.add_argument("--out", required=True, help="file to write, such as cluster.yaml")
    profile.add_argument("--out", help="file to write it to, such as mine.json")
    for action in (build, apply, *machines):  # after the action, too
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    actions = {
        "build": _build, "apply": _apply, "kubernetes": _kubernetes, "ray-up": _ray_up, "profile": _profile
    }  # fmt: skip
    return actions[arguments.action](arguments)


def _kubernetes(arguments: argparse.Namespace) -> dict[str, Any]:
    import shlex

    from dualvla import cli
    from dualvla.io import storage
    from dualvla_cluster import manifests
    from dualvla_cluster.resources import get_profile
    from dualvla_serve import deploy_config

    command = shlex.split(arguments.job)
    cli.parse(command[0] if command else "", command[1:])  # a mistake is told here, not by a pod
    images = manifests.Images(arguments.image, arguments.serve_image or arguments.image)
    endpoint = deploy_config.read(arguments.serve) if arguments.serve else None
    options = manifests.KubeOptions(redis=arguments.redis)
    files = manifests.kubernetes(get_profile(arguments.profile), images, options, command, endpoint)
    for name, document in files.items():
        storage.write_bytes(storage.join(arguments.out, name), manifests.text(document).encode())
    return {"out": arguments.out, "files": sorted(files), "then": f"kubectl apply -k {arguments.out}"}


def _ray_up(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla.io import storage
    from dualvla_cluster import manifests
    from dualvla_cluster.resources import get_profile

    document = manifests.ray_up(get_profile(arguments.profile), arguments.image, arguments.region)
    storage.write_bytes(arguments.out, manifests.text(document).encode())
    return {"out": arguments.out, "then": f"ray up {arguments.out}"}


def _profile(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla.config import to_dict
    from dualvla.io import storage
    from dualvla_cluster.resources import get_profile

    found = to_dict(get_profile(arguments.profile))
    if arguments.out:
        storage.write_bytes(arguments.out, json.dumps(found, indent=2).encode())
    return {"profile": found}


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
    if "profile" in result:
        return json.dumps(result["profile"], indent=2)
    if "then" in result:
        return f"wrote {result['out']}; then `{result['then']}`"
    if "out" in result:
        return f"wrote {result['out']}; `dualvla deploy apply {result['out']}` makes a cluster serve it"
    return "\n".join(f"{name}: {status}" for name, status in result["applications"].items())


COMMAND = Command(
    "an endpoint, or a whole cluster, as files that Ray Serve, Kubernetes and `ray up` take", configure, run, _render
)
