"""An endpoint on a cluster that an autoscaler grows and shrinks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from autoscaling import OwnAutoscalingCluster

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(1200)]

PROGRAM = Path(__file__).with_name("serve_program.py")


def test_replicas_and_nodes_follow_the_load_up_and_down() -> None:
    with OwnAutoscalingCluster.of_small_nodes(2).running() as (address, env):
        environment = {**os.environ, **env, "RAY_ADDRESS": address}
        done = subprocess.run(
            [sys.executable, str(PROGRAM)], env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=1000
        )
    told = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))  # Ray talks, too
    assert told["first"] == [1, 1]
    assert told["most"] == [3, 3]
    assert told["last"][0] == 1
    assert told["last"][1] < 3
    assert min(told["answered"]) > 0
