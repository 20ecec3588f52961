"""The endpoint's protocols, sessions and keys over real sockets; the policy in the same process, Ray left out.

tests/serve/test_endpoint.py proves that Ray Serve changes none of it.
"""

import base64
import contextlib
import io
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serve.local_endpoint import listening
from serve_fakes import SPEC, CountingPolicy, example
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from dualvla.client import ClientOptions, PolicyClient, RemotePolicy
from dualvla.errors import ServerError, UsageError, WireError
from dualvla.policy import Policy
from dualvla.schema import Observation
from dualvla.wire import messages
from dualvla.wire.openpi import pack, unpack
from dualvla_serve.keys import read_keys

KEY, ADMIN_ONLY = "infer-key-0123456789", "admin-key-0123456789"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with listening() as found:
        yield found


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# robots\n{KEY}\n\n{ADMIN_ONLY} admin\n")
    with listening(keys_file=str(file)) as found:
        yield found


@contextlib.contextmanager
def socket_to(address: str, **headers: str) -> Iterator[ClientConnection]:
    with connect(f"ws://{address}", additional_headers=headers) as connection:
        yield connection


def expected(count: int, step: int) -> np.ndarray:
    policy = CountingPolicy()
    for _ in range(count):
        (reply,) = policy.infer([example(step)], ["any"])
    return reply.actions


def http(address: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{address}{path}", data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def body(step: int = 0, **changes: object) -> dict[str, object]:
    file = io.BytesIO()
    Image.fromarray(example(step).images["main"]).save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    fields = {"images": {"main": image}, "instruction": "go", "proprio": [0, 1, 2], "step": step, "id": "x"}
    return {**fields, **changes}


def wire(**changes: object) -> bytes:
    return pack(messages.observation_to_wire(example()) | changes)


def test_the_server_speaks_first_and_answers_as_openpis_clients_expect(address: str) -> None:
    with socket_to(address) as connection:
        greeting = unpack(connection.recv())
        assert greeting["policy"]["cameras"] == ["main"]
        connection.send(pack(messages.observation_to_wire(example(5, id="abc"))))
        reply = unpack(connection.recv())
        np.testing.assert_array_equal(reply["actions"], expected(1, 5))
        assert reply["id"] == "abc"
        assert reply["reasoning"] == "go at 5"
        assert reply["server_timing"]["infer_ms"] >= reply["policy_timing"]["infer_ms"] > 0


def test_all_three_ways_answer_like_the_policy_itself(address: str) -> None:
    with PolicyClient(f"ws://{address}") as client:
        answer = client.infer(example(9, id="a"))
        assert client.spec == SPEC
    np.testing.assert_array_equal(answer["actions"], expected(1, 9))
    assert (answer["id"], answer["keyframe"], answer["reasoning_tokens"]) == ("a", True, 4)
    status, content = http(address, "/v1/infer", body(9))
    assert status == 200
    np.testing.assert_array_equal(np.float32(json.loads(content)["actions"]), expected(1, 9))
    assert json.loads(content)["id"] == "x"


def test_a_connection_is_a_session_and_forgets_when_told_and_when_closed(address: str) -> None:
    def count(client: PolicyClient) -> float:
        return client.infer(example())["actions"][0, 0]

    with PolicyClient(f"ws://{address}", session="robot-1") as one, PolicyClient(f"ws://{address}") as two:
        assert [count(one), count(one), count(two), count(one)] == [1, 2, 1, 3]
        one.reset()
        assert [count(one), count(two)] == [1, 2]
    with PolicyClient(f"ws://{address}", session="robot-1") as again:
        assert count(again) == 1


def test_a_second_connection_takes_a_session_over_clean(address: str) -> None:
    headers = {messages.SESSION_HEADER: "robot-2"}
    with socket_to(address, **headers) as ghost, socket_to(address, **headers) as alive:
        for connection in (ghost, alive):
            connection.recv()
        with pytest.raises(ConnectionClosed) as closed:
            ghost.recv(timeout=5)
        assert closed.value.rcvd.code == 4001
        for count in (1, 2):  # the ghost's end resets nothing
            alive.send(pack(messages.observation_to_wire(example())))
            assert unpack(alive.recv())["actions"][0, 0] == count


def test_http_sessions_are_named_by_a_header(address: str) -> None:
    def count(**headers: str) -> float:
        return json.loads(http(address, "/v1/infer", body(), **headers)[1])["actions"][0][0]

    named = {messages.SESSION_HEADER: "arm"}
    assert [count(**named), count(**named), count(), count()] == [1, 2, 1, 1]
    assert http(address, "/v1/reset", b"", **named)[0] == 204
    assert count(**named) == 1
    assert http(address, "/v1/infer", body(), **{messages.SESSION_HEADER: "a b"})[0] == 400


@pytest.mark.parametrize(
    ("frame", "kind", "told"),
    [
        (b"\xc1", "bad_request", "msgpack"),
        ("text", "bad_request", "Text"),
        (pack([1]), "bad_request", "map"),
        (pack({"reset": np.array([1, 2])}), "bad_request", "reset"),
        (
            pack(messages.observation_to_wire(example()) | {"images/main": np.zeros((4, 4), np.uint8)}),
            "bad_request",
            "main",
        ),
        (pack({"prompt": "go", "observation/state": np.zeros(3)}), "bad_request", "images/main"),
        (wire(**{"observation/state": np.zeros(5)}), "bad_request", "takes 3"),
        (wire(**{"images/main": np.zeros((8, 8, 3), np.uint8)}), "bad_request", "sees [16, 24, 3]"),
        (wire(prompt="nan"), "failed", "the policy failed"),
        (wire(prompt="raise"), "failed", "the policy failed"),
        (bytes(9 * 2**20), "bad_request", "limit"),
    ],
)
def test_a_fault_is_told_shortly_and_the_connection_lives_on(
    address: str, frame: bytes | str, kind: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with socket_to(address) as connection:
        connection.recv()
        connection.send(frame)
        answer = connection.recv()
        assert isinstance(answer, str)
        failure = json.loads(answer)["error"]
        assert failure["kind"] == kind
        assert told in failure["message"]
        assert "secret" not in answer
        assert "Traceback" not in answer
        assert failure["id"] in caplog.text
        connection.send(pack(messages.observation_to_wire(example())))
        assert unpack(connection.recv())["actions"].shape == (3, 7)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (body(images={}), 400),
        (body(images={"main": "????"}), 400),
        (body(instruction=None), 400),
        (body(unknown=1), 400),
        (body(proprio=[1.0]), 400),
        (body(instruction="nan"), 500),
        (body(instruction="raise"), 500),
        (bytes(9 * 2**20), 400),
    ],
)
def test_http_faults_have_a_status_and_an_id(address: str, content: object, status: int) -> None:
    found, answer = http(address, "/v1/infer", content)
    assert found == status
    assert json.loads(answer)["error"]["id"]
    assert b"secret" not in answer
    assert b"Traceback" not in answer


