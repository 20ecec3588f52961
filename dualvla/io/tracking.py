"""Figures to where people already watch them: TensorBoard, Weights & Biases or MLflow, chosen by one setting.

    with open_tracker("tensorboard:runs/tb", run="tiny") as tracker:
        tracker.log({"loss": 0.5}, step=10)

A setting is `tensorboard:FOLDER`, `wandb:PROJECT` or `mlflow:URI` (a server, or a file as in `mlflow:sqlite:///runs.db`).
The package behind it is imported when it is named, and only then. Knows nothing of what the figures mean.
"""

from __future__ import annotations

import abc
import importlib
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol, Self

from dualvla.errors import PlatformError, UsageError, did_you_mean
from dualvla.io import storage

_NOT_IN_MLFLOW = re.compile(r"[^\w .:/-]")  # of a metric's name


class Tracker(Protocol):
    """Takes figures until it is closed; a context manager. Figures that are not finite are left out."""

    def log(self, figures: Mapping[str, float], step: int = 0) -> None: ...

    def flush(self) -> None:
        """What was logged so far can be seen."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_tracker(setting: str, run: str, first: int = 0) -> Tracker:
    """The tracker that `setting` names, for figures of the run called `run`.

    first: the step it goes on from; TensorBoard forgets later ones of an interrupted run, the others start a new run.
    Raises: UsageError for a setting that is none; PlatformError naming the package to install.
    """
    kind, target = _parse(setting)
    return _TRACKERS[kind](target, run, first)


def check_tracker(setting: str) -> None:
    """Raises what `open_tracker` would, without opening it."""
    kind, _ = _parse(setting)
    _load(*_PACKAGES[kind])


def _parse(setting: str) -> tuple[str, str]:
    kind, sign, target = setting.partition(":")
    if kind not in _TRACKERS:
        raise UsageError(f"Unknown tracker '{kind}'.", did_you_mean(kind, _TRACKERS))
    if not sign or not target:
        raise UsageError(f"'{setting}' does not say where to.", f"write {kind}:{_WHERE[kind]}")
    return kind, target


class _Tracker(abc.ABC):
    """What all trackers share: closing, and dropping what none of them can draw."""

    def log(self, figures: Mapping[str, float], step: int = 0) -> None:
        finite = {name: float(value) for name, value in figures.items() if math.isfinite(value)}
        if finite:
            self._log(finite, step)

    @abc.abstractmethod
    def _log(self, figures: Mapping[str, float], step: int) -> None: ...

    def flush(self) -> None:  # noqa: B027  # most have nothing to do
        pass

    @abc.abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TensorBoard(_Tracker):
    """Event files in FOLDER/RUN; for an object store they are written here, and copied at every `flush`."""

    def __init__(self, folder: str, run: str, first: int):
        module = _load(*_PACKAGES["tensorboard"])
        self._url = storage.join(folder, run)
        self._scratch = None if storage.is_local(folder) else tempfile.TemporaryDirectory(prefix="dualvla-")
        here = self._url if self._scratch is None else self._scratch.name
        # Its files are named by the second: one that goes on at once must not write over the one before.
        self._writer = module.SummaryWriter(here, purge_step=first or None, filename_suffix=f".{first}")

    def _log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()
        if self._scratch is not None:
            for file in Path(self._scratch.name).iterdir():
                storage.upload(file, storage.join(self._url, file.name))

    def close(self) -> None:
        self._writer.close()
        self.flush()
        if self._scratch is not None:
            self._scratch.cleanup()


class Wandb(_Tracker):
    """A run of a Weights & Biases project; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, project: str, run: str, first: int):
        self._run = _load(*_PACKAGES["wandb"]).init(project=project, name=run, reinit="create_new")

    def _log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow(_Tracker):
    """A run of experiment "dualvla" at a tracking URI."""

    _EXPERIMENT = "dualvla"

    def __init__(self, uri: str, run: str, first: int):
        tracking, refused = _load(*_PACKAGES["mlflow"]), _load("mlflow.exceptions", "dualvla[tracking]")
        try:
            self._client = tracking.MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(self._EXPERIMENT)
        except refused.MlflowException as error:
            raise UsageError(
                f"MLflow does not track at '{uri}': {error}.",
                "write mlflow:http://HOST:PORT of a server; mlflow:sqlite:///FILE needs the whole package mlflow, and "
                "mlflow:file:///FOLDER MLFLOW_ALLOW_FILE_STORE=true",
            ) from error
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
_PACKAGES = {  # module, and what to install
    "tensorboard": ("tensorboardX", "dualvla[track]"),
    "wandb": ("wandb", "dualvla[tracking]"),
    "mlflow": ("mlflow.tracking", "dualvla[tracking]"),
}
_WHERE = {"tensorboard": "FOLDER", "wandb": "PROJECT", "mlflow": "URI"}


def _load(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise  # the package is there, and lacks something of its own
        raise PlatformError(f"This tracker needs the package '{error.name}'.", f"pip install '{package}'") from error
