"""What training writes down: every step once, whatever trackers and stores do."""

import json
import math
import threading
import time

import pytest
from unit.test_tracking import scalars

from dualvla.errors import StorageError
from dualvla.io import storage
from dualvla_pipelines import record as recording
from dualvla_pipelines.record import Record, tracker_settings


def steps(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_record_holds_every_step_once_and_tensorboard_agrees(tmp_path):
    trackers = tracker_settings(None, str(tmp_path))
    with Record(str(tmp_path), 0, trackers, "tiny") as record:
        for step in range(1, 6):
            record.add({"step": step, "loss": 1.0 / step, "lr": 0.5})
    with Record(str(tmp_path), 3, trackers, "tiny") as record:  # steps 4 and 5 came after the resume state
        for step in range(4, 7):
            record.add({"step": step, "loss": 2.0 / step, "lr": 0.5})
    assert [line["step"] for line in steps(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] * line["step"] for line in steps(tmp_path)] == pytest.approx([1, 1, 1, 2, 2, 2])
    shown = scalars(tmp_path / "tensorboard" / "tiny")
    assert {step for name, step in shown if name == "loss"} == set(range(1, 7))
    assert ("step", 1) not in shown


def test_tensorboard_is_told_to_forget_the_steps_that_are_repeated(tmp_path):
    from tensorboardX.proto.event_pb2 import SessionLog
    from unit.test_tracking import events

    with Record(str(tmp_path), 3, tracker_settings(None, str(tmp_path)), "tiny") as record:
        record.add({"step": 4, "loss": 1.0})
    (folder,) = (tmp_path / "tensorboard").iterdir()
    starts = [e.step for e in events(folder) if e.session_log.status == SessionLog.SessionStatus.START]
    assert starts == [3]


def test_what_is_not_finite_is_left_out_so_that_every_line_is_json(tmp_path):
    with Record(str(tmp_path), 0, (), "tiny") as record:
        record.add({"step": 1, "loss": math.nan, "lr": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {"step": 1, "lr": 0.5}


class Slow:
    """A tracker that waits for the test; one that fails, if told to."""

    def __init__(self, fails=False):
        self.go, self.seen, self.closed, self.fails = threading.Event(), [], False, fails

    def log(self, figures, step):
        self.go.wait(30)
        if self.fails:
            raise ConnectionError("the server is down")
        self.seen.append((step, dict(figures)))

    def flush(self):
        pass

    def close(self):
        self.closed = True


def test_the_loop_waits_for_no_tracker_and_every_figure_arrives(tmp_path, monkeypatch):
    slow = Slow()
    monkeypatch.setattr(recording, "open_tracker", lambda *_: slow)
    with Record(str(tmp_path), 0, ("slow:x",), "tiny") as record:
        started = time.monotonic()
        for step in range(1, 51):
            record.add({"step": step, "loss": 1.0})
        assert time.monotonic() - started < 5.0
        assert slow.seen == []
        assert len(steps(tmp_path)) == 50
        slow.go.set()
    assert slow.seen == [(step, {"loss": 1.0}) for step in range(1, 51)]
    assert slow.closed


def test_a_tracker_that_lags_for_ever_costs_figures_not_memory(tmp_path, monkeypatch):
    slow = Slow()
    monkeypatch.setattr(recording, "open_tracker", lambda *_: slow)
    with Record(str(tmp_path), 0, ("slow:x",), "tiny") as record:
        for step in range(1, 1001):
            record.add({"step": step, "loss": 1.0})
        slow.go.set()
    assert 200 < len(slow.seen) < 300
    assert slow.closed
    assert len(steps(tmp_path)) == 1000


def test_a_tracker_that_fails_is_named_once_and_training_goes_on(tmp_path, monkeypatch, caplog):
    broken = Slow(fails=True)
    broken.go.set()
    monkeypatch.setattr(recording, "open_tracker", lambda *_: broken)
    with Record(str(tmp_path), 0, ("mlflow:http://x",), "tiny") as record:
        for step in range(1, 4):
            record.add({"step": step, "loss": 1.0})
    assert len(steps(tmp_path)) == 3
    (warning,) = caplog.records
    assert "'mlflow:http://x' lacks figures" in warning.getMessage()
    assert "the server is down" in warning.getMessage()


def test_in_an_object_store_lines_are_there_when_it_is_settled(monkeypatch):
    out = "memory://record/run"
    with Record(out, 0, (), "run") as record:
        record.add({"step": 1, "loss": 1.0})
        record.settle()
        assert len(storage.read_bytes(f"{out}/metrics.jsonl").splitlines()) == 1
        record.add({"step": 2, "loss": 1.0})
    assert len(storage.read_bytes(f"{out}/metrics.jsonl").splitlines()) == 2
    with Record(out, 1, (), "run") as record:
        record.add({"step": 2, "loss": 3.0})
        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_bytes", lambda *_: (_ for _ in ()).throw(StorageError("down")))
            with pytest.raises(StorageError):
                record.settle()
    assert json.loads(storage.read_bytes(f"{out}/metrics.jsonl").splitlines()[-1])["loss"] == 3.0


def test_no_tracker_can_be_asked_for(tmp_path):
    assert tracker_settings(["none"], "out") == ()
    assert tracker_settings(["wandb:p", "tensorboard:x"], "out") == ("wandb:p", "tensorboard:x")
    assert tracker_settings(None, "s3://bucket/run") == ("tensorboard:s3://bucket/run/tensorboard",)
