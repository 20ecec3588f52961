"""Trackers: what is logged is read back from real files, and what is missing or misspelt is named."""

import math
import struct
import time

import pytest

from dualvla.errors import PlatformError, UsageError
from dualvla.io import tracking
from dualvla.io.tracking import check_tracker, open_tracker


def events(folder):
    """The events of a TensorBoard folder's files, read by their format: framed protobufs."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.glob("events.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + size])  # between the checksums of length and content
            at += 16 + size


def scalars(folder):
    """{(name, step): value} of a TensorBoard folder."""
    return {(value.tag, event.step): value.simple_value for event in events(folder) for value in event.summary.value}


def test_tensorboard_holds_every_figure_at_its_step(tmp_path):
    with open_tracker(f"tensorboard:{tmp_path}", "tiny") as tracker:
        tracker.log({"train/loss": 0.5, "R": 79.0}, step=10)
        tracker.log({"train/loss": 0.25}, step=20)
    assert scalars(tmp_path / "tiny") == {("train/loss", 10): 0.5, ("R", 10): 79.0, ("train/loss", 20): 0.25}


def test_what_is_not_finite_is_left_out(tmp_path):
    with open_tracker(f"tensorboard:{tmp_path}", "tiny") as tracker:
        tracker.log({"a": math.nan, "b": math.inf, "c": 1.0})
    assert scalars(tmp_path / "tiny") == {("c", 0): 1.0}


def test_mlflow_reads_back_what_was_logged_even_under_names_it_refuses(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow.tracking", reason="mlflow is not installed: pip install 'dualvla[tracking]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the one store that needs neither server nor database
    uri = f"file://{tmp_path}/runs"
    with open_tracker(f"mlflow:{uri}", "tiny") as tracker:
        tracker.log({"success/specialist+blank": 5.0, "loss": math.nan}, step=3)
        tracker.log({"success/specialist+blank": 6.0}, step=4)
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("dualvla").experiment_id])
    assert (run.info.run_name, run.info.status) == ("tiny", "FINISHED")
    metrics = client.get_metric_history(run.info.run_id, "success/specialist_blank")
    assert [(metric.step, metric.value) for metric in metrics] == [(3, 5.0), (4, 6.0)]
    with pytest.raises(UsageError, match=r"MLflow does not track at 'gopher://x'.*server"):
        open_tracker("mlflow:gopher://x", "tiny")


def test_wandb_keeps_an_offline_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'dualvla[tracking]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with open_tracker("wandb:dualvla", "tiny") as tracker:
        tracker.log({"train/loss": 0.5}, step=10)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30  # another process writes it
    while b"train/loss" not in file.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_tracker_that_is_not_installed_names_its_package(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name=name.split(".")[0])

    monkeypatch.setattr(tracking.importlib, "import_module", missing)
    for setting, package in (("tensorboard:x", r"track"), ("wandb:x", "tracking"), ("mlflow:x", "tracking")):
        for use in (lambda s=setting: open_tracker(s, "tiny"), lambda s=setting: check_tracker(s)):
            with pytest.raises(PlatformError, match=rf"pip install 'dualvla\[{package}\]'"):
                use()


@pytest.mark.parametrize(
    ("setting", "fix"), [("tensorbord:x", "did you mean 'tensorboard'"), ("wandb", "write wandb:PROJECT")]
)
def test_a_setting_that_is_none_is_explained(setting, fix):
    with pytest.raises(UsageError, match=fix):
        open_tracker(setting, "tiny")


def test_in_an_object_store_the_files_are_copied_when_they_are_flushed(tmp_path):
    from dualvla.io import storage

    folder = "memory://tracked/tb"
    with open_tracker(f"tensorboard:{folder}", "tiny") as tracker:
        tracker.log({"loss": 0.5}, step=1)
        tracker.flush()
        (file,) = storage.list_files(f"{folder}/tiny")
        first = storage.size_bytes(file)
        tracker.log({"loss": 0.25}, step=2)
    (file,) = storage.list_files(f"{folder}/tiny")
    assert storage.size_bytes(file) > first > 0
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / file.rsplit("/", 1)[-1]).write_bytes(storage.read_bytes(file))
    assert scalars(tmp_path / "tiny") == {("loss", 1): 0.5, ("loss", 2): 0.25}
