"""Sessions: what they remember, how long, for whom, and how they go on at another replica."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from serve.local_endpoint import LocalEndpoint, endpoint, listening
from serve_fakes import SPEC, CountingPolicy, example
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from dualvla.schema import Observation, PolicyReply
from dualvla.wire import messages
from dualvla.wire.openpi import pack, unpack
from dualvla.wire.options import SessionOptions
from dualvla_serve import chunks, sessions
from dualvla_serve.batching import LoadedPolicy
from dualvla_serve.models import ModelSource
from dualvla_serve.safety import Watch
from dualvla_serve.sessions import Lifetimes, Session

KEYS = {"one": "first-key-0123456789", "two": "second-key-0123456789"}


@contextlib.contextmanager
def talking(address: str, query: str = "", **headers: str) -> Iterator[tuple[ClientConnection, dict[str, Any]]]:
    with connect(f"ws://{address}/{query}", additional_headers=headers) as connection:
        yield connection, unpack(connection.recv(timeout=10))


def ask(connection: ClientConnection, step: int = 0, **changes: object) -> dict[str, Any]:
    connection.send(pack(messages.observation_to_wire(example(step)) | changes))
    answer = connection.recv(timeout=20)
    return unpack(answer) if isinstance(answer, bytes) else json.loads(answer)


def eventually(check: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def drop(connection: ClientConnection) -> None:
    """As when a network fails: no close frame is sent."""
    connection.socket.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[LocalEndpoint, LocalEndpoint]]:
    """Two replicas of one endpoint."""
    with endpoint(name="a") as a, endpoint(beside=a, name="b") as b:
        yield a, b


def test_a_dropped_session_goes_on_at_another_replica(pair: tuple[LocalEndpoint, LocalEndpoint]) -> None:
    a, b = pair
    with talking(a.address, "?session=arm-1") as (connection, greeting):
        assert greeting["session"] == {"id": "arm-1", "seq": 0, "resumed": False}
        for count in (1, 2):
            reply = ask(connection, id=f"x{count}")
            assert (reply["seq"], reply["actions"][0, 0]) == (count, count)
        drop(connection)
    with talking(b.address, "?session=arm-1&resume=2") as (connection, greeting):
        assert greeting["session"] == {"id": "arm-1", "seq": 2, "resumed": True}
        reply = ask(connection, id="x3")
        assert (reply["seq"], reply["actions"][0, 0]) == (3, 3)


def test_an_answer_that_was_lost_on_its_way_is_given_again_and_not_made_again(
    pair: tuple[LocalEndpoint, LocalEndpoint],
) -> None:
    a, b = pair
    with talking(a.address, "?session=arm-2") as (connection, _):
        ask(connection, id="x1")
        second = ask(connection, 5, id="x2")
        drop(connection)
    with talking(b.address, "?session=arm-2&resume=1") as (connection, greeting):  # it never saw the second answer
        assert greeting["session"] == {"id": "arm-2", "seq": 2, "resumed": True}
        again = ask(connection, 5, id="x2")
        np.testing.assert_array_equal(again.pop("actions"), second.pop("actions"))
        assert again == second
        assert ask(connection, id="x3")["actions"][0, 0] == 3
        assert ask(connection, id="x3")["actions"][0, 0] == 4  # the same id later on is a new question


@pytest.mark.parametrize("resume", ["7", "0"])
def test_a_session_that_is_not_the_clients_is_never_resumed(
    pair: tuple[LocalEndpoint, LocalEndpoint], resume: str
) -> None:
    """What the client saw last and what is known here do not agree: it starts clean, and is told."""
    a, b = pair
    name = f"arm-3-{resume}"
    with talking(a.address, f"?session={name}") as (connection, _):
        for i in range(3):
            ask(connection, id=str(i))
        drop(connection)
    with talking(b.address, f"?session={name}&resume={resume}") as (connection, greeting):
        assert greeting["session"] == {"id": name, "seq": 0, "resumed": False}
        assert ask(connection)["actions"][0, 0] == 1


def test_a_robot_that_went_to_another_replica_leaves_no_ghost(pair: tuple[LocalEndpoint, LocalEndpoint]) -> None:
    a, b = pair
    with talking(a.address, "?session=arm-4") as (ghost, _):
        ask(ghost, id="x")
        with talking(b.address, "?session=arm-4&resume=1") as (connection, _):
            assert ask(connection, id="y")["actions"][0, 0] == 2
            with pytest.raises(ConnectionClosed) as closed:
                ghost.recv(timeout=10)
            assert closed.value.rcvd.code == 4001
            assert ask(connection, id="z")["actions"][0, 0] == 3


def test_a_session_that_was_ended_on_purpose_is_forgotten(pair: tuple[LocalEndpoint, LocalEndpoint]) -> None:
    a, b = pair
    with talking(a.address, "?session=arm-5") as (connection, _):
        ask(connection, id="x")

    def forgotten() -> bool:
        with talking(b.address, "?session=arm-5&resume=1") as (_, greeting):
            return not greeting["session"]["resumed"]

    eventually(forgotten)


def test_a_session_over_http_goes_on_wherever_the_next_request_lands(
    pair: tuple[LocalEndpoint, LocalEndpoint],
) -> None:
    observation = example(3)
    body = {"images": {"main": observation.images["main"].tolist()}, "instruction": "go", "proprio": [0, 1, 2]}
    for count, running in enumerate((*pair, *pair), start=1):
        url = f"http://{running.address}/v1/infer?session=arm-6"
        request = urllib.request.Request(url, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=10) as answer:
            reply = json.load(answer)
        assert (reply["seq"], reply["actions"][0][0]) == (count, count)


def test_nobody_takes_over_the_session_of_another_key(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n".join(KEYS.values()))
    first, second = ({"Authorization": f"Bearer {key}"} for key in KEYS.values())
    with (
        listening(keys_file=str(tmp_path / "keys")) as address,
        talking(address, "?session=arm", **first) as (connection, _),
    ):
        ask(connection)
        with connect(f"ws://{address}/?session=arm&resume=1", additional_headers=second) as other:
            refusal = json.loads(other.recv(timeout=10))["error"]
            assert refusal["kind"] == "expired"
            assert "another key" in refusal["message"]
        assert ask(connection)["actions"][0, 0] == 2


def test_an_idle_session_ends_and_is_told_so() -> None:
    with listening(lifetimes=Lifetimes(idle_s=0.3)) as address, talking(address) as (connection, _):
        assert ask(connection)["seq"] == 1
        assert json.loads(connection.recv(timeout=5))["error"]["kind"] == "expired"
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(timeout=5)
        assert closed.value.rcvd.code == 4002


def test_a_session_has_a_longest_life() -> None:
    with listening(lifetimes=Lifetimes(longest_s=0.3)) as address, talking(address) as (connection, _):
        deadline = time.monotonic() + 5
        while "error" not in (reply := ask(connection)):
            assert time.monotonic() < deadline
        assert reply["error"]["kind"] == "expired"


def test_the_last_state_is_kept_for_as_long_as_a_session_may_be_idle() -> None:
    with endpoint(lifetimes=Lifetimes(idle_s=0.4)) as running:
        with talking(running.address, "?session=arm") as (connection, _):
            ask(connection, id="x")
            drop(connection)
        time.sleep(0.6)
        with talking(running.address, "?session=arm&resume=1") as (_, greeting):
            assert not greeting["session"]["resumed"]


def test_options_of_one_session_are_not_anothers() -> None:
    with listening() as address:
        with talking(address, "?gripper=closed11") as (closed, _), talking(address) as (plain, _):
            assert ask(closed)["actions"][0, 6] == 1  # our 0, closed
            assert ask(plain)["actions"][0, 6] == 0
        with connect(f"ws://{address}/?gripper=sideways") as refused:
            assert "open11" in json.loads(refused.recv(timeout=5))["error"]["message"]


class PlanningPolicy(CountingPolicy):
    """Plans step * 10 + k for the k-th action."""

    def _reply(self, observation: Observation, session: str, batch: int) -> PolicyReply:
        plan = np.zeros((SPEC.horizon, 7), np.float32)
        plan += (observation.step * 10 + np.arange(SPEC.horizon, dtype=np.float32))[:, None]
        return PolicyReply(plan, id=observation.id)


def load_planning() -> LoadedPolicy:
    return LoadedPolicy(PlanningPolicy(), example())


def test_ensembling_averages_what_was_planned_for_the_same_step() -> None:
    with listening(load_planning) as address, talking(address, "?ensemble=mean") as (connection, _):
        np.testing.assert_allclose(ask(connection, 0)["actions"][:, 0], [0, 1, 2])
        reply = ask(connection, 1)["actions"]
        np.testing.assert_allclose(reply[:, 0], [(10 + 1) / 2, (11 + 2) / 2, 12])
        np.testing.assert_allclose(reply[:, 6], [10, 11, 12])  # the gripper is the newest plan's
        np.testing.assert_allclose(ask(connection, 2)["actions"][:, 0], [(20 + 11 + 2) / 3, (21 + 12) / 2, 22])
        connection.send(pack(dict(messages.RESET)))
        connection.recv()
        np.testing.assert_allclose(ask(connection, 2)["actions"][:, 0], [20, 21, 22])


@settings(max_examples=100, deadline=None)
@given(
    starts=st.lists(st.integers(0, 6), max_size=4, unique=True),
    rate=st.floats(0, 5),
    data=st.data(),
)
def test_an_ensemble_lies_among_its_plans_and_is_the_plan_where_there_is_one(
    starts: list[int], rate: float, data: st.DataObject
) -> None:
    plan = hnp.arrays(np.float32, (4, 7), elements=st.floats(-1, 1, width=32))
    past = [(start, data.draw(plan)) for start in sorted(starts)]
    actions = data.draw(plan)
    out = chunks.ensemble(past, 7, actions, rate, SPEC.action_space)
    for k in range(4):
        votes = [actions[k], *(chunk[7 + k - start] for start, chunk in past if 0 <= 7 + k - start < 4)]
        assert (out[k] >= np.min(votes, axis=0) - 1e-6).all()
        assert (out[k] <= np.max(votes, axis=0) + 1e-6).all()
        assert out[k, 6] == actions[k, 6]


@given(opening=st.floats(0, 1, width=32))
def test_gripper_conventions_agree_on_open_and_closed(opening: float) -> None:
    action = np.zeros((1, 7), np.float32)
    action[0, 6] = opening
    told = {
        c: chunks.to_convention(action, c, SPEC.action_space)[0, 6]
        for c in ("open01", "closed01", "open11", "closed11")
    }
    assert told["open01"] == pytest.approx(1 - told["closed01"], abs=1e-6)
    assert told["open11"] == pytest.approx(2 * opening - 1, abs=1e-6)
    assert told["closed11"] == pytest.approx(-told["open11"], abs=1e-6)


@given(
    seq=st.integers(0, 10**6),
    last=st.none() | hnp.arrays(np.float32, 7, elements=st.floats(-1, 1, width=32)),
    starts=st.lists(st.integers(0, 99), max_size=3),
    seen=st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 99))),
)
def test_a_session_arrives_as_it_left(
    seq: int, last: np.ndarray | None, starts: list[int], seen: Mapping[str, tuple[int, int]]
) -> None:
    plans: Sequence[chunks.Chunk] = [(start, np.full((3, 7), start, np.float32)) for start in starts]
    session = Session(
        "arm", "k", SessionOptions(ensemble="mean"), "openpi", 5, seq, policy={"thought": {"ids": [1, 2], "step": 3}},
        version="v", chunks=list(plans), last_action=last, watch=Watch(seen, (0.5,)), last_id="x", last_reply=b"r",
    )  # fmt: skip
    arrived = sessions.load("arm", "k", 5, sessions.dump(session))
    assert arrived is not None
    for name in ("seq", "options", "policy", "version", "watch", "last_id", "last_reply", "protocol", "epoch"):
        assert getattr(arrived, name) == getattr(session, name)
    np.testing.assert_array_equal(arrived.last_action, last)
    assert [start for start, _ in arrived.chunks] == starts
    assert all((a[1] == b[1]).all() for a, b in zip(arrived.chunks, plans, strict=True))


@given(st.binary(max_size=200))
def test_a_damaged_state_is_a_fresh_start(data: bytes) -> None:
    assert sessions.load("arm", "k", 1, data) is None


def test_thoughts_of_one_checkpoint_are_not_given_to_another() -> None:
    with endpoint() as running, talking(running.address) as (connection, greeting):
        assert greeting["model"] == {"name": "policy", "version": "1"}
        assert [ask(connection)["actions"][0, 0] for _ in range(2)] == [1, 2]
        fresh = {"policy": ModelSource(lambda: LoadedPolicy(CountingPolicy(), example()), "2")}
        running.ask(running.replica.update(fresh))
        reply = ask(connection)
        assert reply["model"] == {"name": "policy", "version": "2"}
        assert (reply["actions"][0, 0], reply["seq"]) == (1, 3)
