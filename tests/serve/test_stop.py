"""The emergency stop: in force at once and everywhere, through restarts and failures; and holds for who asks."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve.local_endpoint import LocalEndpoint, endpoint
from serve.test_sessions import ask, eventually, talking
from serve_fakes import example

from dualvla.errors import OutputError, ServerError, StoppedError
from dualvla.wire import messages
from dualvla.wire.openpi import pack
from dualvla_serve.estop import Latch, StopState, StopView
from dualvla_serve.hub import Hub, News, Report, Saved

ADMIN, INFER = "admin-key-0123456789", "infer-key-0123456789"


def post(address: str, path: str, key: str = "", **body: str) -> tuple[int, dict[str, Any]]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"http://{address}{path}", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def kind(answer: Mapping[str, Any]) -> str:
    return answer["error"]["kind"] if "error" in answer else "ok"


def test_a_stop_holds_at_every_replica_until_an_admin_clears_it(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{INFER}\n{ADMIN} admin\n")
    options: dict[str, Any] = {"keys_file": str(tmp_path / "keys"), "state_dir": str(tmp_path / "state")}
    key = {"Authorization": f"Bearer {INFER}"}
    with (
        endpoint(name="a", **options) as a,
        endpoint(beside=a, name="b", **options) as b,
        talking(a.address, **key) as (first, _),
        talking(b.address, **key) as (second, _),
    ):
        assert kind(ask(first)) == kind(ask(second)) == "ok"
        assert post(a.address, "/v1/admin/stop", INFER, reason="smoke")[0] == 200  # whoever may act may stop
        assert kind(ask(first)) == "stopped"
        eventually(lambda: kind(ask(second)) == "stopped", 2)
        assert "smoke" in ask(second)["error"]["message"]
        assert post(b.address, "/v1/admin/clear", INFER, reason="?")[0] == 401
        assert kind(ask(first)) == "stopped"
        assert post(b.address, "/v1/admin/clear", ADMIN, reason="checked")[0] == 200
        assert kind(ask(second)) == "ok"
        eventually(lambda: kind(ask(first)) == "ok", 2)


def test_a_stop_survives_a_restart(tmp_path: Path) -> None:
    state = {"state_dir": str(tmp_path)}
    with endpoint(**state) as running:
        assert post(running.address, "/v1/admin/stop", reason="night")[0] == 200
    with endpoint(**state) as again, talking(again.address) as (connection, _):
        eventually(lambda: "night" in ask(connection)["error"]["message"])
        post(again.address, "/v1/admin/clear")
    with endpoint(**state) as third, talking(third.address) as (connection, _):
        eventually(lambda: kind(ask(connection)) == "ok")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"stopped": "no"}', b'{"stoped": false}', b"\xff"])
def test_a_state_that_cannot_be_read_is_a_stop(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "stop").write_bytes(content)
    assert Latch(str(tmp_path / "stop")).state.stopped


def test_a_clearance_that_cannot_be_written_clears_nothing(tmp_path: Path) -> None:
    latch = Latch(str(tmp_path / "folder" / "stop"))
    latch.stop("fire", "")
    (tmp_path / "folder" / "stop").unlink()
    (tmp_path / "folder").rmdir()
    (tmp_path / "folder").write_text("a file now")
    with pytest.raises(OutputError, match="folder"):
        latch.clear("", "")
    assert latch.state.stopped


def test_a_stop_that_cannot_be_written_stops_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    latch = Latch(str(tmp_path / "file" / "stop"))
    with pytest.raises(OutputError, match="file"):
        latch.stop("fire", "")
    assert latch.state.stopped


def test_what_is_not_confirmed_is_a_stop() -> None:
    now = [100.0]
    view = StopView(5.0, lambda: now[0])
    with pytest.raises(StoppedError, match="not known"):
        view.check()
    view.confirm(StopState(False, version=3))
    view.check()
    now[0] += 5.1
    with pytest.raises(StoppedError, match="not be confirmed"):
        view.check()
    view.confirm(StopState(True, "late news", version=2))  # older than what is known
    now[0] -= 5.1
    view.check()
    view.confirm(StopState(False, version=3))
    now[0] += 4.9
    view.check()


class DeafHub(Hub):
    """Stops answering when told to."""

    deaf = False

    async def exchange(self, replica: str, report: Report | None, version: int, wait_s: float) -> News:
        if self.deaf:
            raise ServerError("The hub does not answer.")
        return await super().exchange(replica, report, version, wait_s)

    async def save(self, states: Sequence[Saved]) -> None:
        if self.deaf:
            raise ServerError("The hub does not answer.")
        await super().save(states)


def test_a_replica_that_cannot_hear_the_hub_stops_and_goes_on_when_it_can() -> None:
    running = endpoint(max_silence_s=0.6)
    running.link = hub = DeafHub(Latch(None), 60.0)
    with running, talking(running.address) as (connection, _):
        assert kind(ask(connection)) == "ok"
        hub.deaf = True
        eventually(lambda: kind(ask(connection)) == "stopped", 5)
        hub.deaf = False
        eventually(lambda: kind(ask(connection)) == "ok", 5)


def test_who_asked_for_holds_gets_one_with_every_fault() -> None:
    with endpoint() as running, talking(running.address, "?on_fault=hold&session=arm") as (connection, _):
        post(running.address, "/v1/admin/stop", reason="smoke")
        assert kind(ask(connection)) == "stopped"  # before the first action nobody knows what the gripper does
        post(running.address, "/v1/admin/clear")
        moving = ask(connection, 9, id="a")["actions"]
        assert moving[:, :3].any()
        post(running.address, "/v1/admin/stop", reason="smoke")
        reply = ask(connection, id="b")
        assert reply["fault"]["kind"] == "stopped"
        assert not reply["actions"][:, :6].any()
        assert (reply["actions"][:, 6] == moving[0, 6]).all()
        assert (reply["id"], reply["seq"], reply["reasoning"]) == ("b", 1, None)
        post(running.address, "/v1/admin/clear")
        for cause, changes in (
            ("failed", {"prompt": "nan"}),
            ("failed", {"prompt": "raise"}),
            ("late", {"prompt": "slow", "deadline_ms": 20.0}),
            ("bad_request", {"images/main": np.zeros((2, 2, 3), np.uint8)}),
        ):
            reply = ask(connection, **changes)
            assert reply["fault"]["kind"] == cause
            assert not reply["actions"][:, :6].any()
        assert "fault" not in ask(connection)


def test_stale_and_frozen_observations_are_refused_counted_and_logged(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    robot = tmp_path / "robot.json"
    robot.write_text(json.dumps({"max_age_ms": 2000, "frozen_after": 10}))
    with endpoint(embodiment=str(robot)) as running, talking(running.address, "?session=arm") as (connection, _):
        assert kind(ask(connection, age_ms=5000.0, id="old")) == "unsafe"
        for i in range(12):
            pose = {"observation/ee_pose": np.array([0.01 * i, 0, 0, 0, 0, 0])}
            answer = ask(connection, 3, id=f"still-{i}", **pose)
        assert kind(answer) == "unsafe"
        assert "'main'" in answer["error"]["message"]
        assert kind(ask(connection, 4, **pose)) == "ok"
        metrics = running.replica.metrics.page()
    for intervention, number in (("stale", 1.0), ("frozen", 2.0)):
        line = f'dualvla_serve_interventions_total{{kind="{intervention}"}} {number}'
        assert line in metrics, intervention
    logged = {(r.intervention, r.observation) for r in caplog.records if hasattr(r, "intervention")}
    assert {("stale", "old"), ("frozen", "still-11")} <= logged


def test_actions_beyond_the_robots_limits_are_cut_and_said_so() -> None:
    with endpoint(embodiment="widowx") as running, talking(running.address) as (connection, _):
        reply = ask(connection, 9)  # its mean pixel, 9, would be 9 metres
        assert np.linalg.norm(reply["actions"][:, :3], axis=1).max() <= 0.05 + 1e-6
        assert reply["interventions"] == ["range"]
        metrics = running.replica.metrics.page()
    assert 'dualvla_serve_interventions_total{kind="range"} 1.0' in metrics


def test_a_stop_while_the_policy_works_keeps_its_actions_back() -> None:
    with endpoint() as running, talking(running.address) as (connection, _):
        connection.send(messages_of("slow"))
        eventually(lambda: busy(running))
        post(running.address, "/v1/admin/stop", reason="smoke")
        assert "stopped" in connection.recv(timeout=10)


def messages_of(instruction: str) -> bytes:
    return pack(messages.observation_to_wire(example(instruction=instruction)))


def busy(running: LocalEndpoint) -> bool:
    return not running.replica.models.get("").runner.idle


def test_a_stop_that_nobody_else_hears_of_holds_where_it_was_given() -> None:
    class Dead(DeafHub):
        async def stop(self, reason: str, by: str) -> StopState:
            raise ServerError("The hub does not answer.")

    running = endpoint()
    running.link = Dead(Latch(None), 60.0)
    with running, talking(running.address) as (connection, _):
        assert kind(ask(connection)) == "ok"
        assert post(running.address, "/v1/admin/stop", reason="smoke")[0] == 503
        assert "smoke" in ask(connection)["error"]["message"]
        post(running.address, "/v1/admin/clear")
        eventually(lambda: kind(ask(connection)) == "ok", 5)


def test_a_latch_that_lost_its_memory_is_a_stop_newer_than_all_before(tmp_path: Path) -> None:
    before = Latch(None)
    old = before.stop("fire", "")
    view = StopView(5.0)
    view.confirm(old)
    after = Latch(None, restarted=True)
    assert after.state.stopped
    view.confirm(after.state)
    view.confirm(after.clear("checked", ""))
    view.check()
    assert not Latch(str(tmp_path / "stop"), restarted=True).state.stopped  # its file would have told