ROUTES = ["/readyz", "/v1/spec", "/v1/infer", "/v1/reset", "/openapi.json", "/", "/nothing", "/healthz/", "//healthz"]
BAD_KEYS = {
    "missing": {},
    "wrong": {"Authorization": "Bearer wrong-key-0123456789"},
    "part": {"Authorization": f"Bearer {KEY[:-1]}"},
    "longer": {"Authorization": f"Bearer {KEY}x"},
    "empty": {"Authorization": "Bearer "},
    "scheme": {"Authorization": f"Basic {KEY}"},
    "scope": {"Authorization": f"Bearer {ADMIN_ONLY}"},
    "comment": {"Authorization": "Bearer #"},
}


@pytest.mark.parametrize("headers", BAD_KEYS.values(), ids=BAD_KEYS.keys())
def test_without_a_key_every_route_and_upgrade_is_refused(locked: str, headers: dict[str, str]) -> None:
    for route in ROUTES:
        for content in (None, body()):
            assert http(locked, route, content, **headers)[0] == 401, route
    with pytest.raises(InvalidStatus) as refused:
        connect(f"ws://{locked}", additional_headers=headers).__enter__()
    assert refused.value.response.status_code in (401, 403)
    assert http(locked, "/healthz", **headers) == (200, b"OK")


