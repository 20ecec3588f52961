"""What operators see: metrics, sessions, frames; and what is written down of what robots did."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve.local_endpoint import endpoint
from serve.test_sessions import ask, drop, eventually, talking
from websockets.sync.client import connect

from dualvla.io import dataset
from dualvla.wire import messages
from dualvla.wire.openpi import pack
from dualvla_serve import metrics, recording
from dualvla_serve.scaling import wanted


def get(address: str, path: str) -> tuple[int, bytes, Message]:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
        return answer.status, answer.read(), answer.headers


def samples(page: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(page.decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_every_request_is_counted_and_timed_at_the_replica_that_answered_it() -> None:
    with endpoint(name="a") as a, endpoint(beside=a, name="b") as b, talking(a.address) as (connection, _):
        for _ in range(3):
            ask(connection)
        ask(connection, prompt="raise")
        with talking(b.address) as (other, _):
            ask(other)
        page: dict[Any, float] = {}

        def all_reported() -> bool:
            page.update(samples(get(a.address, "/metrics")[1]))
            answered = (
                "dualvla_serve_requests_total",
                (("outcome", "ok"), ("protocol", "openpi"), ("replica", "b")),
            )
            return page.get(answered) == 1

        eventually(all_reported)

    def value(name: str, **labels: str) -> float:
        return page[f"dualvla_serve_{name}", tuple(sorted(labels.items()))]

    assert value("requests_total", protocol="openpi", outcome="ok", replica="a") == 3
    assert value("requests_total", protocol="openpi", outcome="failed", replica="a") == 1
    for stage in metrics.STAGES:
        assert value("request_seconds_count", stage=stage, replica="a") == 3
    assert value("connections", replica="a") == 1
    assert value("emergency_stop", replica="a") == 0
    assert value("model_info", model="policy", version="1", replica="b") == 1


def test_latencies_of_all_replicas_add_up() -> None:
    with endpoint() as running, talking(running.address) as (connection, _):
        for _ in range(4):
            ask(connection)
        stages = json.loads(get(running.address, "/v1/admin/latency")[1])["stages"]
    assert set(stages) == set(metrics.STAGES)
    assert stages["total"]["counts"][-1] == 4
    assert stages["total"]["counts"] == sorted(stages["total"]["counts"])


def test_live_sessions_and_the_last_frame_of_one_can_be_looked_at() -> None:
    with endpoint() as running, talking(running.address, "?session=arm") as (connection, _):
        ask(connection, 7)
        (line,) = json.loads(get(running.address, "/v1/admin/sessions")[1])["sessions"]
        assert (line["id"], line["seq"], line["instruction"], line["reasoning"]) == ("arm", 1, "go", "go at 7")

        def shown() -> bool:
            ask(connection, 9)
            status, body, headers = get(running.address, "/v1/admin/sessions/arm/frame")
            if status == 202:
                return False
            assert headers["Content-Type"] == "image/png"
            assert (dataset.decode_image(body) == 9).all()
            assert headers["X-Reasoning"] == "go%20at%209"
            return True

        eventually(shown)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(running.address, "/v1/admin/sessions/nobody/frame")
    assert not running.replica.listing()


def test_ready_only_once_the_policy_answers() -> None:
    with endpoint() as running:
        assert get(running.address, "/readyz")[1] == b"OK"
        running.replica.ready = False
        for path in ("/readyz", "/v1/spec", "/health"):
            with pytest.raises(urllib.error.HTTPError, match="503"):
                get(running.address, path)
        assert get(running.address, "/healthz")[1] == b"OK"


def test_who_comes_before_the_policy_is_there_is_asked_to_come_again() -> None:
    with endpoint() as running:
        running.ask(running.replica.update({}))
        with connect(f"ws://{running.address}") as connection:
            assert json.loads(connection.recv(timeout=5))["error"]["kind"] == "unavailable"


def test_sessions_become_a_data_set(tmp_path: Path) -> None:
    with endpoint(record=str(tmp_path / "rec"), name="r1") as running:
        with talking(running.address, "?session=arm-1&gripper=closed11") as (connection, _):
            for step in range(3):
                ask(connection, step)
            connection.send(pack(dict(messages.RESET)))
            connection.recv()
            ask(connection, 5, **{"observation/ee_pose": np.arange(6.0)})
            ask(connection, prompt="raise")
            drop(connection)
        with talking(running.address, "?session=arm-2") as (connection, _):
            ask(connection, 8)
    found = dataset.open_dataset(str(tmp_path / "rec" / "r1"))
    rows = found.read().to_pylist()
    episodes: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        episodes.setdefault(row["episode_id"], []).append(row)
    assert sorted(len(steps) for steps in episodes.values()) == [1, 1, 3]
    assert found.manifest["rows_out"] == 5
    (long,) = [steps for steps in episodes.values() if len(steps) == 3]
    assert [row["step"] for row in long] == [0, 1, 2]
    for step, row in enumerate(long):
        image = dict(row["images"])["main"]
        assert (dataset.decode_image(image) == step).all()
        assert row["action"][:2] == [step + 1, step]
        assert row["action"][6] == 0  # in our own convention, whatever the robot's
        assert (row["reasoning"], row["instruction"], row["control_hz"]) == (f"go at {step}", "go", 5.0)
        assert row["timestamp_s"] >= 0
    (posed,) = [row for row in rows if row["ee_pose"] is not None]
    assert posed["ee_pose"] == list(range(6))


def test_a_recording_that_cannot_keep_up_is_counted_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "_MOST_WAITING", 1)
    monkeypatch.setattr(dataset, "encode_png", slow_encoder)
    with endpoint(record=str(tmp_path)) as running, talking(running.address) as (connection, _):
        for _ in range(10):
            assert "actions" in ask(connection)
        page = samples(running.replica.metrics.page().encode())
        assert page["dualvla_serve_recording_dropped_total", ()] >= 5


def slow_encoder(image: np.ndarray) -> bytes:
    time.sleep(0.1)
    return b""


def test_replicas_follow_the_queue() -> None:
    assert [wanted(queued, 8.0) for queued in (0, 8, 9, 64.5)] == [1, 1, 2, 9]
