"""The training loop on Ray Train workers: starts them, shows progress, starts again after a crash, ends on Ctrl-C.

Knows nothing of what the loop does but that it appends a line to `metrics.jsonl` at each step and goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.train import LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from dualvla import console
from dualvla.errors import DataError, DualVLAError, StorageError, TrainingError
from dualvla.io import storage
from dualvla.wire.teacher import SCHEMES
from dualvla_cluster.connect import connect
from dualvla_cluster.resources import reservation
from dualvla_pipelines import trainer
from dualvla_pipelines.record import METRICS
from dualvla_pipelines.teacher_actors import teaching
from dualvla_pipelines.trainer import TrainJob

log = logging.getLogger(__name__)

_MAX_RESTARTS = 2
_POLL_S = 0.25
_REMOTE_POLL_S = 5.0
_TAKEN = {"CPU": "num_cpus", "GPU": "num_gpus"}


def run(job: TrainJob, workers: int, gpus: float | None = None, teacher_actors: int = 0) -> None:
    """Runs the loop to its end. A worker that dies costs the steps since the last resume state.

    gpus: of each worker; None: one where the cluster has one for every worker, else none. teacher_actors: of each
    teacher that is a checkpoint; 0: workers hold them.

    Raises: what the loop raises on purpose; PlatformError if teachers cannot start; TrainingError for anything else.
    """
    connect()
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0.0) >= workers else 0.0
    if not teacher_actors:
        _survive(job, workers, gpus)
        return
    total, share = ray.cluster_resources(), _share(gpus)
    free = {kind: max(0.0, total.get(kind, 0.0) - workers * share[name]) for kind, name in _TAKEN.items()}
    folders = {domain: source for domain, source in job.teachers.items() if not source.startswith(SCHEMES)}
    bf16 = job.config.zero.dtype == "bf16"
    with teaching(folders, teacher_actors, bf16=bf16, cpus=free["CPU"], gpus=free["GPU"]) as names:
        _survive(dataclasses.replace(job, teacher_actors=names), workers, gpus)


def _survive(job: TrainJob, workers: int, gpus: float) -> None:
    """Again after a crash."""
    for restarts_left in reversed(range(_MAX_RESTARTS + 1)):
        try:
            _fit_with_progress(job, workers, gpus)
            return
        except TrainingFailedError as error:
            failures = list(getattr(error, "worker_failures", {}).values())
            for failure in failures:
                cause = getattr(failure, "_base_exc", failure)
                if isinstance(cause, DualVLAError):
                    raise cause from error
            # What a worker raised is wrapped; what is not wrapped is Ray's word that a worker is gone. The others
            # then raise too, because they lost their peer.
            crashed = any(not hasattr(failure, "_base_exc") for failure in failures)
            if not (crashed and restarts_left):
                for rank, failure in enumerate(failures):
                    log.error("worker %d: %s", rank, failure)  # with its traceback
                raise TrainingError(f"Training failed: {error}", "the log above says where") from error
            log.warning("a training worker died; going on from the last resume state")


def _fit_with_progress(job: TrainJob, workers: int, gpus: float) -> None:
    """Ray Train in a thread of its own (in the main one it would take over Ctrl-C), progress in this one."""
    ended: list[BaseException | None] = []

    def fit() -> None:
        try:
            _fit(job, workers, gpus)
            ended.append(None)
        except BaseException as error:  # noqa: BLE001  # raised below, in the thread that can handle it
            ended.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    try:
        _watch(thread, job)
    except KeyboardInterrupt:
        ray.shutdown()  # ends the workers now, whatever step they are in
        raise
    if ended[0] is not None:
        raise ended[0]


def _watch(thread: threading.Thread, job: TrainJob) -> None:
    lines, seen = (_LineCount(Path(job.out, METRICS)) if storage.is_local(job.out) else _RemoteLineCount(job.out)), 0
    with console.progress(f"train {job.stage}", job.last_step) as advance:
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_S)
            done = lines.now()
            if done != seen:
                advance(done - seen)
                console.tell("train", "samples", (done - seen) * job.config.batch_size)
                seen = done


class _LineCount:
    """The number of lines of a growing file. Reads only what is new, and all of it again when the file was replaced."""

    def __init__(self, path: Path):
        self._path = path
        self._inode = self._read = self._count = 0

    def now(self) -> int:
        if not self._path.exists():
            return 0
        with open(self._path, "rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._read, self._count = inode, 0, 0
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        self._count += new.count(b"\n")
        return self._count


class _RemoteLineCount:
    """The same in an object store, asked now and then; while it does not answer, the last number."""

    def __init__(self, out: str):
        self._url = storage.join(out, METRICS)
        self._asked_s, self._count = -math.inf, 0

    def now(self) -> int:
        if time.monotonic() - self._asked_s > _REMOTE_POLL_S:
            with contextlib.suppress(DataError, StorageError):
                self._count = storage.read_bytes(self._url).count(b"\n")
            self._asked_s = time.monotonic()
        return self._count


def _fit(job: TrainJob, workers: int, gpus: float) -> None:
    share = _share(gpus)
    resources = {"CPU": share["num_cpus"], "GPU": share["num_gpus"], "memory": share.get("memory", 0.0)}
    resources = {name: amount for name, amount in resources.items() if amount}
    _Trainer(
        trainer.train,
        train_loop_config=job,
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpus > 0,
            resources_per_worker=resources,
            placement_strategy=share.get("scheduling_strategy", "PACK"),
        ),
        run_config=RunConfig(
            storage_path=_ray_folder(job),
            name=job.stage,
            logging_config=LoggingConfig(log_level="CRITICAL"),  # errors are raised, and shown once
        ),
    ).fit()


def _share(gpus: float) -> dict[str, Any]:
    # Fractional logical CPUs: with whole ones, as many workers as cores starve all else and hang without an error.
    return reservation("train", cpus=0.5, gpus=gpus)


def _ray_folder(job: TrainJob) -> str:
    """Ray Train wants a folder for checkpoints, of which we give it none: nothing but a marker comes to lie there."""
    if storage.is_local(job.out):
        return os.path.join(job.out, "resume", "ray")
    return os.path.join(tempfile.gettempdir(), "dualvla-ray-train")


class _Trainer(TorchTrainer):
    """Without the actor that watches over the controller: it asks a dashboard that a private cluster does not have,
    and complains every second."""

    def _create_default_callbacks(self) -> list:
        callbacks = super()._create_default_callbacks()
        return [c for c in callbacks if not isinstance(c, PlacementGroupCleanerCallback)]
