"""Malformed messages of every protocol: real ones with damaged bytes, and well-formed ones of impossible content.

Everything is drawn from one `random.Random`, so a failing frame is found again by its seed.
"""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
from PIL import Image

from dualvla.schema import Observation
from dualvla.wire import messages, openpi, vla_eval

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
_KEYS = (
    "images/main", "images/", "images", "prompt", "observation/state", "observation/ee_pose", "step", "id", "reset",
    "deadline_ms", "age_ms", "observation/image", "observation/exterior_image_1_left", "observation/joint_position",
    "__ndarray__", b"__ndarray__", "__image__", "__npgeneric__", b"__npgeneric__", "data", b"data", "dtype", b"dtype",
    "shape", b"shape", "format", "type", "payload", "seq", "timestamp", "states", "task_description", "instruction",
    "proprio", "ee_pose", "harness_version", "protocol_version",
)  # fmt: skip
_VALUES = (
    None, True, False, 0, 1, -1, 2**31, 2**63 - 1, -(2**63), 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "main",
    "hello", "observation", "action", "episode_start", "png", "jpeg", "raw", "<f4", "|u1", "O", "V8", "<U4", "M8[ns]",
    "\x00", "💥" * 50, b"", b"\x00" * 64, b"\x89PNG\r\n\x1a\n", "x" * 5000, [16, 24, 3], [-1],
    [2**40, 2**40], [0, 0, 3],
)  # fmt: skip
# Headers of msgpack that promise more than follows, extension types, and a byte that is none of its types.
_HEADERS = (
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc9\x00\x00",
    b"\xd8\x05" + bytes(16), b"\xd6\xff" + bytes(4), b"\xc1", b"\x91" * 600, b"\x81\xa1a" * 600, b"\xcb\x7f\xf8",
)  # fmt: skip


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, kind)
    return file.getvalue()


def openpi_seeds() -> list[bytes]:
    state = np.arange(3, dtype=np.float32)
    plain = messages.observation_to_wire(Observation({"main": PIXELS}, "go", state, np.zeros(6), 4, "x"))
    marked = {"__image__": True, "format": "png", "data": encoded("PNG"), "shape": [16, 24, 3]}
    return [
        openpi.pack(plain),
        openpi.pack({**plain, "images/main": marked, "deadline_ms": 50.0, "age_ms": 1.0}),
        openpi.pack({**plain, "images/main": {**marked, "format": "jpeg", "data": encoded("JPEG")}}),
        openpi.pack({"observation/image": PIXELS, "observation/state": state, "prompt": "go"}),
        openpi.pack(dict(messages.RESET)),
    ]


def vla_eval_seeds() -> list[bytes]:
    marked = {"__image__": True, "format": "png", "data": encoded("PNG"), "shape": [16, 24, 3]}
    array = {"__ndarray__": True, "data": PIXELS.tobytes(), "dtype": "|u1", "shape": [16, 24, 3]}
    states = {"__ndarray__": True, "data": bytes(12), "dtype": "<f4", "shape": [3]}
    seen = [{"images": {"primary": i}, "states": states, "task_description": "go"} for i in (marked, array)]
    return [
        vla_eval.pack("hello", {"harness_version": "0.1", "protocol_version": 1}, 0, 0.0),
        *(vla_eval.pack("observation", payload, 1, 0.0) for payload in seen),
        vla_eval.pack("episode_start", {"task": {"name": "pick"}}, 2, 0.0),
        vla_eval.pack("episode_end", {"result": {"success": True}}, 3, 0.0),
    ]


def json_seeds() -> list[bytes]:
    body = {"instruction": "go", "proprio": [0, 1, 2], "step": 1, "id": "x"}
    images = [base64.b64encode(encoded(kind)).decode() for kind in ("PNG", "JPEG")]
    return [json.dumps({"images": {"main": image}, **body}).encode() for image in (*images, PIXELS.tolist())]


def damaged(rng: random.Random, seeds: list[bytes], invented: Callable[[Any], bytes]) -> bytes:
    """Either one of the seeds with damaged bytes, or a well-formed message of impossible content."""
    if rng.random() < 0.3:
        return invented(impossible(rng))
    frame = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        _damage(rng, frame, seeds)
    return bytes(frame)


def impossible(rng: random.Random, depth: int = 0) -> Any:
    if depth == 0 or (depth < 4 and rng.random() < 0.4):
        keys = rng.sample(_KEYS, rng.randint(0, 6))
        return {key: impossible(rng, depth + 1) for key in keys}
    if rng.random() < 0.1:
        return [rng.choice(_VALUES) for _ in range(rng.choice((1, 3, 2000)))]
    return rng.choice(_VALUES)


def as_msgpack(value: Any) -> bytes:
    return msgpack.packb(value)


def as_vla_eval(value: Any) -> bytes:
    """The frame is right, its payload is not."""
    return msgpack.packb({"type": "observation", "payload": value, "seq": 1, "timestamp": 0.0})


def as_json(value: Any) -> bytes:
    return json.dumps(_textual(value)).encode()


def _textual(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _textual(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_textual(item) for item in value]
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _damage(rng: random.Random, frame: bytearray, seeds: list[bytes]) -> None:
    # Most of a frame is pixels: half of all damage goes where its structure is.
    end = len(frame) if rng.random() < 0.5 else min(len(frame), 160)
    at = rng.randrange(end + 1) if end else 0
    match rng.randrange(7):
        case 0 if frame:
            frame[min(at, len(frame) - 1)] ^= 1 << rng.randrange(8)
        case 1 if frame:
            frame[min(at, len(frame) - 1)] = rng.randrange(256)
        case 2:
            del frame[at:]
        case 3:
            del frame[at : at + rng.randint(1, 20)]
        case 4:
            frame[at:at] = frame[at : at + rng.randint(1, 40)]
        case 5:
            frame[at:at] = rng.choice(_HEADERS)
        case _:
            other = rng.choice(seeds)
            frame[at:] = other[rng.randrange(len(other)) :]
