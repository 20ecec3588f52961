"""The client against an endpoint that misbehaves on purpose: what goes over the wire, and what a robot gets to see."""

import asyncio
import contextlib
import importlib.util
import io
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from serve.scripted_endpoint import Connection, obedient, scripted
from serve_fakes import SPEC, example

from dualvla.client import AsyncPolicyClient, ClientOptions, PolicyClient
from dualvla.errors import LateError, PlatformError, ServerError, SessionLostError, StoppedError, UsageError, WireError
from dualvla.wire import messages
from dualvla.wire.openpi import WireLimits

FAST = ClientOptions(first_pause_s=0.01, attempts=4)


@contextlib.contextmanager
def client_of(url: str, options: ClientOptions = FAST, **more: object) -> Iterator[PolicyClient]:
    with PolicyClient(url, session="arm", options=options, **more) as client:
        yield client


def test_asyncio_and_threads_say_and_get_the_same() -> None:
    async def ask(url: str) -> tuple[object, dict[str, object]]:
        async with AsyncPolicyClient(url, session="arm") as client:
            return await client.spec(), await client.infer(example(7, id="x"))

    with scripted(obedient) as (url, connections):
        theirs = asyncio.run(ask(url))
        with client_of(url) as client:
            ours = client.spec, client.infer(example(7, id="x"))
    assert ours[0] == theirs[0] == SPEC
    for reply in (ours[1], theirs[1]):
        assert (reply["id"], reply["seq"], reply["fault"], reply["interventions"]) == ("x", 1, None, [])
        assert reply["actions"].tolist() == [[7.0] * 7] * 3
        assert reply["round_trip_ms"] > 0
    first, second = (str(connection.received) for connection in connections)
    assert first == second


def test_a_dropped_connection_goes_on_with_its_session_and_asks_again() -> None:
    def drops(connection: Connection) -> None:
        connection.greet()
        connection.answer(connection.receive(), seq=1)
        connection.receive()
        connection.drop()

    def resumes(connection: Connection) -> None:
        connection.greet(resumed=True)
        connection.answer(connection.receive(), seq=2)
        assert connection.wait_closed() == 1000

    with scripted(drops, resumes) as (url, connections), client_of(url + "/?reasoning=never") as client:
        client.infer(example(1, id="a"))
        assert client.infer(example(2, id="b"))["seq"] == 2
    assert [c.session for c in connections] == ["arm", "arm"]
    assert [c.path for c in connections] == ["/?reasoning=never", "/?reasoning=never&resume=1"]
    assert str(connections[0].received[1]) == str(connections[1].received[0])


def test_a_session_that_the_server_lost_begins_anew_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def drops(connection: Connection) -> None:
        connection.greet()
        connection.answer(connection.receive())
        connection.drop()

    with scripted(drops, obedient, obedient) as (url, connections), client_of(url) as client:
        for step in range(3):
            assert client.infer(example(step))["actions"][0, 0] == step
    assert "begins anew" in caplog.text
    assert len(connections) == 2


def test_a_deliberate_end_is_no_drop() -> None:
    with scripted(obedient) as (url, connections):
        client = PolicyClient(url)
        for _ in range(2):
            client.infer(example())
            client.close()
    assert [c.path for c in connections] == ["/", "/"]
    assert connections[0].session == connections[1].session == client.session
    assert [c.socket.protocol.close_code for c in connections] == [1000, 1000]


def test_a_missed_deadline_costs_neither_the_connection_nor_the_next_answer() -> None:
    given_up = threading.Event()

    def late(connection: Connection) -> None:
        connection.greet()
        waiting = [connection.receive()]
        given_up.wait(20)
        waiting.append(connection.receive())
        for message in waiting:
            connection.answer(message)
        connection.answer(connection.receive())

    with scripted(late) as (url, connections), client_of(url) as client:
        assert client.spec
        with pytest.raises(LateError, match=r"within 0\.05 s"):
            client.infer(example(1), deadline_s=0.05)
        given_up.set()
        assert [client.infer(example(step))["actions"][0, 0] for step in (2, 3)] == [2, 3]
    assert len(connections) == 1
    assert connections[0].received[0]["deadline_ms"] == 50


def test_a_connection_that_stays_silent_is_opened_anew() -> None:
    def silent(connection: Connection) -> None:
        connection.greet()
        connection.receive()
        connection.wait_closed()

    options = ClientOptions(reply_timeout_s=0.2, first_pause_s=0.01)
    with scripted(silent, silent, obedient) as (url, connections), client_of(url, options) as client:
        with pytest.raises(ServerError, match=r"No answer from .* in 0.2 s"):
            client.infer(example())
        with pytest.raises(LateError):
            client.infer(example(), deadline_s=0.05)
        deadline = time.monotonic() + 10
        while len(connections) < 3:
            with contextlib.suppress(ServerError):
                client.infer(example(), deadline_s=0.1)
            assert time.monotonic() < deadline
        assert client.infer(example(5))["actions"][0, 0] == 5


def test_a_robot_does_not_fight_for_a_session_that_another_took() -> None:
    def taken(connection: Connection) -> None:
        connection.greet()
        connection.receive()
        connection.socket.close(4001)

    with scripted(taken, obedient) as (url, connections), client_of(url) as client:
        with pytest.raises(SessionLostError, match="Another connection took session 'arm'"):
            client.infer(example())
        assert len(connections) == 1


def test_anothers_answer_is_never_taken() -> None:
    def swaps(connection: Connection) -> None:
        connection.greet()
        connection.answer(connection.receive(), id="someone else's")

    with scripted(swaps) as (url, _), client_of(url) as client, pytest.raises(ServerError, match="someone else's"):
        client.infer(example(id="mine"))


