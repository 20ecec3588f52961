"""`dualvla deploy` on a real Ray head, as a user runs it; and a new checkpoint under robots that are at work."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from ray_head import Head, dualvla, free_ports, running_head
from serve.checkpoints import write_checkpoint
from unit import vla_fakes

from dualvla.client import ClientOptions, PolicyClient
from dualvla.schema import Observation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
ROBOTS = 4


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head(num_cpus=4, RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S="60", OMP_NUM_THREADS="1") as found:
        yield found


@dataclass
class Seen:
    """What one robot was answered. seqs: the session's own count of its answers."""

    seqs: list[int] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)


def deploy(head: Head, checkpoint: str, file: Path, port: int) -> dict[str, str]:
    """Builds and applies."""
    built = dualvla(head, "deploy", "build", checkpoint, "--out", str(file), "--port", str(port), "--cpus", "0.5")
    assert built.returncode == 0, built.stderr
    applied = dualvla(head, "deploy", "apply", str(file), "--address", head.address, "--wait", "360", "--json")
    assert applied.returncode == 0, applied.stderr
    return json.loads(applied.stdout)["applications"]


def robot(url: str, number: int, stop: threading.Event, seen: Seen) -> None:
    """Asks without a pause, half of them directly. Any error is the test's."""
    rng = np.random.default_rng(number)
    with PolicyClient(url, options=ClientOptions(direct=number % 2 == 0)) as client:
        for step in range(1_000_000):
            if stop.is_set():
                return
            pixels, proprio = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), np.zeros(4, np.float32)
            observation = Observation({"main": pixels}, vla_fakes.TEXTS[0], proprio, step=step, id=f"{number}/{step}")
            reply = client.infer(observation)
            assert reply["id"] == observation.id
            seen.seqs.append(reply["seq"])
            seen.versions.append(reply["model"]["version"])


def test_a_file_is_applied_and_a_new_checkpoint_fails_no_request(head: Head, tmp_path: Path) -> None:
    first, second = (write_checkpoint(str(tmp_path / f"seed{seed}"), seed) for seed in (0, 1))
    (port,) = free_ports(1)
    assert deploy(head, first, tmp_path / "serve.yaml", port) == {"dualvla": "RUNNING"}
    stop, seen = threading.Event(), [Seen() for _ in range(ROBOTS)]
    with ThreadPoolExecutor(ROBOTS) as pool:
        asked = [pool.submit(robot, f"ws://127.0.0.1:{port}", n, stop, seen[n]) for n in range(ROBOTS)]
        try:
            _until(lambda: all(len(one.seqs) >= 3 for one in seen), asked)
            assert deploy(head, second, tmp_path / "serve.yaml", port) == {"dualvla": "RUNNING"}
            _until(lambda: all(len(set(one.versions)) == 2 for one in seen), asked)
            enough = [len(one.seqs) + 3 for one in seen]
            _until(lambda: all(len(one.seqs) >= n for one, n in zip(seen, enough, strict=True)), asked)
        finally:
            stop.set()
        for one in asked:
            one.result(60)
    for one in seen:
        assert one.seqs == list(range(1, len(one.seqs) + 1))  # no answer lost, none given twice, the session unbroken
        turn = one.versions.index(one.versions[-1])
        assert len(set(one.versions[:turn])) == len(set(one.versions[turn:])) == 1  # once new, never old again
    assert seen[0].versions[-1] == seen[1].versions[-1]


def test_an_endpoint_that_cannot_start_is_told(head: Head, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(str(tmp_path / "dual"))
    file = tmp_path / "serve.yaml"
    built = dualvla(head, "deploy", "build", checkpoint, "--out", str(file), "--name", "broken")
    assert built.returncode == 0, built.stderr
    file.write_text(file.read_text().replace(checkpoint, "/nowhere/dual"))
    applied = dualvla(head, "deploy", "apply", str(file), "--address", head.address, "--wait", "120")
    assert applied.returncode == 1
    assert "/nowhere/dual" in applied.stderr


def _until(reached: object, asked: list[object]) -> None:
    deadline = time.monotonic() + 300
    while not reached():
        for one in asked:
            if one.done():
                one.result()  # raises the robot's error
        assert time.monotonic() < deadline
        time.sleep(0.05)
