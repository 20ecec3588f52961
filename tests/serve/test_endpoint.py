"""The endpoint on a real Ray Serve: proxy, ingress and replicas change nothing that tests/serve/test_app.py proves."""

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import ray
import serve_fakes
from ray import cloudpickle
from serve_fakes import CountingPolicy, example, load_counting
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from dualvla.client import PolicyClient, RemotePolicy
from dualvla.errors import PlatformError, PolicyError, ServerError, UsageError, WireError
from dualvla.wire import messages
from dualvla.wire.openpi import pack, unpack
from dualvla_cluster.serve_handle import HandlePolicy
from dualvla_eval.policies import load, parse_policy
from dualvla_eval.suites import get_suite
from dualvla_serve.config import EndpointConfig, Scaling
from dualvla_serve.deploy import running

KEY = "infer-key-0123456789"
cloudpickle.register_pickle_by_value(serve_fakes)  # replicas do not have the tests on their path


@pytest.fixture(scope="module")
def address(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two replicas, behind keys."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(KEY)
    scaling = Scaling(replicas=2, cpus=0.2)
    config = EndpointConfig(port=0, keys_file=str(file), scaling=scaling, embodiment="unlimited")
    with running(load_counting, config) as found:
        yield found


def status(address: str, path: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(f"http://{address}{path}", headers=headers)) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_served_policy_answers_like_the_policy_itself(address: str) -> None:
    """Sessions keep their replica: a count that another replica had would show."""
    remote, local = RemotePolicy(f"ws://{address}", KEY), CountingPolicy()
    sessions = [f"robot-{i}" for i in range(6)]
    for step in range(4):
        asked = [example(step * 10 + i, id=str(i)) for i in range(6)]
        for ours, theirs in zip(remote.infer(asked, sessions), local.infer(asked, sessions), strict=True):
            np.testing.assert_array_equal(ours.actions[:, :3], theirs.actions[:, :3])
            assert ours.reasoning == theirs.reasoning
    remote.close()


def test_json_over_http_goes_the_same_way(address: str) -> None:
    observation = example(3)
    body = {"images": {"main": observation.images["main"].tolist()}, "instruction": "go", "proprio": [0, 1, 2]}
    headers = {"Authorization": f"Bearer {KEY}", "X-Session-Id": "arm"}
    for count in (1, 2, 3):
        request = urllib.request.Request(f"http://{address}/v1/infer", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["actions"][0][:3] == [count, 3.0, 3.0]


def test_robots_that_ask_at_once_share_a_batch(address: str) -> None:
    def ask(number: int) -> float:
        with PolicyClient(f"ws://{address}", KEY) as client:
            assert client.spec
            return max(client.infer(example(i, "slow"))["actions"][0, 3] for i in range(3))

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(ask, range(8))) >= 3


def test_the_door_is_shut_without_a_key(address: str) -> None:
    for route in ("/readyz", "/v1/spec", "/v1/infer", "/openapi.json", "/"):
        assert status(address, route) == 401
        assert status(address, route, Authorization="Bearer wrong-key-0123456789") == 401
    assert status(address, "/healthz") == 200
    assert status(address, "/readyz", Authorization=f"Api-Key {KEY}") == 200
    with pytest.raises(InvalidStatus) as refused:
        connect(f"ws://{address}").__enter__()
    assert refused.value.response.status_code in (401, 403)


def test_faults_of_the_policy_reach_the_client_without_its_secrets(address: str) -> None:
    with PolicyClient(f"ws://{address}", KEY) as client:
        for instruction in ("raise", "nan"):
            with pytest.raises(ServerError, match="the policy failed on this observation") as error:
                client.infer(example(instruction=instruction))
            assert "secret" not in str(error.value)
        with pytest.raises(WireError, match="camera"):
            client.infer(serve_fakes.Observation({}, "go"))
        assert client.infer(example())["actions"].shape == (3, 7)


def test_a_dead_replica_is_replaced_and_its_robots_go_on(address: str) -> None:
    def answered(client: PolicyClient) -> bool:
        try:
            client.infer(example())
        except ServerError:
            return False
        return True

    with PolicyClient(f"ws://{address}", KEY) as client:
        assert answered(client)
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if "#Policy#" in actor["name"]:
                ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
        deadline = time.monotonic() + 60
        while not answered(client):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert client.infer(example())["actions"][0, 0] == 3  # the new replica goes on where the dead one was


def test_a_taken_port_and_an_open_door_are_refused(ray_cluster: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PlatformError, match=str(port)), running(load_counting, EndpointConfig(port=port)):
            pass
    with pytest.raises(UsageError, match="keys"):
        EndpointConfig(host="0.0.0.0")


def test_a_sweep_asks_the_same_policy_by_its_handle(address: str) -> None:
    """Sessions stay apart and go on, whichever of the two replicas answers."""
    remote, local = HandlePolicy("dualvla"), CountingPolicy()
    assert remote.spec == local.spec
    sessions = [f"episode-{i}" for i in range(6)]
    for step in range(4):
        asked = [example(step * 10 + i, id=str(i)) for i in range(6)]
        for ours, theirs in zip(remote.infer(asked, sessions), local.infer(asked, sessions), strict=True):
            np.testing.assert_array_equal(ours.actions[:, :3], theirs.actions[:, :3])
    remote.reset("episode-0")
    assert remote.infer([example()], ["episode-0"])[0].actions[0, 0] == 1
    with pytest.raises(PolicyError):
        remote.infer([example(instruction="raise")], ["episode-1"])
    with pytest.raises(ServerError, match="serve status"):
        HandlePolicy("nowhere")
    assert load(parse_policy("serve:dualvla"), suite=get_suite("blocks")).spec == local.spec


def test_replicas_are_found_and_asked_directly(address: str) -> None:
    def listeners() -> list[str]:
        request = urllib.request.Request(f"http://{address}/v1/listeners", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request) as answer:
            return [one["url"] for one in json.load(answer)["listeners"]]

    def alive(url: str) -> bool:
        host, port = url.removeprefix("ws://").split(":")
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0

    deadline = time.monotonic() + 60  # the dead of the test above are listed for a while
    while len(found := [url for url in listeners() if alive(url)]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    for url in found:
        with pytest.raises(ServerError, match="refused the key"):
            PolicyClient(url, "wrong-key-0123456789").infer(example())
    with connect(found[0], additional_headers={"Authorization": f"Bearer {KEY}"}) as connection:
        greeting = unpack(connection.recv())
        assert greeting["listener"] == found[0]
        connection.send(pack(messages.observation_to_wire(example(id="x"))))
        assert unpack(connection.recv())["seq"] == 1
        session = greeting["session"]["id"]
        connection.socket.close()  # the network fails; the other replica goes on with it
    query = f"{found[1]}/?session={session}&resume=1"
    with connect(query, additional_headers={"Authorization": f"Bearer {KEY}"}) as connection:
        assert unpack(connection.recv())["session"] == {"id": session, "seq": 1, "resumed": True}
        connection.send(pack(messages.observation_to_wire(example(id="y"))))
        assert unpack(connection.recv())["actions"][0, 0] == 2
