"""Each protocol to the byte: what other projects' own packages sent once (golden/), and what they get from us."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from serve.local_endpoint import endpoint, listening
from serve_fakes import SPEC
from websockets.sync.client import ClientConnection, connect

import dualvla
from dualvla.errors import WireError
from dualvla.schema import Observation, PolicyReply, PolicySpec
from dualvla.wire import http_json, images, mapping, messages, vla_eval
from dualvla.wire.mapping import BUILT_IN, ObservationKeys
from dualvla.wire.openpi import pack, unpack
from dualvla.wire.options import SessionOptions, options_from_query

GOLDEN = Path(__file__).parent / "golden"
IMAGE = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
GOLDEN_SPEC = PolicySpec("ee_delta_pose+gripper", 5.0, ("main",), "reasoning", horizon=2, execute_steps=1)
REPLY = PolicyReply(np.arange(14, dtype=np.float32).reshape(2, 7), "move left", True, 3, {"infer_ms": 1.5}, "7")
ADDED = {"session": "arm-1", "seq": 4, "model": {"name": "policy", "version": "abc"}, "interventions": ["range"]}
AT_S = 1700000000.0


def golden(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


def test_our_own_messages_are_what_they_have_always_been(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dualvla, "__version__", "0.0.0")
    greeting = messages.metadata(
        GOLDEN_SPEC, session={"id": "arm-1", "seq": 0, "resumed": False}, model={"name": "policy", "version": "abc"},
        models=["policy"], listener=None, limits={"max_message_bytes": 8388608},
    )  # fmt: skip
    assert pack(greeting) == golden("dualvla_greeting.msgpack")
    asked = Observation({"main": IMAGE}, "go", np.arange(3, dtype=np.float32), np.arange(6, dtype=np.float64), 5, "7")
    sent = messages.observation_to_wire(asked) | {"deadline_ms": 200.0, "age_ms": 12.5}
    assert pack(sent) == golden("dualvla_observation.msgpack")
    assert pack(messages.reply_to_wire(REPLY, {"total_ms": 2.0}, **ADDED)) == golden("dualvla_reply.msgpack")
    failure = messages.Failure("late", "0123456789ab", "No answer is possible within 50 ms.")
    assert failure.to_json().encode() == golden("dualvla_error.json")
    request = messages.request_from_wire(unpack(golden("dualvla_observation.msgpack")))
    assert (request.deadline_ms, request.age_ms, request.observation.step) == (200.0, 12.5, 5)
    np.testing.assert_array_equal(request.observation.images["main"], IMAGE)


def test_json_over_http_is_what_it_has_always_been() -> None:
    request = http_json.request_from_json(json.loads(golden("http_request.json")))
    np.testing.assert_array_equal(request.observation.images["main"], IMAGE)
    assert (request.observation.instruction, request.observation.id, request.deadline_ms) == ("go", "7", 200.0)
    assert http_json.reply_to_json(REPLY, {"total_ms": 2.0}, **ADDED) == json.loads(golden("http_reply.json"))


@pytest.mark.parametrize(
    ("name", "state"),
    [("droid", [0, 1, 2, 3, 4, 5, 6, 0.5]), ("libero", list(range(8)))],
)
def test_what_openpis_client_sends_is_understood_unasked(name: str, state: list[float]) -> None:
    message = unpack(golden(f"openpi_{name}_observation.msgpack"))
    for keys in ("auto", name):
        own, found = mapping.translate(message, keys, ("front", "hand"))
        assert found == name
        observation = messages.observation_from_wire(own)
        np.testing.assert_array_equal(observation.images["front"], IMAGE)
        np.testing.assert_array_equal(observation.images["hand"], IMAGE[::-1])
        np.testing.assert_array_equal(observation.proprio, np.float32(state))
        assert observation.instruction == "go"
    one, _ = mapping.translate(message, name, ("front",))
    assert [key for key in one if key.startswith("images/")] == ["images/front"]


def test_openpis_scalars_are_understood() -> None:
    assert unpack(golden("openpi_scalar.msgpack")) == {"x": np.float32(1.5), "n": np.int64(-3)}


def test_a_mapping_of_ones_own_names_its_cameras() -> None:
    own = {"aloha": ObservationKeys(("cam_high", "cam_low"), ("qpos",), "task", ("top", "bottom"))}
    message = {"cam_high": IMAGE, "cam_low": IMAGE, "qpos": np.zeros(3), "task": "go", "other": 1}
    translated, found = mapping.translate(message, "auto", ("bottom", "top"), {**BUILT_IN, **own})
    assert found == "aloha"
    assert set(translated) == {"images/top", "images/bottom", "observation/state", "prompt"}
    for broken in ({"cam_high": IMAGE}, message | {"qpos": "x"}, [1]):
        with pytest.raises(WireError):
            mapping.translate(broken, "aloha", ("a", "b"), own)
    with pytest.raises(WireError, match="did you mean 'droid'"):
        mapping.translate(message, "drod", ("a",))


@pytest.mark.parametrize("name", ["vla_eval_observation", "vla_eval_observation_raw"])
def test_what_vla_evals_client_sends_is_understood(name: str) -> None:
    frame = vla_eval.unpack(golden(f"{name}.msgpack"))
    assert (frame.type, frame.seq) == ("observation", 3)
    observation = messages.observation_from_wire(vla_eval.observation_from_payload(frame.payload, ("main",), 4))
    np.testing.assert_array_equal(observation.images["main"], IMAGE)
    np.testing.assert_array_equal(observation.proprio, [0, 1, 2])
    assert (observation.instruction, observation.step) == ("go", 4)


def test_what_we_send_vla_evals_client_is_what_it_has_always_been(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dualvla, "__version__", "0.0.0")
    assert vla_eval.unpack(golden("vla_eval_hello.msgpack")).payload["protocol_version"] == vla_eval.PROTOCOL_VERSION
    assert vla_eval.pack("hello", vla_eval.hello(GOLDEN_SPEC, "policy"), 1, AT_S) == golden(
        "vla_eval_hello_reply.msgpack"
    )
    action = vla_eval.pack("action", {"actions": REPLY.actions[0]}, 3, AT_S)
    assert action == golden("vla_eval_action.msgpack")


def test_encoded_images_are_taken_in_our_own_protocol_too() -> None:
    import io

    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(IMAGE).save(sink, "PNG")
    encoded = {"__image__": True, "format": "png", "data": sink.getvalue(), "shape": [2, 3, 3]}
    observation = messages.observation_from_wire(unpack(pack({"images/main": encoded, "prompt": "go"})))
    np.testing.assert_array_equal(observation.images["main"], IMAGE)
    for wrong in ({"format": "gif"}, {"data": b"no"}, {"shape": [9, 9, 3]}, {"data": "text"}):
        with pytest.raises(WireError):
            messages.observation_from_wire({"images/main": encoded | wrong, "prompt": "go"})


def test_a_decompression_bomb_is_turned_away_before_it_goes_off() -> None:
    """A PNG header that promises 60,000 x 60,000 pixels."""
    import struct
    import zlib

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(WireError):
        images.decode("main", png)


def test_an_image_is_fitted_without_distortion() -> None:
    fitted = images.fit(np.full((10, 20, 3), 200, np.uint8), 16, 16)
    assert fitted.shape == (16, 16, 3)
    assert (fitted[4:12] == 200).all()
    assert not fitted[:4].any()
    assert not fitted[12:].any()


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ({"reasoning": "every:0"}, "every:K"),
        ({"ensemble": "exp:-1"}, "ensemble"),
        ({"gripper": "closed"}, "open11"),
        ({"deadline_ms": "nan"}, "deadline_ms"),
        ({"on_faults": "hold"}, "did you mean 'on_fault'"),
        ({"model": "a\nb"}, "printable"),
    ],
)
def test_an_option_that_is_not_one_is_named(query: dict[str, str], told: str) -> None:
    with pytest.raises(WireError, match=told):
        options_from_query(query)


def test_options_are_what_the_query_says() -> None:
    query = {"model": "dual", "deadline_ms": "200", "reasoning": "every:5", "ensemble": "exp:0.1", "session": "a"}
    options = options_from_query(query, SessionOptions(on_fault="hold"))
    assert options == SessionOptions("dual", 200.0, "every:5", "exp:0.1", "open01", "hold")
    assert options.ensemble_rate == 0.1


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with listening() as found:
        yield found


def vla_eval_frame(connection: ClientConnection) -> vla_eval.Frame:
    frame = connection.recv(timeout=10)
    assert isinstance(frame, bytes)
    return vla_eval.unpack(frame)


def test_openpis_bytes_get_actions(address: str) -> None:
    with connect(f"ws://{address}") as connection:
        connection.recv()
        connection.send(golden("openpi_droid_observation.msgpack"))  # 8 numbers of state: this policy takes 3
        assert "takes 3" in json.loads(connection.recv())["error"]["message"]
        message = unpack(golden("openpi_libero_observation.msgpack")) | {"observation/state": np.arange(3.0)}
        for count in (1, 2):
            connection.send(pack(message))  # an image of another size is made to fit
            reply = unpack(connection.recv())
            assert reply["actions"].shape == (3, 7)
            assert reply["actions"][0, 0] == count
            assert reply["reasoning"] == f"go at {(count - 1) * SPEC.execute_steps}"
            assert set(reply["server_timing"]) >= {"infer_ms", "total_ms"}


def test_vla_evals_bytes_get_one_action_at_a_time(address: str) -> None:
    with connect(f"ws://{address}/vla-eval") as connection:
        connection.send(golden("vla_eval_hello.msgpack"))
        hello = vla_eval_frame(connection)
        assert (hello.type, hello.seq) == ("hello", 1)
        assert hello.payload["model_server"] == "policy"
        for _ in range(2):  # an episode begins the session anew
            connection.send(golden("vla_eval_episode_start.msgpack"))
            counts = []
            for _ in range(4):
                connection.send(golden("vla_eval_observation.msgpack"))
                frame = vla_eval_frame(connection)
                assert (frame.type, frame.seq) == ("action", 3)
                assert frame.payload["actions"].shape == (7,)
                counts.append(frame.payload["actions"][0])
            assert counts == [1, 1, 2, 2]  # the policy is asked once for the two actions that it says to execute


def test_a_vla_eval_client_is_told_of_a_fault_and_goes_on(address: str) -> None:
    with connect(f"ws://{address}/vla-eval") as connection:
        connection.send(golden("vla_eval_hello.msgpack"))
        connection.recv()
        for bad in (b"\xc1", golden("vla_eval_hello.msgpack")[:-3], vla_eval.pack("observation", {"images": {}}, 9)):
            connection.send(bad)
            frame = vla_eval_frame(connection)
            assert frame.type == "error"
            assert frame.payload["error"].startswith("bad_request: ")
        connection.send(golden("vla_eval_observation.msgpack"))
        assert vla_eval_frame(connection).type == "action"


_REAL_CLIENTS = """
import asyncio, sys
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from vla_eval.connection import Connection

