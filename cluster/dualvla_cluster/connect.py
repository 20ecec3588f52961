"""Joining the Ray cluster a command should use: the one named by RAY_ADDRESS, else a private one on this machine."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray

from dualvla.errors import PlatformError
from dualvla_cluster import metrics, secrets

# With OpenMP's and llvmpipe's default of one thread a core, workers that share two cores run many times slower.
_WORKER_ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "LP_NUM_THREADS": "1"}


def connect(num_cpus: int | None = None) -> None:
    """Connects once. On a cluster that was there before, each call also looks for nodes whose disk is full.

    num_cpus: logical CPUs of a private cluster (default: all of this machine's, at least 2).
    Raises: PlatformError if RAY_ADDRESS names a cluster that does not answer.
    """
    address = os.environ.get("RAY_ADDRESS", "local")
    if not ray.is_initialized():
        _join(address, num_cpus)
    if address != "local" and (dashboard := ray._private.worker.get_dashboard_url()):
        from dualvla_cluster import full_disks  # seconds of imports that a private cluster does not need

        full_disks.drain(dashboard)


def _join(address: str, num_cpus: int | None) -> None:
    runtime_env: dict[str, Any] = {"env_vars": {n: os.environ.get(n, value) for n, value in _WORKER_ENV.items()}}
    if secrets.VARIABLE in os.environ:  # of a submitted job
        runtime_env["worker_process_setup_hook"] = secrets.HOOK
    try:
        if address == "local":
            ray.init(
                address="local",
                num_cpus=num_cpus or max(2, os.cpu_count() or 2),
                include_dashboard=False,
                logging_level=logging.WARNING,
                log_to_driver=True,
                runtime_env=runtime_env,
            )
        else:
            ray.init(address=address, logging_level=logging.WARNING, runtime_env=runtime_env)
            metrics.export()
    except (ConnectionError, ValueError) as error:
        raise PlatformError(
            f"No Ray cluster answers at '{address}': {error}.",
            "start one with `ray start --head`, or unset RAY_ADDRESS",
        ) from error
