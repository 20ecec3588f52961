"""Observations and replies as JSON, for whoever has no msgpack. Knows messages.py and images.py.

observation  images: camera -> base64 PNG or JPEG, or nested lists [H][W][3] of 0..255;  instruction;
             proprio, ee_pose: lists of numbers (optional);  step;  id;  deadline_ms, age_ms (optional)
reply        actions: [H][D];  reasoning;  keyframe;  reasoning_tokens;  id;  timing_ms;  session;  seq;  model;
             interventions;  fault (if one happened and a hold was asked for)
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dualvla.errors import WireError
from dualvla.schema import Observation, PolicyReply
from dualvla.wire import images, messages
from dualvla.wire.messages import Request


def observation_from_json(body: Mapping[str, Any]) -> Observation:
    """Raises: WireError naming the key and the value."""
    return request_from_json(body).observation


def request_from_json(body: Mapping[str, Any]) -> Request:
    """With the deadline and age of it, if the body has them. Raises: WireError naming the key and the value."""
    pictures = body.get("images")
    if not isinstance(pictures, Mapping):
        raise WireError("'images' must be an object: camera -> image.")
    wire: dict[str, Any] = {f"images/{name}": decode_image(name, value) for name, value in pictures.items()}
    wire |= {"prompt": body.get("instruction"), "step": body.get("step", 0), "id": body.get("id", "")}
    for key, name in (("proprio", "observation/state"), ("ee_pose", "observation/ee_pose")):
        if body.get(key) is not None:
            wire[name] = _numbers(key, body[key])
    wire |= {key: body[key] for key in ("deadline_ms", "age_ms") if body.get(key) is not None}
    return messages.request_from_wire(wire)


def reply_to_json(reply: PolicyReply, server_timing_ms: Mapping[str, float], **extra: Any) -> dict[str, Any]:
    """extra: what the server adds to the policy's reply (session, seq, model, interventions, fault)."""
    return {
        **extra,
        "actions": np.asarray(reply.actions, np.float64).tolist(),
        "reasoning": reply.reasoning,
        "keyframe": bool(reply.keyframe),
        "reasoning_tokens": int(reply.reasoning_tokens),
        "id": reply.id,
        "timing_ms": {name: float(ms) for name, ms in {**reply.timing, **server_timing_ms}.items()},
    }


def decode_image(name: str, value: Any) -> np.ndarray:
    """uint8 [H, W, 3]. The size is checked before any pixel is decoded. Raises: WireError."""
    if not isinstance(value, str):
        return _numbers(f"images.{name}", value, integers=True)
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise WireError(f"'images.{name[:60]}' is no base64: {error}.") from error
    return images.decode(f"images.{name}", data)


def _numbers(key: str, value: Any, integers: bool = False) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise WireError(f"'{key}' is a ragged list.") from error
    if array.dtype.kind not in ("iu" if integers else "iuf") or not math.prod(array.shape):
        raise WireError(f"'{key}' must hold {'integers' if integers else 'numbers'} only, and at least one.")
    if not integers:
        return array.astype(np.float64)
    if array.min() < 0 or array.max() > 255:
        raise WireError(f"'{key}' holds values outside 0..255.")
    return array.astype(np.uint8)
