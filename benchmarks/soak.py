"""Ten minutes of robots: no reply lost or swapped, no memory that grows.

    python benchmarks/soak.py [--minutes 10] [--checkpoint FOLDER] [--out FILE] [--json]

One endpoint, two models, at the same time: 30 robots at 5 Hz that execute 8 actions of each chunk of the tiny policy
(random weights unless a checkpoint is named: speed and memory are the same), and 150 requests a second, at fixed times,
to a policy that takes 10 ms. Every second one talks to the replica's own listener, the others go through Serve's proxy.
Every observation carries an id that its reply must answer, and what the fixed policy answers is computed from that id.
Exits with 1 if a reply was lost, swapped or refused, or a process of the endpoint grew by more than 5 % after minute 2.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import logging
import os
import platform
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from dualvla.client import AsyncPolicyClient, ClientOptions
from dualvla.console import progress, setup_logging
from dualvla.errors import DualVLAError
from dualvla.schema import Observation, PolicyReply, PolicySpec

ROBOTS, HZ, EXECUTE = 30, 5.0, 8
CALLERS, CALLS_PER_S = 15, 150
FIXED_S = 0.010
SETTLED_S = 120.0  # memory is compared from here on, or from a third of a shorter run
GROWTH = 0.05
SAMPLE_S = 2.0
INSTRUCTION = "put the red cube on the blue cube"


class FixedPolicy:
    """10 ms a batch. What it answers is computed from the observation's id alone."""

    spec = PolicySpec("ee_delta_pose+gripper", HZ, ("main",), "specialist", horizon=2, execute_steps=2)

    def infer(self, observations: Sequence[Observation], sessions: Sequence[str]) -> list[PolicyReply]:
        time.sleep(FIXED_S)
        return [PolicyReply(np.full((2, 7), mark(o.id), np.float32), id=o.id) for o in observations]

    def reset(self, session: str) -> None:
        pass


def mark(observation_id: str) -> float:
    """A number that float32 holds exactly."""
    return float(zlib.crc32(observation_id.encode()) % 2**20)


def tiny_checkpoint(folder: str) -> str:
    """Recipe tiny's model before any training, with chunks long enough to execute 8 actions of."""
    from dualvla.models.checkpoint import save_checkpoint
    from dualvla.models.processing import Processor
    from dualvla.models.stages import prepare
    from dualvla.models.vla import VLA
    from dualvla_pipelines import recipes

    chunks = {"horizon": 2 * EXECUTE, "execute_steps": EXECUTE, "max_text_tokens": 16}
    config = prepare(dataclasses.replace(recipes.tiny().model, **chunks), "dual")
    rng = np.random.default_rng(0)
    numbers = (rng.normal(size=(50, size)) for size in (config.actions.size, config.proprio_dim, 3))
    model = VLA.create(config, processor := Processor.fit(config, [INSTRUCTION] * 5, *numbers), seed=0)
    save_checkpoint(folder, model.state_dict(), model.config, processor, {"stage": "dual"})
    return folder


@dataclass
class Tally:
    """What became of one kind of load's requests. faults: what went wrong -> how often."""

    sent: int = 0
    answered: int = 0
    milliseconds: list[float] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        ms = self.milliseconds or [0.0]
        quantiles = {f"p{q}_ms": round(float(np.percentile(ms, q)), 1) for q in (50, 99)}
        return {"sent": self.sent, "answered": self.answered, **quantiles, "faults": dict(self.faults)}


async def caller(
    url: str, options: ClientOptions, name: str, period_s: float, pixels: np.ndarray, until: float, tally: Tally
) -> None:
    """One robot: asks every period_s, from a moment of its own on, and checks each answer."""
    fixed = "model=fixed" in url
    async with AsyncPolicyClient(url, session=name, options=options) as client:
        due = time.monotonic() + (zlib.crc32(name.encode()) % 1000) / 1000 * period_s
        step = answers = 0
        while due < until:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due += period_s
            observation = Observation(
                {"main": pixels}, INSTRUCTION, np.zeros(4, np.float32), step=step, id=f"{name}/{step}"
            )
            step += EXECUTE
            tally.sent += 1
            try:
                reply = await client.infer(observation)
            except DualVLAError as error:
                tally.faults[f"{type(error).__name__}: {error}"[:100]] += 1
                continue
            answers += 1
            tally.answered += 1
            tally.milliseconds.append(reply["round_trip_ms"])
            if reply["id"] != observation.id or (fixed and reply["actions"][0, 0] != mark(observation.id)):
                tally.faults["another's reply"] += 1
            if reply["seq"] != answers:
                tally.faults["a session that lost count"] += 1


