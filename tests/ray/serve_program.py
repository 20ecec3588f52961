"""An endpoint of one to three replicas on the cluster of RAY_ADDRESS, asked much and then not at all, as a program of
its own: prints what came of it as JSON."""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import ray
import serve_fakes
from ray import cloudpickle, serve
from serve_fakes import load_counting

from dualvla_cluster import connect
from dualvla_serve.config import EndpointConfig, Scaling
from dualvla_serve.deploy import DEPLOYMENT, running

ROBOTS = 12
MOST = 3
PATIENCE_S = 300


def replicas() -> int:
    """That answer."""
    found = [app.deployments[DEPLOYMENT].replica_states for app in serve.status().applications.values()]
    return sum(states.get("RUNNING", 0) for states in found)


def nodes() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def ask(address: str, robot: int, over: threading.Event) -> int:
    """How many questions of a robot were answered, one after the other."""
    image = [[[robot] * 3] * 24] * 16
    answered = 0
    while not over.is_set():
        body = json.dumps({"images": {"main": image}, "instruction": "slow", "proprio": [0, 1, 2]}).encode()
        request = urllib.request.Request(f"http://{address}/v1/infer", body, {"X-Session-Id": f"robot-{robot}"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["actions"][0][1] == robot
        except urllib.error.HTTPError as error:
            if error.code != 503:  # "not now": a replica comes or goes
                raise
            time.sleep(0.2)
        else:
            answered += 1
    return answered


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true() and time.monotonic() < deadline:
        time.sleep(0.2)


def main() -> None:
    cloudpickle.register_pickle_by_value(serve_fakes)
    connect.connect()
    scaling = Scaling(least=1, most=MOST, target_waiting=2.0, cpus=1.0)
    over = threading.Event()
    with (
        running(
            load_counting, EndpointConfig(port=0, max_batch_size=2, embodiment="unlimited", scaling=scaling)
        ) as address,
        ThreadPoolExecutor(ROBOTS) as pool,
    ):
        told = {"first": [replicas(), nodes()]}
        robots = [pool.submit(ask, address, robot, over) for robot in range(ROBOTS)]
        wait_until(lambda: replicas() == MOST)
        told["most"] = [replicas(), nodes()]
        over.set()
        told["answered"] = [robot.result() for robot in robots]
        wait_until(lambda: replicas() == 1 and nodes() < told["most"][1])
        told["last"] = [replicas(), nodes()]
    print(json.dumps(told))


if __name__ == "__main__":
    main()
