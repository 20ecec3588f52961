"""What goes wrong out there: replicas that die, clients that are slow, deaf or gone, checkpoints that do not load."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from serve.local_endpoint import LocalEndpoint, endpoint
from serve.test_sessions import ask, eventually, talking
from serve_fakes import CountingPolicy, example
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from dualvla.errors import PolicyError
from dualvla.schema import Observation, PolicyReply
from dualvla.wire import messages
from dualvla.wire.openpi import pack, unpack
from dualvla_serve.batching import LoadedPolicy
from dualvla_serve.limits import Limits
from dualvla_serve.models import ModelSource


class Robot:
    """Counts its own questions, goes to the next address when a connection breaks, and resumes by id. Plain, so that it
    shows what any client can rely on."""

    def __init__(self, name: str, addresses: Sequence[str]):
        self.name, self.addresses = name, list(addresses)
        self.seq = self.retries = self.most_retries = 0
        self.answers: list[tuple[int, float, str]] = []  # seq, the policy's count, version

    def run(self, until: threading.Event) -> None:
        step = 0
        while not until.is_set():
            try:
                query = f"?session={self.name}&resume={self.seq}"
                with connect(f"ws://{self.addresses[0]}/{query}", open_timeout=5) as connection:
                    connection.recv(timeout=5)
                    while not until.is_set():
                        message = messages.observation_to_wire(example(step % 200, id=f"{self.name}/{step}"))
                        connection.send(pack(message))
                        answer = connection.recv(timeout=10)
                        assert isinstance(answer, bytes), answer
                        reply = unpack(answer)
                        assert reply["id"] == f"{self.name}/{step}"
                        self.seq = reply["seq"]
                        self.answers.append((reply["seq"], float(reply["actions"][0, 0]), reply["model"]["version"]))
                        self.retries = 0
                        step += 1
            except (ConnectionClosed, OSError, EOFError, TimeoutError):
                self.retries += 1
                self.most_retries = max(self.most_retries, self.retries)
                self.addresses.append(self.addresses.pop(0))


def roam(robots: Sequence[Robot], disturb: Any) -> None:
    until = threading.Event()
    with ThreadPoolExecutor(len(robots)) as pool:
        runs = [pool.submit(robot.run, until) for robot in robots]
        try:
            eventually(lambda: all(len(robot.answers) >= 5 for robot in robots))
            disturb()
            before = [len(robot.answers) for robot in robots]
            eventually(lambda: all(len(r.answers) >= b + 5 for r, b in zip(robots, before, strict=True)), 20)
        finally:
            until.set()
        for run in runs:
            run.result()


def test_a_replica_dies_under_load_and_no_session_is_lost_or_mixed_up(fault_seed: int) -> None:
    """At most one retry; and every answer counts on from the one before, whichever replica gave it."""
    with endpoint(name="a") as a, endpoint(beside=a, name="b") as b:
        robots = [Robot(f"robot-{i}", [a.address, b.address]) for i in range(6)]
        rng = np.random.default_rng(fault_seed)

        def disturb() -> None:
            time.sleep(rng.uniform(0, 0.1))
            a.ask(a.kill())

        roam(robots, disturb)
    for robot in robots:
        assert [seq for seq, _, _ in robot.answers] == list(range(1, len(robot.answers) + 1))
        assert [count for _, count, _ in robot.answers] == list(range(1, len(robot.answers) + 1))
        assert robot.most_retries == 1


def versioned(version: str) -> dict[str, ModelSource]:
    return {"policy": ModelSource(lambda: LoadedPolicy(CountingPolicy(), example()), version)}


def test_a_rolling_update_under_load_fails_no_request_and_drops_no_robot() -> None:
    with endpoint(models=versioned("1")) as running:
        robots = [Robot(f"robot-{i}", [running.address]) for i in range(6)]
        roam(robots, lambda: running.ask(running.replica.update(versioned("2"))))
    for robot in robots:
        assert robot.most_retries == 0
        assert [seq for seq, _, _ in robot.answers] == list(range(1, len(robot.answers) + 1))
        versions = [version for _, _, version in robot.answers]
        assert versions == sorted(versions)
        assert set(versions) == {"1", "2"}
        first = versions.index("2")
        assert robot.answers[first][1] == 1  # nothing of the old checkpoint's state is left


def broken() -> LoadedPolicy:
    raise RuntimeError("these weights do not load")


def test_a_version_that_does_not_load_leaves_the_old_one_at_work() -> None:
    with endpoint(models=versioned("1")) as running, talking(running.address) as (connection, _):
        running.ask(running.replica.update({"policy": ModelSource(broken, "2", "runs/bad")}))
        assert ask(connection)["model"]["version"] == "1"
        (line,) = running.replica.model_lines()
        assert (line["state"], line["version"]) == ("failed", "1")
        assert "do not load" in line["message"]
        with pytest.raises(PolicyError, match="new: RuntimeError"):
            running.ask(running.replica.update({**versioned("1"), "new": ModelSource(broken, "1")}))
        assert ask(connection)["model"]["version"] == "1"
    with pytest.raises(PolicyError, match="do not load"):
        endpoint(broken).__enter__()


def test_several_checkpoints_answer_by_name() -> None:
    class Other(CountingPolicy):
        def _reply(self, observation: Observation, session: str, batch: int) -> PolicyReply:
            return PolicyReply(np.full((3, 7), -1, np.float32))

    models = {**versioned("1"), "other": ModelSource(lambda: LoadedPolicy(Other(), example()), "9")}
    with endpoint(models=models) as running:
        with talking(running.address) as (first, greeting), talking(running.address, "?model=other") as (second, _):
            assert greeting["models"] == ["policy", "other"]
            assert ask(first)["actions"][0, 0] == 1
            reply = ask(second)
            assert (reply["actions"][0, 0], reply["model"]) == (-1, {"name": "other", "version": "9"})
        with connect(f"ws://{running.address}/?model=othr") as refused:
            assert "did you mean 'other'" in json.loads(refused.recv(timeout=5))["error"]["message"]


def connections(running: LocalEndpoint) -> int:
    return running.replica.connections.total


def upgraded(address: str) -> socket.socket:
    """A WebSocket opened by hand, which answers and reads nothing by itself."""
    host, port = address.split(":")
    bare = socket.socket()
    bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    bare.connect((host, int(port)))
    bare.sendall(
        f"GET / HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
    )
    return bare


def test_a_client_that_never_reads_is_cut_off_and_nobody_waits_for_it() -> None:
    limits = Limits(requests_per_s=1e6, burst=10**6)
    with endpoint(send_timeout_s=0.3, limits=limits) as running:
        deaf = upgraded(running.address)
        deaf.settimeout(0.5)
        eventually(lambda: connections(running) == 1)
        frame = pack(messages.observation_to_wire(example(instruction="x" * 4000)))
        masked = bytes([0x82, 0xFE]) + len(frame).to_bytes(2, "big") + bytes(4) + frame
        with talking(running.address) as (connection, _):

            def cut_off() -> bool:
                assert "actions" in ask(connection)
                try:
                    deaf.sendall(masked * 50)
                except OSError:  # nobody takes it any more
                    return connections(running) == 1
                return False

            eventually(cut_off, 30)
        deaf.close()


def test_a_client_that_is_slow_to_send_holds_up_nobody() -> None:
    with endpoint() as running:
        slow = socket.create_connection(running.address.split(":"))
        slow.sendall(f"POST /v1/infer HTTP/1.1\r\nHost: {running.address}\r\nContent-Length: 1000\r\n\r\n".encode())
        with talking(running.address) as (connection, _):
            for byte in b'{"images"':
                slow.send(bytes([byte]))
                assert "actions" in ask(connection)
        slow.close()
        with talking(running.address) as (connection, _):
            assert "actions" in ask(connection)


def test_a_connection_whose_other_end_vanished_is_found_out() -> None:
    """Its packets would simply stop: here, an end that answers no ping."""
    with endpoint(ping_s=0.3) as running:
        gone = upgraded(running.address)
        eventually(lambda: connections(running) == 1)
        eventually(lambda: connections(running) == 0, 10)
        gone.close()


def test_a_replica_that_ends_tells_its_robots_to_go_elsewhere() -> None:
    with contextlib.ExitStack() as still_open:
        with endpoint() as running:
            connection = still_open.enter_context(connect(f"ws://{running.address}"))
            connection.recv(timeout=5)
            assert ask(connection)["seq"] == 1
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(timeout=5)
        assert closed.value.rcvd.code == 1012