async def drive(address: str, seconds: float, sizes: tuple[int, int]) -> tuple[dict[str, Tally], dict[str, Any]]:
    """All callers at once, for so long; sizes: side in pixels of the tiny and of the fixed policy's images."""
    until = time.monotonic() + seconds
    tallies = {"tiny": Tally(), "fixed": Tally()}
    rng = np.random.default_rng(0)
    robots = []
    for number in range(ROBOTS + CALLERS):
        model = "tiny" if number < ROBOTS else "fixed"
        side = sizes[number >= ROBOTS]
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        period_s = EXECUTE / HZ if model == "tiny" else CALLERS / CALLS_PER_S
        url = f"ws://{address}/?model={model}" + ("&reasoning=every:32" if model == "tiny" else "")
        options = ClientOptions(direct=number % 2 == 0)
        robots.append(caller(url, options, f"{model}-{number}", period_s, pixels, until, tallies[model]))
    memory = Memory()
    watching = asyncio.create_task(memory.watch(seconds))
    await asyncio.gather(*robots)
    watching.cancel()
    return tallies, memory.summary(seconds)


class Memory:
    """Resident memory of the endpoint's processes, which are all below this one: name -> [(second, bytes)]."""

    def __init__(self) -> None:
        self._seen: dict[str, list[tuple[float, int]]] = {}

    async def watch(self, seconds: float) -> None:
        started = time.monotonic()
        with progress("soak, s", int(seconds)) as advance:
            shown = 0
            while True:
                now = time.monotonic() - started
                for child in psutil.Process().children(recursive=True):
                    self._sample(child, now)
                advance(int(now) - shown)
                shown = int(now)
                await asyncio.sleep(SAMPLE_S)

    def _sample(self, process: psutil.Process, now: float) -> None:
        try:
            title, size = process.cmdline()[0], process.memory_info().rss
        except (psutil.NoSuchProcess, psutil.ZombieProcess, IndexError):
            return
        if title.startswith("ray::") and "IDLE" not in title:
            self._seen.setdefault(f"{title.removeprefix('ray::').partition('.')[0]} {process.pid}", []).append(
                (now, size)
            )

    def summary(self, seconds: float) -> dict[str, Any]:
        """growth: the mean of the last tenth of the run over that of the first tenth after it had settled, minus 1."""
        settled = min(SETTLED_S, seconds / 3)
        out = {}
        for name, samples in self._seen.items():
            late = [(at, size) for at, size in samples if at >= settled]
            if len(late) < 10:
                continue
            tenth = max(3, len(late) // 10)
            first, last = (float(np.mean([size for _, size in part])) for part in (late[:tenth], late[-tenth:]))
            largest = max(size for _, size in late)
            out[name] = {
                "mib": round(last / 2**20, 1),
                "growth": round(last / first - 1, 4),
                "most": round(largest / first - 1, 4),
            }
        return out


def soak(minutes: float, checkpoint: str) -> dict[str, Any]:
    from dualvla.models.checkpoint import load_config
    from dualvla_cluster.connect import connect
    from dualvla_serve import checkpoint as checkpoints
    from dualvla_serve.batching import LoadedPolicy
    from dualvla_serve.config import EndpointConfig
    from dualvla_serve.deploy import serving
    from dualvla_serve.models import ModelSource

    load = round(os.getloadavg()[0], 1)
    side = load_config(checkpoint).image_size
    example = Observation({"main": np.zeros((64, 64, 3), np.uint8)}, INSTRUCTION, np.zeros(4, np.float32))

    def source(text: str) -> ModelSource:
        if text == "fixed":
            return ModelSource(lambda: LoadedPolicy(FixedPolicy(), example), "1")
        return checkpoints.source(text)

    os.environ.setdefault("RAY_worker_niceness", "0")  # else the replica yields to every other program, with 15
    connect(num_cpus=4)
    config = EndpointConfig(port=0, embodiment="unlimited", max_batch_size=32)
    with serving(source, {"tiny": checkpoint, "fixed": "fixed"}, config) as address:
        tallies, memory = asyncio.run(drive(address, minutes * 60, (side, 64)))
    result: dict[str, Any] = {
        "machine": f"{os.cpu_count()} {platform.machine()} cores, no GPU, Python {platform.python_version()}",
        "load_of_others": load,
        "minutes": minutes,
        "requests": {name: tally.summary() for name, tally in tallies.items()},
        "memory": memory,
    }
    result["ok"] = all(not t.faults and t.sent == t.answered for t in tallies.values()) and all(
        one["growth"] <= GROWTH for one in memory.values()
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--checkpoint", help="of the 30 robots' policy (default: recipe tiny's model, untrained)")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()
    setup_logging(verbose=False)
    logging.getLogger("dualvla.client").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        result = soak(arguments.minutes, arguments.checkpoint or tiny_checkpoint(f"{folder}/tiny"))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.json:
        print(json.dumps(result))
    else:
        for name, row in result["requests"].items():
            print(f"{name:12}", *(f"{key} {value}" for key, value in row.items()), sep="  ")
        for name, row in result["memory"].items():
            print(f"{name:32}{row['mib']:9.1f} MiB  grew by {row['growth']:+.1%}, at most {row['most']:+.1%}")
        print("ok" if result["ok"] else "NOT ok")
    sys.exit(0 if result["ok"] else 1)


if __name__ == "__main__":
    main()
