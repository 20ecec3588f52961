"""`dualvla serve` on a real checkpoint, as a user runs it; and the loop closed through it by `dualvla eval`."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import serve_fakes
from ray import cloudpickle
from serve_fakes import load_broken
from unit import vla_fakes
from websockets.asyncio.client import connect

from dualvla import cli
from dualvla.client import PolicyClient, RemotePolicy
from dualvla.errors import PolicyError, ServerError
from dualvla.io.dataset import open_dataset
from dualvla.models.checkpoint import save_checkpoint
from dualvla.models.stages import prepare
from dualvla.models.vla import VLA
from dualvla.schema import Observation
from dualvla.vla_policy import VLAPolicy
from dualvla.wire import messages
from dualvla.wire.openpi import pack, unpack
from dualvla_serve.config import EndpointConfig
from dualvla_serve.deploy import running

KEY = "infer-key-0123456789"
cloudpickle.register_pickle_by_value(serve_fakes)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random reasoning policy for the suite `blocks`."""
    folder = str(tmp_path_factory.mktemp("served") / "dual")
    write_checkpoint(folder, seed=0)
    return folder


def write_checkpoint(folder: str, seed: int) -> None:
    config = prepare(vla_fakes.config(proprio_dim=4, image_size=64), "dual")
    processor = vla_fakes.processor(config)
    model = VLA.create(config, processor, seed=seed)
    save_checkpoint(folder, model.state_dict(), model.config, processor, {"stage": "dual"})


