"""Sweeps on clusters of several nodes: one that is taken away, and those that an autoscaler adds and removes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import AutoscalingCluster, Cluster
from ray.util import get_node_ip_address
from ray_head import TOKEN, free_ports

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


class OwnAutoscalingCluster(AutoscalingCluster):
    """Ray's, which stops every Ray of the machine when it starts and ends, with ports and processes of its own."""

    def _generate_config(self, head_resources: Any, worker_node_types: Any, **config: Any) -> dict[str, Any]:
        head = {"resources": head_resources, "node_config": {}, "max_workers": 0}
        return {
            "cluster_name": "fake_multinode",
            "max_workers": 8,
            "provider": {
                "type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True,
                "disable_launch_config_check": True, "gcs_address": "",
            },
            "available_node_types": {**worker_node_types, "ray.head.default": head},
            "head_node_type": "ray.head.default",
            "upscaling_speed": 1.0,
            "auth": {},
            **{name: [] for name in (
                "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
                "head_start_ray_commands", "worker_start_ray_commands", "rsync_exclude", "rsync_filter",
            )},
            "file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False,
            **config,
        }  # fmt: skip

    @contextlib.contextmanager
    def running(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Yields its address, and the environment of a process that may use it."""
        gcs, dashboard, client, agent = free_ports(4)
        folder = tempfile.mkdtemp(prefix="dva")  # short: Ray puts Unix sockets below it
        address = f"{get_node_ip_address()}:{gcs}"
        self._config["provider"]["gcs_address"] = address
        config = Path(folder, "autoscaling.json")
        config.write_text(json.dumps(self._config))
        options = {
            "port": gcs, "dashboard-port": dashboard, "ray-client-server-port": client, "temp-dir": folder,
            "dashboard-agent-listen-port": agent, "autoscaling-config": config, "object-store-memory": 100_000_000,
            "num-cpus": self._head_resources["CPU"], "include-dashboard": "false",
        }  # fmt: skip
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
        command += [f"--{name}={value}" for name, value in options.items()]
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
        fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        with Path(folder, "head.log").open("wb") as log:
            head = subprocess.Popen(command, env={**os.environ, **token, **fake}, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield address, token
        finally:
            below = psutil.Process(head.pid).children(recursive=True)
            head.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                head.wait(30)
            for process in [*below, head]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            shutil.rmtree(folder, ignore_errors=True)


def test_nodes_come_are_used_and_go(tmp_path: Path) -> None:
    kind = {"resources": {"CPU": 1, "object_store_memory": 80_000_000}, "node_config": {}, "min_workers": 0}
    cluster = OwnAutoscalingCluster({"CPU": 1}, {"cpu": {**kind, "max_workers": 3}}, idle_timeout_minutes=0.1)
    with cluster.running() as (address, env):
        found = told(start(tmp_path, address, 60, 4, 0.25, 1, env=env))
    assert (found["first"], found["most"], found["last"]) == (1, 4, 1)
    assert [episode for episode, *_ in found["outcomes"]] == list(range(60))
    assert {reason for _, reason, _ in found["outcomes"]} == {"success"}
    assert found["wall_s"] < 0.25 * sum(steps for *_, steps in found["outcomes"])  # they were of use
