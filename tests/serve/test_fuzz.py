"""Malformed messages by the hundred thousand: every answer a typed error, no crash, no hang, no memory that grows."""

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from serve import mutations

from dualvla.errors import WireError
from dualvla.wire import http_json, mapping, messages, openpi, vla_eval

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
