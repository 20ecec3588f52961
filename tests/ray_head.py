"""A Ray head of a test's own: its own ports, folder and process group, so that stopping it stops nothing else."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TOKEN = "0123456789abcdef0123456789abcdef"


@dataclass(frozen=True)
class Head:
    """address: of its dashboard and job API. env: of a process that may use it."""

    address: str
    env: dict[str, str]


@contextlib.contextmanager
def running_head(num_cpus: int = 2, metrics_port: int | None = None, **env: str) -> Iterator[Head]:
    """With a token and a dashboard. env: more of the environment that everything on it inherits."""
    dashboard, gcs, client, agent = free_ports(4)
    folder = tempfile.mkdtemp(prefix="dvh")  # short: Ray puts Unix sockets below it
    env = {**{k: v for k, v in os.environ.items() if not k.startswith("RAY_")}, **env}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    options = {
        "port": gcs,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "temp-dir": folder,
        "num-cpus": num_cpus,
        "object-store-memory": 100_000_000,
    }
    if metrics_port is not None:
        options["metrics-export-port"] = metrics_port
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    command += [f"--{name}={value}" for name, value in options.items()]
    log = Path(folder, "head.log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_for(address, process, log)
        yield Head(address, env)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def dualvla(head: Head, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dualvla", *argv]
    return subprocess.run(command, env=head.env | env, capture_output=True, text=True, timeout=400)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, log.read_text()
        try:
            request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {TOKEN}"})
            urllib.request.urlopen(request, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
