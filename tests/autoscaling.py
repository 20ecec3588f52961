"""Ray's local autoscaling cluster, beside whatever other Ray this machine runs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import AutoscalingCluster
from ray.util import get_node_ip_address
from ray_head import TOKEN, free_ports


class OwnAutoscalingCluster(AutoscalingCluster):
    """Ray's, which stops every Ray of the machine when it starts and ends, with ports and processes of its own."""

    @classmethod
    def of_small_nodes(cls, most: int) -> OwnAutoscalingCluster:
        """A head and up to `most` nodes of one logical CPU each, which go after 6 s without work."""
        kind = {"resources": {"CPU": 1, "object_store_memory": 80_000_000}, "node_config": {}, "min_workers": 0}
        return cls({"CPU": 1}, {"cpu": {**kind, "max_workers": most}}, idle_timeout_minutes=0.1)

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
