"""`dualvla serve CHECKPOINT`: a policy endpoint on this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import signal
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dualvla.cli import Command
from dualvla.errors import ServerError, UsageError
from dualvla_cluster.resources import add_profile, apply_profile

if TYPE_CHECKING:
    from dualvla_serve.config import EndpointConfig

log = logging.getLogger(__name__)

_STATE_DIR = os.path.join("~", ".dualvla", "serve")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="checkpoint folder")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=CHECKPOINT", help="one more checkpoint")
    add_endpoint_options(parser)


def add_endpoint_options(parser: argparse.ArgumentParser) -> None:
    """What `endpoint_config` reads."""
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; any but this machine's needs keys")
    add("--port", type=int, default=8000, help="TCP port; 0: any free one")
    add("--direct-ports", metavar="FIRST-LAST", help="TCP ports of the replicas' own listeners (default: any free one)")
    add("--keys-file", help="one key a line, then its scopes (default: infer) and expires=DATE; may change")
    add("--cert", help="TLS certificate, a PEM file")
    add("--key-file", help="the certificate's private key, a PEM file")
    add("--replicas", type=int, default=1, help="copies of the policy that answer side by side")
    add("--autoscale", metavar="LEAST:MOST", help="replicas follow the queue between these numbers")
    add("--cpus", type=float, help="CPUs that Ray reserves for a replica; fractions allowed")
    add("--gpus", type=float, help="GPUs for a replica; fractions allowed; more than 0 puts the policy on CUDA")
    add_profile(parser, count="replicas")
    add(
        "--embodiment",
        help="limits of actions: a name or JSON file (docs/serving.md); generic if not given",
    )
    add("--deadline-ms", type=float, help="requests that carry no deadline get this one, from their arrival")
    add("--observation-keys", metavar="FILE", help="JSON: more mappings of other clients' observation keys")
    add("--record", metavar="DIR", help="record all sessions as data sets in this folder or URL")
    add("--state-dir", default=_STATE_DIR, help="where the emergency stop is kept, a folder or URL")
    add("--status-page", action="store_true", help="a page of live sessions at /status, for keys of scope admin")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla.models.checkpoint import load_config
    from dualvla_cluster.connect import connect
    from dualvla_serve import link
    from dualvla_serve.deploy import DEFAULT_MODEL, checkpoint_source, serving
    from dualvla_serve.keys import read_keys

    models = {DEFAULT_MODEL: arguments.checkpoint, **_more_models(arguments.model)}
    for folder in models.values():
        load_config(folder)  # a mistake is told before anything starts
    if arguments.keys_file:
        read_keys(arguments.keys_file)
    config = endpoint_config(arguments)
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 makes robots wait for whatever else runs here
    connect(num_cpus=max(config.scaling.replicas, config.scaling.most) + 2)
    with serving(checkpoint_source(config), models, config) as address:
        signals = _catch_signals()
        web, sockets = ("https", "wss") if config.tls else ("http", "ws")
        endpoint = {"websocket": f"{sockets}://{address}", "http": f"{web}://{address}/v1/infer"}
        print(json.dumps(endpoint) if arguments.json else _announcement(endpoint), flush=True)
        while signals.get() == signal.SIGHUP:
            log.info("looking at the checkpoints again")
            try:
                link.order(config.name, models)
            except ServerError as error:
                log.error("the checkpoints stay as they are: %s", error)
        log.info("stopping")
    return {"checkpoint": arguments.checkpoint, **endpoint}


def endpoint_config(arguments: argparse.Namespace) -> EndpointConfig:
    """Raises: UsageError."""
    from dualvla_serve.config import EndpointConfig, Scaling, Tls

    if bool(arguments.cert) != bool(arguments.key_file):
        raise UsageError("TLS needs a certificate and its key.", "pass both --cert and --key-file")
    apply_profile(arguments, "serve", count="replicas")
    least, most = _range(arguments.autoscale, ":", "--autoscale") if arguments.autoscale else (0, 0)
    sizes = {"cpus": arguments.cpus, "gpus": arguments.gpus}
    given = {
        "embodiment": arguments.embodiment,
        "deadline_ms": arguments.deadline_ms,
        "record": arguments.record,
        "direct_ports": _range(arguments.direct_ports, "-", "--direct-ports") if arguments.direct_ports else None,
        "observation_keys": _mappings(arguments.observation_keys) if arguments.observation_keys else None,
    }
    return EndpointConfig(
        host=arguments.host,
        port=arguments.port,
        keys_file=os.path.abspath(arguments.keys_file) if arguments.keys_file else None,
        tls=Tls(os.path.abspath(arguments.cert), os.path.abspath(arguments.key_file)) if arguments.cert else None,
        scaling=Scaling(
            replicas=max(arguments.replicas, least) if least else arguments.replicas,
            least=least,
            most=most,
            **{name: value for name, value in sizes.items() if value is not None},
        ),
        state_dir=os.path.expanduser(arguments.state_dir),
        status_page=arguments.status_page,
        **{name: value for name, value in given.items() if value is not None},
    )


def _more_models(texts: list[str]) -> dict[str, str]:
    models = {}
    for text in texts:
        name, sign, folder = text.partition("=")
        if not sign or not name or not folder:
            raise UsageError(f"'--model {text}' names no checkpoint.", "write --model NAME=CHECKPOINT")
        models[name] = folder
    return models


def _range(text: str, separator: str, option: str) -> tuple[int, int]:
    first, sign, last = text.partition(separator)
    if not sign or not first.isdecimal() or not last.isdecimal() or int(first) > int(last):
        raise UsageError(f"'{option} {text}' is no range.", f"write it as {option} 2{separator}5")
    return int(first), int(last)


def _mappings(path: str) -> dict[str, Any]:
    from dualvla.config import from_dict
    from dualvla.io import storage
    from dualvla.wire.mapping import BUILT_IN, ObservationKeys

    try:
        named = json.loads(storage.read_bytes(path))
    except ValueError as error:
        raise UsageError(f"'{path}' is no JSON: {error}.", "see docs/serving.md") from error
    if not isinstance(named, dict):
        raise UsageError(f"'{path}' is no JSON object.", "see docs/serving.md")
    return {**BUILT_IN, **{name: from_dict(ObservationKeys, keys, name) for name, keys in named.items()}}


def _catch_signals() -> queue.SimpleQueue[int]:
    """Ctrl-C and SIGTERM are how a server is meant to end: it stops cleanly, and the exit code is 0. SIGHUP has it look
    at the checkpoints again."""
    came: queue.SimpleQueue[int] = queue.SimpleQueue()  # may be used in a signal's handler
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: came.put(number))
    return came


def _announcement(endpoint: Mapping[str, str]) -> str:
    return f"serving at {endpoint['websocket']} (WebSocket) and {endpoint['http']} (JSON); Ctrl-C stops"


COMMAND = Command(
    "serve a checkpoint to robots over WebSocket and HTTP",
    configure,
    run,
    render=lambda result: f"stopped serving {result['checkpoint']}",
)