host, port, key = sys.argv[1:]
image = np.full((224, 224, 3), 7, np.uint8)
policy = WebsocketClientPolicy(host, int(port), api_key=key)
assert policy.get_server_metadata()["policy"]["horizon"] == 3
observation = {"observation/image": image, "observation/state": np.arange(3.0), "prompt": "go"}
for count in (1, 2):
    answer = policy.infer(observation)
    assert answer["actions"].shape == (3, 7) and answer["actions"][0, 0] == count, answer
try:
    policy.infer({"prompt": "go"})
except RuntimeError as error:
    assert "images/main" in str(error) and "Traceback" not in str(error), error
else:
    raise SystemExit("no error for an observation without an image")

async def harness():
    async with Connection(f"ws://robot:{key}@{host}:{port}/vla-eval") as connection:
        assert connection.server_info["model_server"] == "policy", connection.server_info
        for _ in range(2):
            await connection.start_episode({"task": {"name": "go"}})
            for count in (1, 1, 2):
                action = await connection.act(
                    {"images": {"agentview": image}, "states": np.arange(3.0), "task_description": "go"})
                assert action["actions"].shape == (7,) and action["actions"][0] == count, action
            await connection.end_episode({"success": True})

asyncio.run(harness())
print("both clients were served")
"""


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with the two projects' own packages, which want another numpy than we do."""
    folder = tmp_path_factory.mktemp("peers")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    packages = ["openpi-client==0.1.2", "vla-eval==0.8.0"]
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        pytest.skip(f"{' and '.join(packages)} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return python


@pytest.mark.slow
def test_the_clients_of_openpi_and_vla_eval_are_served_unmodified(peers: str, tmp_path: Path) -> None:
    key = "infer-key-0123456789"
    (tmp_path / "keys").write_text(key)
    with endpoint(keys_file=str(tmp_path / "keys")) as running:
        host, port = running.address.split(":")
        command = [peers, "-c", _REAL_CLIENTS, host, port, key]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "both clients were served" in done.stdout
