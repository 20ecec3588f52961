"""Figures to where people already watch them: TensorBoard, Weights & Biases or MLflow, chosen by one setting.

    with open_tracker("tensorboard:runs/tb", run="tiny") as tracker:
        tracker.log({"loss": 0.5}, step=10)

A setting is `tensorboard:FOLDER`, `wandb:PROJECT` or `mlflow:URI` (a server, or a file as in `mlflow:sqlite:///runs.db`).
The package behind it is imported when it is named, and only then. Knows nothing of what the figures mean.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping
from types import ModuleType, TracebackType
from typing import Any, Protocol, Self

from dualvla.errors import PlatformError, UsageError, did_you_mean

_NOT_IN_MLFLOW = re.compile(r"[^\w .:/-]")  # of a metric's name


class Tracker(Protocol):
    """Takes figures until it is closed; a context manager. Figures that are not finite are left out."""

    def log(self, figures: Mapping[str, float], step: int = 0) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_tracker(setting: str, run: str) -> Tracker:
    """The tracker that `setting` names, for figures of the run called `run`.

    Raises: UsageError for a setting that is none; PlatformError naming the package to install.
    """
    kind, sign, target = setting.partition(":")
    if kind not in _TRACKERS:
        raise UsageError(f"Unknown tracker '{kind}'.", did_you_mean(kind, _TRACKERS))
    if not sign or not target:
        raise UsageError(f"'{setting}' does not say where to.", f"write {kind}:{_WHERE[kind]}")
    return _TRACKERS[kind](target, run)


class _Tracker:
    """What all trackers share: closing, and dropping what none of them can draw."""

    def log(self, figures: Mapping[str, float], step: int = 0) -> None:
        finite = {name: float(value) for name, value in figures.items() if math.isfinite(value)}
        if finite:
            self._log(finite, step)

    def _log(self, figures: Mapping[str, float], step: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TensorBoard(_Tracker):
    """Event files in FOLDER/RUN."""

    def __init__(self, folder: str, run: str):
        module = _load("tensorboardX", "dualvla[track]")
        self._writer = module.SummaryWriter(f"{folder.rstrip('/')}/{run}")

    def _log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb(_Tracker):
    """A run of a Weights & Biases project; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, project: str, run: str):
        self._run = _load("wandb", "wandb").init(project=project, name=run, reinit="create_new")

    def _log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow(_Tracker):
    """A run of experiment "dualvla" at a tracking URI."""

    _EXPERIMENT = "dualvla"

    def __init__(self, uri: str, run: str):
        tracking = _load("mlflow.tracking", "mlflow")
        self._client = tracking.MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(self._EXPERIMENT)
        experiment: Any = found.experiment_id if found else self._client.create_experiment(self._EXPERIMENT)
        self._id = self._client.create_run(experiment, run_name=run).info.run_id

    def _log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._client.log_metric(self._id, _NOT_IN_MLFLOW.sub("_", name), value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


_TRACKERS: dict[str, type[TensorBoard] | type[Wandb] | type[MLflow]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
}
_WHERE = {"tensorboard": "FOLDER", "wandb": "PROJECT", "mlflow": "URI"}


def _load(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise  # the package is there, and lacks something of its own
        raise PlatformError(f"This tracker needs the package '{error.name}'.", f"pip install '{package}'") from error
