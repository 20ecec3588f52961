"""The loop of a robot that a served policy drives: one action every control period, a safe hold when none comes.

    python examples/robot_loop.py ws://127.0.0.1:8000 --instruction "touch the red cube" --seconds 10

Runs as it is, with a stand-in for the robot. Put your own driver in its place: `observe` and `execute` are all it needs
(`pip install dualvla` brings no torch and no Ray).
"""

from __future__ import annotations

import argparse
import time
from typing import Protocol

import numpy as np

from dualvla.client import ActionStream, PolicyClient, StreamOptions
from dualvla.schema import Observation


class Robot(Protocol):
    def observe(self) -> Observation:
        """What the cameras and joints say now."""

    def execute(self, action: np.ndarray) -> None:
        """One control period of motion, float32 [D] in the units of the policy's action space. Returns at once."""


def drive(robot: Robot, actions: ActionStream, hz: float, seconds: float) -> tuple[int, int]:
    """Control periods executed, and how many of them the robot was held in."""
    executed = held = 0
    due = time.monotonic()
    until = due + seconds
    while due < until:
        command = actions.step(robot.observe())
        robot.execute(command.action)
        executed += 1
        held += command.held
        if command.reply is not None and command.reply["keyframe"]:
            print(f"{executed:4}  {command.reply['reasoning']}")
        due += 1 / hz
        time.sleep(max(0.0, due - time.monotonic()))
    return executed, held


class StandIn:
    """Sees noise and goes nowhere."""

    def __init__(self, cameras: tuple[str, ...], instruction: str, side: int, proprio: int):
        self._cameras, self._instruction, self._side, self._proprio = cameras, instruction, side, proprio
        self._rng = np.random.default_rng(0)
        self._step = 0

    def observe(self) -> Observation:
        pixels = self._rng.integers(0, 256, (self._side, self._side, 3), dtype=np.uint8)
        proprio = np.zeros(self._proprio, np.float32)
        return Observation(dict.fromkeys(self._cameras, pixels), self._instruction, proprio, step=self._step)

    def execute(self, action: np.ndarray) -> None:
        self._step += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of the endpoint, as ws://127.0.0.1:8000; the key is read from DUALVLA_API_KEY")
    parser.add_argument("--instruction", default="touch the red cube")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--side", type=int, default=64, help="of the stand-in's images, in pixels")
    parser.add_argument("--proprio", type=int, default=4, help="numbers of the stand-in's proprioception")
    arguments = parser.parse_args()
    with PolicyClient(arguments.url) as client, ActionStream(client, StreamOptions(deadline_s=0.2)) as actions:
        robot = StandIn(client.spec.cameras, arguments.instruction, arguments.side, arguments.proprio)
        executed, held = drive(robot, actions, client.spec.control_hz, arguments.seconds)
    print(f"{executed} control periods, held in {held} of them")


if __name__ == "__main__":
    main()