@contextlib.contextmanager
def served(checkpoint: str, *options: str) -> Iterator[dict[str, Any]]:
    """The endpoint's addresses and `pid`. Ended with Ctrl-C, which must leave exit code 0 and a free port."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    command = [sys.executable, "-m", "dualvla", "serve", checkpoint, "--json", "--port", "0", *options]
    if "--state-dir" not in options:
        command += ["--state-dir", str(Path(checkpoint).parent / "state")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        assert first, "ended before it was ready"
        yield {**json.loads(first), "pid": process.pid}
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
        port = int(json.loads(first)["websocket"].rpartition(":")[2])
        socket.create_server(("127.0.0.1", port)).close()
    finally:
        process.terminate()  # a second signal, harmless; but never a kill, which would leave its Ray behind
        process.wait(120)


def observation(seed: int, step: int = 0) -> Observation:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Observation(
        {"main": image}, vla_fakes.TEXTS[0], rng.normal(size=4).astype(np.float32), None, step, f"{seed}"
    )


@pytest.mark.slow
def test_a_checkpoint_is_served_unchanged_over_every_route(checkpoint: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    local = VLAPolicy.from_pretrained(checkpoint)
    with served(checkpoint, "--keys-file", str(keys)) as endpoint:
        with pytest.raises(ServerError, match="refused the key"):
            PolicyClient(endpoint["websocket"]).infer(observation(0))
        remote = RemotePolicy(endpoint["websocket"], KEY)
        assert remote.spec == local.spec
        for step in range(4):
            (ours,) = remote.infer([observation(step, step)], ["robot"])
            (theirs,) = local.infer([observation(step, step)], ["robot"])
            np.testing.assert_array_equal(ours.actions, theirs.actions)
            assert (ours.reasoning, ours.keyframe, ours.id) == (theirs.reasoning, theirs.keyframe, theirs.id)
        remote.close()
        asked = observation(7)
        body = {"images": {"main": asked.images["main"].tolist()}, "instruction": asked.instruction}
        body["proprio"] = asked.proprio.tolist()
        headers = {"Authorization": f"Bearer {KEY}", "X-Session-Id": "arm"}
        request = urllib.request.Request(endpoint["http"], json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            actions = np.float32(json.load(answer)["actions"])
        np.testing.assert_array_equal(actions, local.infer([asked], ["arm"])[0].actions)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


@pytest.mark.slow
def test_new_weights_answer_on_the_same_encrypted_connection_and_what_happened_is_recorded(
    tmp_path: Path, certificate: tuple[str, str]
) -> None:
    folder, recorded = str(tmp_path / "dual"), tmp_path / "recorded"
    write_checkpoint(folder, seed=1)
    old = VLAPolicy.from_pretrained(folder)
    trusting = ssl.create_default_context(cafile=certificate[0])
    tls = ["--cert", certificate[0], "--key-file", certificate[1], "--record", str(recorded)]

    async def talk(endpoint: dict[str, Any]) -> None:
        async with connect(endpoint["websocket"], ssl=trusting) as proxied:
            direct = unpack(await proxied.recv())["listener"]
        assert direct.startswith("wss://")
        async with (
            connect(f"{endpoint['websocket']}/?session=a", ssl=trusting) as proxied,
            connect(f"{direct}/?session=b", ssl=trusting) as straight,
        ):
            pair = {"a": proxied, "b": straight}
            for connection in pair.values():
                await connection.recv()

            async def ask(name: str, step: int) -> dict[str, Any]:
                await pair[name].send(pack(messages.observation_to_wire(observation(5, step))))
                return unpack(await asyncio.wait_for(pair[name].recv(), 60))

            first = {name: await ask(name, 0) for name in pair}
            for name, reply in first.items():
                np.testing.assert_array_equal(reply["actions"], old.infer([observation(5)], [name])[0].actions)
            write_checkpoint(folder, seed=2)
            new = VLAPolicy.from_pretrained(folder)
            os.kill(endpoint["pid"], signal.SIGHUP)
            deadline = time.monotonic() + 120
            for name in pair:
                while (reply := await ask(name, 1))["model"] == first[name]["model"]:
                    assert time.monotonic() < deadline
                np.testing.assert_array_equal(reply["actions"], new.infer([observation(5, 1)], [name])[0].actions)

    with served(folder, *tls) as endpoint:
        asyncio.run(talk(endpoint))
    (replica,) = recorded.iterdir()
    rows = open_dataset(str(replica)).read(["episode_id", "instruction"]).to_pylist()
    assert len({row["episode_id"] for row in rows}) == 2
    assert {row["instruction"] for row in rows} == {vla_fakes.TEXTS[0]}


@pytest.mark.slow
@pytest.mark.sim
def test_the_loop_closed_over_the_network_is_the_loop_in_process(checkpoint: str, tmp_path: Path) -> None:
    def evaluate(policy: str, name: str) -> Path:
        out = tmp_path / name
        argv = [
            "--policy",
            f"it={policy}",
            "--suite",
            "blocks",
            "--tasks",
            "touch",
            "--episodes",
            "3",
            "--out",
            str(out),
        ]
        cli.call("eval", [*argv, "--workers", "1", "--envs-per-worker", "1", "--videos", "0"])
        return out

    with served(checkpoint) as endpoint:
        remote = evaluate(endpoint["websocket"], "remote")
    local = evaluate(checkpoint, "local")
    told = ["task", "episode_id", "seed", "success", "steps", "stop_reason", "reasoning_tokens"]
    ours, theirs = (pq.read_table(out / "episodes.parquet", columns=told).to_pylist() for out in (remote, local))
    assert ours == theirs
    for path in sorted((local / "trajectories").iterdir()):
        columns = [pq.read_table(f, columns=["action"]) for f in (path, remote / "trajectories" / path.name)]
        assert columns[0].equals(columns[1])


@pytest.mark.slow
def test_a_policy_that_does_not_load_is_an_error_not_a_wait(ray_cluster: None) -> None:
    with pytest.raises(PolicyError, match="these weights do not load"), running(load_broken, EndpointConfig(port=0)):
        pass


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["/nowhere"], "/nowhere"),
        (["CHECKPOINT", "--host", "0.0.0.0"], "keys"),
        (["CHECKPOINT", "--keys-file", "/nowhere"], "/nowhere"),
        (["CHECKPOINT", "--replicas", "0"], "0 replicas"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(
    checkpoint: str, argv: list[str], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", *[checkpoint if a == "CHECKPOINT" else a for a in argv]]) == 2
    assert told in capfd.readouterr().err
