"""Malformed messages by the hundred thousand: every answer a typed error, no crash, no hang, no memory that grows."""

import contextlib
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from typing import Any

import psutil
import pytest
from serve import mutations
from serve.local_endpoint import listening
from serve_fakes import example
from websockets.sync.client import connect

from dualvla.client import PolicyClient
from dualvla.errors import WireError
from dualvla.wire import http_json, mapping, messages, openpi, vla_eval
from dualvla_serve.limits import Limits

CAMERAS = ("main",)
# Frames of each protocol; 100,000 in all.
CODECS = {"openpi": 40_000, "vla-eval": 40_000, "json": 20_000}


def decode_openpi(frame: bytes) -> object:
    message = openpi.unpack(frame)
    if messages.is_reset(message):
        return message
    return messages.request_from_wire(mapping.translate(message, mapping.AUTO, CAMERAS)[0])


def decode_vla_eval(frame: bytes) -> object:
    found = vla_eval.unpack(frame)
    if found.type != vla_eval.OBSERVATION:
        return found
    return messages.request_from_wire(vla_eval.observation_from_payload(found.payload, CAMERAS, 0))


def decode_json(frame: bytes) -> object:
    """As after the body's own parsing, which is pydantic's."""
    try:
        body = json.loads(frame)
    except (ValueError, RecursionError):
        raise WireError("no JSON") from None
    if not isinstance(body, dict):
        raise WireError("no object")
    return http_json.request_from_json(body)


DECODERS: dict[str, tuple[Callable[[bytes], object], list[bytes], Callable[[Any], bytes]]] = {
    "openpi": (decode_openpi, mutations.openpi_seeds(), mutations.as_msgpack),
    "vla-eval": (decode_vla_eval, mutations.vla_eval_seeds(), mutations.as_vla_eval),
    "json": (decode_json, mutations.json_seeds(), mutations.as_json),
}


@pytest.mark.parametrize("protocol", DECODERS)
def test_the_seeds_are_messages(protocol: str) -> None:
    decode, seeds, _ = DECODERS[protocol]
    for seed in seeds:
        decode(seed)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", DECODERS)
def test_no_frame_breaks_a_decoder(protocol: str, fault_seed: int) -> None:
    decode, seeds, invented = DECODERS[protocol]
    rng = random.Random(f"{protocol}/{fault_seed}")
    process, outcomes = psutil.Process(), Counter[str]()
    count, slowest, warm = CODECS[protocol] // 2, 0.0, 0  # two seeds in CI
    for number in range(count):
        frame = mutations.damaged(rng, seeds, invented)
        started = time.perf_counter()
        try:
            decode(frame)
            outcomes["accepted"] += 1
        except WireError as error:
            outcomes[str(error)[:12]] += 1
        slowest = max(slowest, time.perf_counter() - started)
        if number == count // 5:
            warm = process.memory_info().rss
    grown = process.memory_info().rss - warm
    assert grown < 24 * 2**20, f"{grown / 2**20:.0f} MiB more"
    assert slowest < 2.0
    # The fuzzer reaches deep: some frames are still good, and the others fail in many ways.
    assert 0.001 < outcomes["accepted"] / count < 0.6, outcomes
    assert len(outcomes) >= 8, outcomes


# -- over the wire: 2,000 messages in all

KINDS = {"bad_request", "late", "stopped", "unsafe", "busy", "expired", "unavailable", "failed"}
WIRE = {"openpi": 350, "vla-eval": 300, "http": 250, "tcp": 100}  # of each of CI's two seeds


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with listening(limits=Limits(requests_per_s=1e6, burst=10**6)) as found:
        yield found


def over_openpi(address: str, frames: Iterator[bytes], count: int) -> None:
    """Exactly one answer to each frame, a reply or a typed error, on one connection."""
    with connect(f"ws://{address}", compression=None) as connection:
        connection.recv(timeout=10)
        for _ in range(count):
            connection.send(next(frames))
            answer = connection.recv(timeout=10)
            if isinstance(answer, str):
                failure = json.loads(answer)["error"]
                assert failure["kind"] in KINDS - {"failed", "unavailable"}, failure
                assert "Traceback" not in answer
            else:
                openpi.unpack(answer)


def over_vla_eval(address: str, frames: Iterator[bytes], count: int) -> None:
    """Whatever a frame is answered, the HELLO after it is answered too."""
    with connect(f"ws://{address}/vla-eval", compression=None) as connection:
        for number in range(1, count + 1):
            connection.send(next(frames))
            connection.send(vla_eval.pack(vla_eval.HELLO, {"harness_version": "1", "protocol_version": 1}, -number))
            while (answer := vla_eval.unpack(connection.recv(timeout=10))).seq != -number:
                assert answer.type in (vla_eval.ERROR, vla_eval.ACTION, vla_eval.HELLO)
                if answer.type == vla_eval.ERROR:
                    assert answer.payload["error"].partition(":")[0] in KINDS - {"failed", "unavailable"}


def over_http(address: str, frames: Iterator[bytes], count: int) -> None:
    connection = HTTPConnection(address, timeout=10)
    for _ in range(count):
        connection.request("POST", "/v1/infer", next(frames), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        body = json.loads(answer.read())
        if answer.status != 200:
            assert 400 <= answer.status < 500, body
            assert body["error"]["kind"] in KINDS
            assert body["error"]["id"]
    connection.close()


def over_tcp(address: str, frames: Iterator[bytes], count: int) -> None:
    """Bytes that are no HTTP, no upgrade or no WebSocket frame: the server may only answer in HTTP, or hang up."""
    host, port = address.split(":")
    for _ in range(count):
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            raw.sendall(next(frames))
            answer = b""
            with contextlib.suppress(OSError):  # the server may have hung up
                raw.shutdown(socket.SHUT_WR)
                while part := raw.recv(65536):
                    answer += part
            assert not answer or answer.startswith(b"HTTP/1.1 "), answer[:60]
            assert b"Traceback" not in answer


_UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
_TCP_SEEDS = [
    _UPGRADE + b"\x82\xfe\x00\x05abcdhello",
    _UPGRADE + b"\x88\x80abcd",
    b"POST /v1/infer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 12\r\n\r\n" + b"{}" * 6,
    b"POST /v1/infer HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"GET /v1/spec HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
]
SPEAKERS = {
    "openpi": (over_openpi, mutations.openpi_seeds(), mutations.as_msgpack),
    "vla-eval": (over_vla_eval, mutations.vla_eval_seeds(), mutations.as_vla_eval),
    "http": (over_http, mutations.json_seeds(), mutations.as_json),
    "tcp": (over_tcp, _TCP_SEEDS, mutations.as_json),
}


@pytest.mark.slow
@pytest.mark.parametrize("protocol", SPEAKERS)
def test_no_message_breaks_the_endpoint(protocol: str, address: str, fault_seed: int) -> None:
    speak, seeds, invented = SPEAKERS[protocol]
    rng = random.Random(f"wire/{protocol}/{fault_seed}")
    frames = iter(lambda: mutations.damaged(rng, seeds, invented), None)
    speak(address, frames, WIRE[protocol] // 5)
    warm = psutil.Process().memory_info().rss
    speak(address, frames, WIRE[protocol] - WIRE[protocol] // 5)
    assert psutil.Process().memory_info().rss - warm < 24 * 2**20
    with PolicyClient(f"ws://{address}") as client:
        assert client.infer(example(3))["reasoning"] == "go at 3"