@pytest.mark.parametrize(
    ("kind", "error"),
    [("bad_request", WireError), ("stopped", StoppedError), ("late", LateError), ("failed", ServerError)],
)
def test_an_error_is_typed_and_the_connection_lives_on(kind: str, error: type[Exception]) -> None:
    def fails(connection: Connection) -> None:
        connection.greet()
        connection.receive()
        connection.socket.send(messages.Failure(kind, "abc123", "told shortly").to_json())
        connection.answer(connection.receive())

    with scripted(fails) as (url, connections), client_of(url) as client:
        with pytest.raises(error, match=r"told shortly.*abc123"):
            client.infer(example())
        assert client.infer(example(3))["actions"][0, 0] == 3
    assert len(connections) == 1


def test_nonsense_from_the_server_is_an_error_of_ours_not_a_crash() -> None:
    def nonsense(connection: Connection) -> None:
        connection.greet()
        for answer in (b"\xc1", b"\x01", "no json", '{"error": 1}'):
            connection.receive()
            connection.socket.send(answer)

    with scripted(nonsense) as (url, _), client_of(url) as client:
        for error in (WireError, WireError, ServerError, ServerError):
            with pytest.raises(error):
                client.infer(example())


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg"])
def test_images_travel_as_chosen(encoding: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    image[:8] = 200
    observation = example()
    observation.images["main"][:] = image
    with scripted(obedient) as (url, connections), client_of(url, ClientOptions(images=encoding)) as client:
        client.infer(observation)
    sent = connections[0].received[0]["images/main"]
    if encoding == "raw":
        np.testing.assert_array_equal(sent, image)
        return
    assert (sent["__image__"], sent["format"], sent["shape"]) == (True, encoding, [16, 24, 3])
    seen = np.asarray(Image.open(io.BytesIO(sent["data"])))
    worst = int(np.abs(seen.astype(int) - image).max())
    assert worst == 0 if encoding == "png" else 0 < worst < 60
    assert messages.observation_from_wire(connections[0].received[0]).images["main"].shape == (16, 24, 3)


def test_compression_without_pillow_is_told_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlatformError, match="pip install pillow"):
        PolicyClient("ws://127.0.0.1:1", options=ClientOptions(images="jpeg"))
    PolicyClient("ws://127.0.0.1:1")


@pytest.mark.parametrize("change", [{"images": "gif"}, {"attempts": 0}, {"reply_timeout_s": -1}])
def test_impossible_options_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(change))):
        ClientOptions(**change)


def test_pauses_double_up_to_the_longest_and_differ_between_robots() -> None:
    options = ClientOptions(first_pause_s=0.1, longest_pause_s=1.0)
    for attempt, longest in enumerate((0.1, 0.2, 0.4, 0.8, 1.0, 1.0)):
        pauses = [options.pause_s(attempt) for _ in range(50)]
        assert longest / 2 <= min(pauses) < max(pauses) <= longest


def test_the_direct_listener_is_used_where_the_endpoint_names_one() -> None:
    with scripted(obedient) as (listener, direct), scripted(lambda c: c.greet(listener=listener)) as (url, proxy):
        with client_of(url + "/?model=a", ClientOptions(direct=True)) as client:
            client.infer(example())
        assert [(c.path, c.session) for c in proxy] == [("/?model=a", None)]
        assert [(c.path, c.session) for c in direct] == [("/?model=a", "arm")]


def test_an_unreachable_listener_is_no_obstacle(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listener = f"ws://127.0.0.1:{taken.getsockname()[1]}"

    def names_it(connection: Connection) -> None:
        connection.greet(listener=listener)
        connection.wait_closed()

    with scripted(names_it, obedient) as (url, connections):
        with client_of(url, ClientOptions(direct=True)) as client:
            assert client.infer(example(4))["actions"][0, 0] == 4
        assert [c.session for c in connections] == [None, "arm"]
    assert "going through the proxy" in caplog.text


def test_a_key_is_a_header_never_an_address_and_never_in_a_log(caplog: pytest.LogCaptureFixture) -> None:
    seen = []

    def look(connection: Connection) -> None:
        seen.append(connection.socket.request.headers["Authorization"])
        obedient(connection)

    caplog.set_level("DEBUG", "dualvla.client")
    with scripted(look) as (url, connections), client_of(url, key="secret-key-0123456789") as client:
        client.infer(example())
    assert seen == ["Bearer secret-key-0123456789"]
    assert "secret" not in connections[0].path
    PolicyClient("ws://robot.example:80", "secret-key-0123456789")
    assert "unencrypted" in caplog.text
    assert "secret-key" not in caplog.text


def test_threads_that_share_a_client_take_turns() -> None:
    with scripted(obedient) as (url, connections), client_of(url) as client, ThreadPoolExecutor(8) as pool:
        steps = list(pool.map(lambda step: client.infer(example(step))["actions"][0, 0], range(100)))
    assert steps == list(range(100))
    assert len(connections) == 1


def test_a_reply_larger_than_the_limit_is_not_read() -> None:
    def floods(connection: Connection) -> None:
        connection.greet()
        connection.receive()
        connection.socket.send(bytes(WireLimits().max_message_bytes + 1))
        connection.wait_closed()

    with scripted(floods) as (url, _), client_of(url) as client, pytest.raises(ServerError, match="attempts"):
        client.infer(example())


def test_an_observation_has_the_keys_of_the_protocol() -> None:
    with scripted(obedient) as (url, connections), client_of(url) as client:
        client.infer(example(3, id="7"), age_s=0.02)
    message = connections[0].received[0]
    assert list(message) == ["images/main", "prompt", "step", "id", "observation/state", "age_ms"]
    assert message["age_ms"] == 20
