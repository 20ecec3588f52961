"""What serving costs: the WebSocket path beside calling the policy in process, and batching beside one at a time.

    python benchmarks/serving.py [--only overhead|batching] [--seconds 20] [--json] [--out FILE]

overhead   one client, a 224 px image, a policy that takes no time: everything measured is overhead, stage by stage.
           Through Ray Serve's proxy (raw and as JPEG) and directly to the replica's listener, beside a bare WebSocket
           echo of the same bytes in another process (the floor of any such path).
batching   16 clients and a policy that takes 40 ms whatever the batch, as a GPU nearly does; beside a server that
           works on one at a time (the loop of openpi's server, written plainly), with the same client and codec.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dualvla.client import AsyncPolicyClient, ClientOptions, PolicyClient
from dualvla.schema import Observation, PolicyReply, PolicySpec
from dualvla.wire import messages
from dualvla.wire.openpi import pack, unpack

SIDE, HORIZON = 224, 8
BATCH_S, CLIENTS = 0.040, 16
WARM_UP = 100
SPEC = PolicySpec("ee_delta_pose+gripper", 5.0, ("main",), "specialist", horizon=HORIZON, execute_steps=HORIZON)

PATHS = {
    "through the proxy": ClientOptions(),
    "proxy, jpeg": ClientOptions(images="jpeg"),
    "direct": ClientOptions(direct=True),
}


class FlatPolicy:
    """Takes the same time whatever the size of the batch. Its actions say which observation they answer."""

    spec = SPEC

    def __init__(self, batch_s: float):
        self._batch_s = batch_s

    def infer(self, observations: Sequence[Observation], sessions: Sequence[str]) -> list[PolicyReply]:
        time.sleep(self._batch_s)
        return [PolicyReply(np.full((HORIZON, 7), o.step, np.float32), id=o.id) for o in observations]

    def reset(self, session: str) -> None:
        pass


def observation(step: int) -> Observation:
    return Observation({"main": PIXELS}, "put the red cube on the blue one", np.zeros(8, np.float32), step=step)


def _scene() -> np.ndarray:
    """uint8 [SIDE, SIDE, 3]: smooth shading and a little noise, so that it compresses as a photograph does."""
    rng = np.random.default_rng(0)
    coarse = np.kron(rng.integers(40, 216, (7, 7, 3)), np.ones((SIDE // 7, SIDE // 7, 1)))
    return np.clip(coarse + rng.normal(0, 4, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)


PIXELS = _scene()


def percentiles(ms: Sequence[float]) -> dict[str, float]:
    return {f"p{q}_ms": round(float(np.percentile(ms, q)), 3) for q in (50, 90, 99)}


def timed(action: Callable[[int], Any], count: int) -> list[float]:
    """Milliseconds of each call, after a warm-up."""
    taken = []
    for step in range(WARM_UP + count):
        started = time.perf_counter()
        action(step)
        taken.append((time.perf_counter() - started) * 1000)
    return taken[WARM_UP:]


@contextlib.contextmanager
def endpoint(batch_s: float) -> Iterator[str]:
    """HOST:PORT of Ray Serve's proxy in front of one replica."""
    from dualvla_serve.batching import LoadedPolicy
    from dualvla_serve.config import EndpointConfig
    from dualvla_serve.deploy import running

    def load() -> LoadedPolicy:
        return LoadedPolicy(FlatPolicy(batch_s), observation(0))

    with running(load, EndpointConfig(port=0, embodiment="unlimited", max_batch_size=CLIENTS)) as address:
        yield address


