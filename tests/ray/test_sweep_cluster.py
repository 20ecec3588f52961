"""Sweeps on clusters of several nodes: one that is taken away, and those that an autoscaler adds and removes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from autoscaling import OwnAutoscalingCluster
from ray.cluster_utils import Cluster

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("sweep_program.py")
PATIENCE_S = 300


def start(out: Path, address: str, *numbers: float, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROGRAM), str(out), *map(str, numbers)]
    environment = {**os.environ, **(env or {}), "RAY_ADDRESS": address}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def told(program: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = program.communicate(timeout=PATIENCE_S)
    assert program.returncode == 0
    return next(json.loads(line) for line in output.splitlines() if line.startswith("{"))  # Ray talks, too


def wait_for_parts(out: Path, number: int, program: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while len(list((out / "parts").glob("*.parquet"))) < number:
        assert program.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_node_that_is_taken_away_costs_no_episode(tmp_path: Path) -> None:
    whole = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        lost = whole.add_node(num_cpus=2)
        program = start(tmp_path / "out", whole.address, 12, 3, 0.15, 1)
        wait_for_parts(tmp_path / "out", 3, program)
        whole.remove_node(lost, allow_graceful=False)
        found = told(program)
    finally:
        whole.shutdown()
    assert [episode for episode, *_ in found["outcomes"]] == list(range(12))
    assert {reason for _, reason, _ in found["outcomes"]} == {"success"}
    assert (found["most"], found["last"]) == (2, 1)


def test_nodes_come_are_used_and_go(tmp_path: Path) -> None:
    with OwnAutoscalingCluster.of_small_nodes(3).running() as (address, env):
        found = told(start(tmp_path, address, 60, 4, 0.25, 1, env=env))
    assert (found["first"], found["most"], found["last"]) == (1, 4, 1)
    assert [episode for episode, *_ in found["outcomes"]] == list(range(60))
    assert {reason for _, reason, _ in found["outcomes"]} == {"success"}
    assert found["wall_s"] < 0.25 * sum(steps for *_, steps in found["outcomes"])  # they were of use
