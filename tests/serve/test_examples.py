"""The examples for robots, run as a user runs them."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from serve.scripted_endpoint import Connection, obedient, scripted

from dualvla.wire import messages
from dualvla.wire.openpi import pack

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_robots_loop_gets_an_action_every_period() -> None:
    with scripted(obedient) as (url, connections):
        told = run("robot_loop.py", url, "--seconds", "1.5")
    executed, held = map(int, re.search(r"(\d+) control periods, held in (\d+)", told).groups())
    assert executed == 8  # at 5 Hz, the first at once
    assert held <= 1  # a busy machine may be late once, with the first answer
    assert "so" in told
    seen = connections[0].received
    assert len(seen) >= executed // 3
    assert seen[-1]["step"] > seen[1]["step"]


@pytest.mark.sim
def test_a_simulated_robot_closes_the_loop() -> None:
    """A policy that always moves 1 cm to the left: the arm must have gone there."""
    left = np.zeros((3, 7), np.float32)
    left[:, 1] = 0.01

    def moves_left(connection: Connection) -> None:
        connection.greet()
        for seq in range(1, 1000):
            message = connection.receive()
            if messages.is_reset(message):
                connection.socket.send(pack(dict(messages.RESET)))
            else:
                assert message["images/main"].shape == (64, 64, 3)
                connection.answer(message, seq, actions=left)

    with scripted(moves_left) as (url, connections):
        told = run("sim_robot.py", url, "--episodes", "2", "--hz", "100").splitlines()
    assert len(told) == 2
    for line in told:
        steps, moved = re.search(r"after (\d+) steps .* ended ([\d.]+) m away", line).groups()
        assert 0.5 < float(moved) / (0.01 * int(steps)) < 1.2
    assert any(m["step"] > 0 for m in connections[0].received if "step" in m)