@contextlib.contextmanager
def plain_server(mode: str) -> Iterator[str]:
    """One of the baselines, in a process of its own."""
    process = subprocess.Popen([sys.executable, __file__, "--baseline", mode], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait()


def run_baseline(mode: str) -> None:
    """echo: answers every frame with one of a reply's size. one-at-a-time: openpi's loop, one event loop for all."""
    from websockets.asyncio.server import ServerConnection, serve

    policy = FlatPolicy(BATCH_S)
    reply = pack(messages.reply_to_wire(PolicyReply(np.zeros((HORIZON, 7), np.float32)), {}))

    async def converse(connection: ServerConnection) -> None:
        await connection.send(pack(messages.metadata(SPEC)))
        async for frame in connection:
            if mode == "echo":
                await connection.send(reply)
                continue
            started = time.perf_counter()
            (answer,) = policy.infer([messages.observation_from_wire(unpack(frame))], ["any"])
            await connection.send(
                pack(messages.reply_to_wire(answer, {"infer_ms": (time.perf_counter() - started) * 1000}))
            )

    async def listen() -> None:
        async with serve(converse, "127.0.0.1", 0, compression=None, max_size=None) as server:
            print(server.sockets[0].getsockname()[1], flush=True)
            await server.serve_forever()

    asyncio.run(listen())


def overhead(count: int) -> dict[str, Any]:
    policy = FlatPolicy(0)
    results: dict[str, Any] = {"in process": percentiles(timed(lambda s: policy.infer([observation(s)], ["a"]), count))}
    with plain_server("echo") as address:
        results["bare echo"] = _echo(address, count)
    with endpoint(0) as address:
        for name, options in PATHS.items():
            results[name] = _client_path(f"ws://{address}", options, count)
    for name in PATHS:
        results[name]["overhead_p50_ms"] = round(results[name]["p50_ms"] - results["in process"]["p50_ms"], 3)
    return results


def _echo(address: str, count: int) -> dict[str, float]:
    from websockets.sync.client import connect

    frame = pack(messages.observation_to_wire(observation(0)))
    with connect(f"ws://{address}", compression=None, max_size=None) as connection:
        connection.recv()

        def exchange(_: int) -> None:
            connection.send(frame)
            connection.recv()

        return percentiles(timed(exchange, count))


def _client_path(url: str, options: ClientOptions, count: int) -> dict[str, Any]:
    stages: dict[str, list[float]] = {}

    def ask(step: int) -> None:
        reply = client.infer(observation(step))
        assert reply["actions"][0, 0] == step
        timing = {name: ms for name, ms in reply["server_timing"].items() if name != "prev_total_ms"}
        timing["client, sockets and proxy"] = reply["round_trip_ms"] - timing.get("total_ms", timing["infer_ms"])
        for name, ms in timing.items():
            stages.setdefault(name, []).append(ms)

    with PolicyClient(url, options=options) as client:
        taken = timed(ask, count)
    shown = {name.removesuffix("_ms"): percentiles(ms[WARM_UP:]) for name, ms in stages.items()}
    return {**percentiles(taken), "stages": shown}


def batching(seconds: float) -> dict[str, Any]:
    with plain_server("one-at-a-time") as address:
        alone = asyncio.run(_closed_loop(f"ws://{address}", ClientOptions(), seconds))
    results = {"one at a time": alone}
    with endpoint(BATCH_S) as address:
        for name in ("through the proxy", "direct"):
            options = PATHS[name]
            results[name] = asyncio.run(_closed_loop(f"ws://{address}", options, seconds))
            results[name]["ratio"] = round(results[name]["replies_per_s"] / alone["replies_per_s"], 2)
            results[name]["p99_batches"] = round(results[name]["p99_ms"] / (BATCH_S * 1000), 2)
    return results


async def _closed_loop(url: str, options: ClientOptions, seconds: float) -> dict[str, Any]:
    """CLIENTS robots that ask again as soon as they are answered."""
    taken: list[float] = []
    sizes: list[float] = []

    async def robot(number: int) -> None:
        async with AsyncPolicyClient(url, options=options) as client:
            await client.spec()
            ready.release()
            await start.wait()
            step = number * 1_000_000
            while time.perf_counter() < until:
                step += 1
                reply = await client.infer(observation(step))
                assert reply["actions"][0, 0] == np.float32(step)
                if measured_from < time.perf_counter() <= until:
                    taken.append(reply["round_trip_ms"])
                    sizes.append(reply["policy_timing"].get("batch_size", 1.0))

    ready, start = asyncio.Semaphore(0), asyncio.Event()
    until = measured_from = 0.0
    robots = [asyncio.create_task(robot(number)) for number in range(CLIENTS)]
    for _ in robots:
        await ready.acquire()
    measured_from = time.perf_counter() + 1.0
    until = measured_from + seconds
    start.set()
    await asyncio.gather(*robots)
    return {
        "replies_per_s": round(len(taken) / seconds, 1),
        **percentiles(taken),
        "mean_batch": round(float(np.mean(sizes)), 2),
    }


def machine() -> str:
    return f"{os.cpu_count()} {platform.machine()} cores, no GPU, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("overhead", "batching"), help="one of the two measurements")
    parser.add_argument("--requests", type=int, default=2000, help="of the overhead measurement")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each batching measurement")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--baseline", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.baseline:
        run_baseline(arguments.baseline)
        return
    from dualvla_cluster.connect import connect

    os.environ.setdefault("RAY_worker_niceness", "0")  # else the replica yields to every other program, with 15
    connect(num_cpus=4)
    result: dict[str, Any] = {"machine": machine(), "load_of_others": round(os.getloadavg()[0], 1)}
    if arguments.only != "batching":
        result["overhead"] = overhead(arguments.requests)
    if arguments.only != "overhead":
        result["batching"] = batching(arguments.seconds)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.json:
        print(json.dumps(result))
        return
    for part in ("overhead", "batching"):
        for name, row in result.get(part, {}).items():
            stages = row.pop("stages", {})
            print(f"{part:9} {name:18}", *(f"{value:9.2f} {key}" for key, value in row.items()), sep="  ")
            for stage, ms in stages.items():
                print(f"{'':30}{stage:28}", *(f"{value:9.2f} {key}" for key, value in ms.items()), sep="  ")


if __name__ == "__main__":
    main()