@pytest.mark.parametrize("scheme", ["Bearer", "Api-Key", "bearer"])
def test_a_key_opens_every_route(locked: str, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {KEY}"}
    assert http(locked, "/v1/spec", **headers)[0] == 200
    assert http(locked, "/v1/infer", body(), **headers)[0] == 200
    with socket_to(locked, **headers) as connection:
        assert unpack(connection.recv())["server"] == "dualvla"


def test_the_client_tells_a_refused_key_at_once(locked: str) -> None:
    started = time.monotonic()
    with pytest.raises(ServerError, match="refused the key"):
        PolicyClient(f"ws://{locked}", "wrong-key-0123456789").infer(example())
    assert time.monotonic() - started < 5
    with PolicyClient(f"http://{locked}", KEY) as client:
        assert client.infer(example())["actions"].shape == (3, 7)


@pytest.mark.parametrize("header", [{"Origin": "https://evil.example"}, {"Host": "evil.example"}])
def test_without_keys_no_web_page_gets_in(address: str, header: dict[str, str]) -> None:
    connection = HTTPConnection(address, timeout=10)
    connection.request("GET", "/v1/spec", headers=header)
    assert connection.getresponse().status == 403
    with pytest.raises(InvalidStatus):
        connect(f"ws://{address}", additional_headers={"Origin": "https://evil.example"}).__enter__()


@pytest.mark.parametrize(
    ("text", "told"),
    [("", "no key"), ("short\n", ":1:"), (f"{KEY}\n{KEY} infre\n", "did you mean 'infer'")],
)
def test_a_bad_keys_file_is_named_and_no_key_is_shown(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(UsageError, match=told) as error:
        read_keys(str(file))
    assert KEY not in str(error.value)
    assert "short" not in str(error.value)


def test_what_is_kept_of_a_key_does_not_show_it(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)
    assert KEY not in repr(read_keys(str(file)))


def test_the_client_survives_a_restart_of_the_server() -> None:
    with listening() as address:
        client = PolicyClient(f"ws://{address}")
        assert client.infer(example())["actions"][0, 0] == 1
        assert client.infer(example())["actions"][0, 0] == 2
    with client, listening(port=int(address.rpartition(":")[2])):
        assert client.infer(example(3))["actions"][0, 0] == 1  # a new session: nothing of the old one is left


def test_nobody_there_is_told_with_the_remedy() -> None:
    with listening() as address:
        pass
    options = ClientOptions(attempts=2, first_pause_s=0.01)
    with pytest.raises(ServerError, match="dualvla serve"):
        PolicyClient(f"ws://{address}", options=options).infer(example())


def test_a_late_reply_is_never_taken_for_the_next(address: str) -> None:
    with PolicyClient(f"ws://{address}", options=ClientOptions(reply_timeout_s=1.0)) as client:
        assert client.spec == SPEC
        with pytest.raises(ServerError, match="No answer"):
            client.infer(example(1, "very slow"))
        assert client.infer(example(2))["reasoning"] == "go at 2"


def test_the_clients_errors_say_whose_fault_it_was(address: str) -> None:
    with PolicyClient(f"ws://{address}") as client:
        with pytest.raises(WireError, match="images/main"):
            client.infer(Observation({}, "go", np.zeros(3, np.float32)))
        with pytest.raises(ServerError, match="the policy failed"):
            client.infer(example(instruction="raise"))
        assert client.infer(example())["actions"].shape == (3, 7)
    with pytest.raises(UsageError, match="ftp"):
        PolicyClient("ftp://robot")


def test_a_remote_policy_is_a_policy(address: str) -> None:
    remote, local = RemotePolicy(f"ws://{address}"), CountingPolicy()
    assert isinstance(remote, Policy)
    assert remote.spec == local.spec
    for step, sessions in enumerate([["a", "b"], ["b", "a", "b"], ["c"]]):
        asked = [example(step * 10 + i, id=str(i)) for i in range(len(sessions))]
        for ours, theirs in zip(remote.infer(asked, sessions), local.infer(asked, sessions), strict=True):
            np.testing.assert_array_equal(ours.actions[:, :3], theirs.actions[:, :3])
            assert (ours.reasoning, ours.keyframe) == (theirs.reasoning, theirs.keyframe)
        assert [r.id for r in remote.infer(asked[:1], sessions[:1])] == ["0"]
        local.infer(asked[:1], sessions[:1])
        for policy in (remote, local):
            policy.reset("a")
    remote.close()


def test_many_robots_at_once_never_get_each_others_replies(address: str) -> None:
    def robot(number: int) -> None:
        with PolicyClient(f"ws://{address}") as client:
            for step in range(10):
                observation = example(number * 10 + step, f"robot {number}", id=f"{number}/{step}")
                reply = client.infer(observation)
                assert reply["id"] == observation.id
                assert reply["reasoning"] == f"robot {number} at {number * 10 + step}"
                assert reply["actions"][0, 0] == step + 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(robot, range(8)))


def test_robots_that_ask_at_once_share_a_batch_and_one_fault_is_not_anothers(address: str) -> None:
    ready = threading.Barrier(8)

    def robot(number: int) -> float:
        """The largest batch it was part of."""
        with PolicyClient(f"ws://{address}") as client:
            assert client.spec
            ready.wait()
            if number == 0:
                with pytest.raises(ServerError, match="the policy failed"):
                    client.infer(example(0, "raise"))
            return max(client.infer(example(step, "slow"))["actions"][0, 3] for step in range(3))

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(robot, range(8))) >= 4


def test_garbage_over_the_wire_breaks_nothing(address: str) -> None:
    rng = np.random.default_rng(0)
    real = pack(messages.observation_to_wire(example()))
    with socket_to(address) as connection:
        connection.recv()
        for _ in range(300):
            frame = bytearray(real)
            for at in rng.integers(0, min(len(frame), 150), 3):
                frame[at] = rng.integers(256)
            connection.send(bytes(frame[: rng.integers(1, len(frame))] if rng.random() < 0.5 else frame))
            answer = connection.recv(timeout=10)
            assert isinstance(answer, bytes) or json.loads(answer)["error"]["kind"] == "bad_request"


def test_the_client_needs_only_its_own_packages() -> None:
    heavy = ("torch", "ray", "pyarrow", "fastapi", "PIL")
    code = f"import sys, dualvla.client; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
