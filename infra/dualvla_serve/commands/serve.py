"""`dualvla serve CHECKPOINT`: a policy endpoint on this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

from dualvla.cli import Command

log = logging.getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="checkpoint folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; any but this machine's needs keys")
    parser.add_argument("--port", type=int, default=8000, help="TCP port; 0: any free one")
    parser.add_argument("--keys-file", help="one key a line, its scopes after a space (default: infer)")
    parser.add_argument("--replicas", type=int, default=1, help="copies of the policy that answer side by side")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla.models.checkpoint import load_config
    from dualvla_cluster.connect import connect
    from dualvla_serve import checkpoint
    from dualvla_serve.deploy import EndpointConfig, running
    from dualvla_serve.keys import read_keys

    load_config(arguments.checkpoint)  # a mistake is told before anything starts
    ring = read_keys(arguments.keys_file) if arguments.keys_file else None
    config = EndpointConfig(host=arguments.host, port=arguments.port, ring=ring, replicas=arguments.replicas)
    connect(num_cpus=config.replicas + 2)
    with running(partial(checkpoint.load, arguments.checkpoint), config) as address:
        endpoint = {"websocket": f"ws://{address}", "http": f"http://{address}/v1/infer"}
        print(json.dumps(endpoint) if arguments.json else _announcement(endpoint), flush=True)
        _wait_for_signal()
        log.info("stopping")
    return {"checkpoint": arguments.checkpoint, **endpoint}


def _wait_for_signal() -> None:
    """Ctrl-C and SIGTERM are how a server is meant to end: it stops cleanly, and the exit code is 0."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()


def _announcement(endpoint: Mapping[str, str]) -> str:
    return f"serving at {endpoint['websocket']} (WebSocket) and {endpoint['http']} (JSON); Ctrl-C stops"


COMMAND = Command(
    "serve a checkpoint to robots over WebSocket and HTTP",
    configure,
    run,
    render=lambda result: f"stopped serving {result['checkpoint']}",
)
