"""An endpoint as Ray Serve's own config file, for clusters: made from our options, checked by Serve's own schema,
applied through the REST API of a cluster's head. Knows no checkpoint and no running replica.

Which checkpoints answer stands in `user_config` of the one deployment, and nowhere else: a file that differs only there
exchanges them under connected robots; any other difference replaces the replicas one after another.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic
import requests
import yaml
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.exceptions import AuthenticationError
from ray.serve.schema import ServeDeploySchema

from dualvla.config import to_dict
from dualvla.errors import DataError, PlatformError, PolicyError
from dualvla.io import storage
from dualvla_serve.config import EndpointConfig

IMPORT_PATH = "dualvla_serve.deploy:application"
DEPLOYMENT = "Policy"
_POLL_S = 0.5


def build(models: Mapping[str, str], config: EndpointConfig) -> dict[str, Any]:
    """Serve's config. models: name -> checkpoint folder or URL, readable on every node; the first is the default."""
    args = _changed(to_dict(config), to_dict(EndpointConfig()))
    deployment: dict[str, Any] = {"name": DEPLOYMENT, "user_config": {"models": dict(models)}}
    if not config.scaling.automatic:
        deployment["num_replicas"] = config.scaling.replicas
        args.get("scaling", {}).pop("replicas", None)
    http: dict[str, Any] = {"host": config.host, "port": config.port}
    if config.tls is not None:
        http |= {"ssl_certfile": config.tls.certificate, "ssl_keyfile": config.tls.key}
    application = {
        "name": config.name,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": args,
        "deployments": [deployment],
    }
    document = {"proxy_location": "EveryNode", "http_options": http, "applications": [application]}
    return check(document, "the config made here")


def write(path: str, document: Mapping[str, Any]) -> None:
    text = "# Made by `dualvla deploy build`; apply it with `dualvla deploy apply` or `serve deploy`.\n"
    storage.write_bytes(path, (text + yaml.safe_dump(dict(document), sort_keys=False)).encode())


def read(path: str) -> dict[str, Any]:
    """Raises: DataError naming what is wrong where."""
    try:
        document = yaml.safe_load(storage.read_bytes(path))
    except yaml.YAMLError as error:
        raise DataError(f"'{path}' is no YAML: {error}.", "make it with `dualvla deploy build`") from error
    return check(document, f"'{path}'")


def check(document: Any, where: str) -> dict[str, Any]:
    """The document itself, if Serve's schema takes it. Raises: DataError."""
    if not isinstance(document, dict):
        raise DataError(f"{where} is no Serve config.", "make it with `dualvla deploy build`")
    try:
        ServeDeploySchema.model_validate(document)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        at = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{where} is no Serve config: '{at}': {first['msg']}.", "see docs/serving.md") from error
    return document


def apply(document: Mapping[str, Any], address: str, timeout_s: float) -> dict[str, str]:
    """Makes the cluster serve this, and waits until it does: application -> its status.

    address: the head's dashboard, http(s)://HOST:PORT. Raises: PlatformError if it does not answer or refuses the
    token; PolicyError if an application fails, or is not ready in time (Serve then goes on trying).
    """
    with _translated(address):
        client = ServeSubmissionClient(address)
        client.deploy_applications(dict(document))
    wanted = {application["name"]: application for application in document["applications"]}
    deadline = time.monotonic() + timeout_s
    while True:
        with _translated(address):
            found = client.get_serve_details()["applications"]
        states = {name: _state(found.get(name), application) for name, application in wanted.items()}
        if all(state == "RUNNING" for state in states.values()):
            return states
        if time.monotonic() > deadline:
            raise PolicyError(
                f"Not ready after {timeout_s:g} s: {states}.",
                "`serve status` says how it goes; wait longer with --wait",
            )
        time.sleep(_POLL_S)


def _state(details: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> str:
    """Raises: PolicyError."""
    if details is None or (details.get("deployed_app_config") or {}).get("deployments") != wanted["deployments"]:
        return "NOT_STARTED"
    if details["status"] in ("DEPLOY_FAILED", "UNHEALTHY"):
        reasons = [details["message"], *(d["message"] for d in details["deployments"].values())]
        reason = "; ".join(text.strip().splitlines()[-1] for text in reasons if text.strip())
        raise PolicyError(f"'{wanted['name']}' failed: {reason}", "`serve status` has it in full")
    status: str = details["status"]
    return status


def _changed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Only what differs, so that each default stands once: in the code."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict) and name != "observation_keys":
            value, default = _changed(value, default), {}
        if value != default:
            out[name] = value
    return out


@contextlib.contextmanager
def _translated(address: str) -> Iterator[None]:
    """Ray's errors as ours."""
    try:
        yield
    except AuthenticationError as error:
        raise PlatformError(
            f"The Ray head at {address} refused this token.",
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the head's token file",
        ) from error
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise PlatformError(
            f"No Ray head answers at {address}: {error}.",
            "pass --address http://HOST:8265, or start one: `ray start --head`",
        ) from error
    except (RuntimeError, ValueError) as error:  # all that Ray's client says of any other answer
        raise PlatformError(f"The Ray head at {address} refused: {error}.", "check --address and the file") from error
