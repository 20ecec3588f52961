"""A Ray cluster of several nodes on one machine that share no folder: each has a /tmp, a home, a working folder and a
process tree of its own (mount and process namespaces), and is lost as a machine is: all at once. A node may be slow, or
have a small disk of its own that fills up.

Needs root, as full-disk tests do; `available` says whether it can be had here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from ray_head import TOKEN, Head, free_ports

_START_S = 180.0
_STARTS = 3  # Ray gives a node 30 s to join, which is short on a machine that has other things to do
_SLICE_S = 0.2
_OF_RAY = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
_OWN = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def available() -> bool:
    done = subprocess.run([*_OWN, "true"], capture_output=True, check=False)
    return done.returncode == 0


@dataclass
class Node:
    """folder: what the node sees as /tmp. process: ends with the node."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]
    log: Path

    def lose(self) -> None:
        """SIGKILL to everything on it: the first process of a process namespace takes all others with it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def works_at(self) -> list[str]:
        """Titles of its Ray processes that hold an actor or a task, such as `ray::SimulatorImpl.run`."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                found.append(" ".join(process.cmdline()).strip())
        return [title for title in found if title.startswith("ray::") and not title.startswith(_OF_RAY)]

    @contextlib.contextmanager
    def slowed(self, share: float) -> Iterator[None]:
        """Everything on it runs for this share of the time only, slice by slice."""
        ended = threading.Event()

        def signal_all(how: signal.Signals) -> None:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    process.send_signal(how)

        def slow_down() -> None:
            while not ended.is_set():
                signal_all(signal.SIGSTOP)
                ended.wait(_SLICE_S * (1 - share))
                signal_all(signal.SIGCONT)
                ended.wait(_SLICE_S * share)

        thread = threading.Thread(target=slow_down, name="slow node", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    @property
    def started(self) -> bool:
        """Whether `ray start` has written all that it needs: with --block it then says that it waits."""
        return b"will now block" in self.log.read_bytes()

    def fill_disk(self) -> None:
        """To the last byte: its /tmp must be a small disk of its own."""
        with contextlib.suppress(OSError), open(f"/proc/{self.process.pid}/root/tmp/filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))


@dataclass
class Nodes:
    """head: where jobs are submitted. nodes: the head's first."""

    head: Head
    gcs: str
    root: Path
    env: dict[str, str]
    nodes: list[Node] = field(default_factory=list)

    def add(self, cpus: int = 2, disk_mb: int | None = None) -> Node:
        """A worker node, once it has joined; not before the head knows of those that are lost. disk_mb: a disk of that
        size for its /tmp."""
        living = [node for node in self.nodes if node.process.poll() is None]
        self._wait(living[0], lambda: alive(self.head) == len(living))
        for _ in range(_STARTS):
            node = self._start([f"--address={self.gcs}", f"--num-cpus={cpus}"], disk_mb)
            if self._joined(node, lambda: alive(self.head) > len(living)):
                return node
            self.nodes.remove(node)
        raise AssertionError(node.log.read_text())

    def _start(self, options: list[str], disk_mb: int | None = None) -> Node:
        name = f"node-{len(self.nodes)}"
        folder = self.root / name
        folder.mkdir()
        agent, grpc, runtime, metrics = free_ports(4)
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", *options]
        command += ["--object-store-memory=80000000", "--min-worker-port=0", "--max-worker-port=0"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"]
        command += [f"--runtime-env-agent-port={runtime}", f"--metrics-export-port={metrics}"]
        disk = f'mount -t tmpfs -o size={disk_mb}m node "{folder}" && ' if disk_mb else ""
        script = f'{disk}{_keep_code(folder)}mount --rbind "{folder}" /tmp && mkdir /tmp/ray /tmp/work /tmp/home'
        script += ' && cd /tmp/work && exec "$@"'
        log = self.root / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*_OWN, "sh", "-c", script, "sh", *command],
                env={**self.env, "HOME": "/tmp/home", "TMPDIR": "/tmp"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        node = Node(name, folder, process, log)
        self.nodes.append(node)
        return node

    def _wait(self, node: Node, ready: Callable[[], bool]) -> None:
        assert self._joined(node, ready), node.log.read_text()

    def _joined(self, node: Node, ready: Callable[[], bool]) -> bool:
        """False if the node ended first."""
        deadline = time.monotonic() + _START_S
        while not (ready() and node.started):
            if node.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, node.log.read_text()
            time.sleep(0.3)
        return True


def _keep_code(folder: Path) -> str:
    """Shell commands that leave the checkout and its Python in sight where they lie below the /tmp that is covered."""
    code = {Path(__file__).parents[1], Path(sys.prefix)}
    below = [path.relative_to("/tmp") for path in code if path.is_relative_to("/tmp")]
    return "".join(f'mkdir -p "{folder / p}" && mount --bind "/tmp/{p}" "{folder / p}" && ' for p in sorted(below))


def alive(head: Head) -> int:
    """Nodes that the head takes for alive; 0 while it does not answer."""
    try:
        found = _ask(head, "/api/v0/nodes?limit=100")["result"]["result"]
    except (urllib.error.URLError, OSError, TypeError, KeyError):
        return 0
    return sum(node["state"] == "ALIVE" for node in found)


def free_disks(head: Head) -> list[float]:
    """Bytes left on the disk of each living node that has told the head: they do so now and then."""
    nodes = [node for node in _ask(head, "/nodes?view=summary")["summary"] if node["raylet"]["state"] == "ALIVE"]
    return [disk["free"] for node in nodes for path, disk in (node.get("disk") or {}).items() if path != "/"]


def _ask(head: Head, path: str) -> Any:
    request = urllib.request.Request(f"{head.address}{path}", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)["data"]


@contextlib.contextmanager
def running_nodes(workers: int, cpus: int = 2, **env: str) -> Iterator[Nodes]:
    """A head that takes no work, and `workers` nodes of `cpus` logical CPUs. env: of all of them."""
    root = Path(tempfile.mkdtemp(prefix="dvn"))
    dashboard, gcs, client = free_ports(3)
    environment = {**{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}, **env}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # as others of this machine, so that a fault's time limit means something
        "RAY_health_check_failure_threshold": "3",
        "RAY_health_check_period_ms": "1000",
    }
    address = f"http://127.0.0.1:{dashboard}"
    cluster = Nodes(Head(address, environment), f"127.0.0.1:{gcs}", root, environment)
    options = ["--head", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--num-cpus=0", "--dashboard-host=127.0.0.1"]
    options += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    try:
        head = cluster._start(options)
        cluster._wait(head, lambda: alive(cluster.head) == 1)
        for _ in range(workers):
            cluster.add(cpus)
        yield cluster
    finally:
        for node in reversed(cluster.nodes):
            node.lose()
        shutil.rmtree(root, ignore_errors=True)
