"""The msgpack codec and the messages of the vla-eval harness (PROTOCOL_VERSION 1). Not openpi's: arrays have str keys.

Frame {type, payload, seq, timestamp}; the client speaks first (HELLO); a reply carries the seq of what it answers.
Arrays are {"__ndarray__": True, "data", "dtype", "shape"}, images {"__image__": True, "format", "data", "shape"}.
Decoding is as strict as dualvla.wire.openpi's, with the same limits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

import dualvla
from dualvla.errors import WireError
from dualvla.schema import ACTION_SPACES, PolicySpec
from dualvla.wire import images, openpi
from dualvla.wire.openpi import WireLimits

PROTOCOL_VERSION = 1
HELLO, OBSERVATION, ACTION, ERROR = "hello", "observation", "action", "error"
EPISODE_START, EPISODE_END = "episode_start", "episode_end"
TYPES = (HELLO, OBSERVATION, ACTION, EPISODE_START, EPISODE_END, ERROR)
_STATES = ("states", "state")
_LIMITS = WireLimits()


@dataclass(frozen=True)
class Frame:
    type: str
    payload: Mapping[str, Any]
    seq: int


def pack(kind: str, payload: Mapping[str, Any], seq: int, timestamp_s: float | None = None) -> bytes:
    """timestamp_s: Unix time (default: now)."""
    stamp = time.time() if timestamp_s is None else timestamp_s
    frame = {"type": kind, "payload": dict(payload), "seq": seq, "timestamp": stamp}
    return msgpack.packb(frame, default=_pack_numpy)


def unpack(data: bytes, limits: WireLimits = _LIMITS) -> Frame:
    """Raises: WireError for anything malformed, beyond the limits, or of a refused type. Nothing else."""
    raw = openpi.unpack_plain(data, limits, lambda value: _unpack_numpy(value, limits))
    if not isinstance(raw, dict) or not {"type", "payload", "seq", "timestamp"} <= raw.keys():
        raise WireError("A frame must be a map of type, payload, seq and timestamp.")
    kind, payload, seq = raw["type"], raw["payload"], raw["seq"]
    if kind not in TYPES:
        raise WireError(f"Unknown frame type {kind!r:.40}.", f"choose from: {', '.join(TYPES)}")
    if not isinstance(payload, dict) or type(seq) is not int:
        raise WireError("A frame's payload must be a map and its seq an integer.")
    return Frame(kind, payload, seq)


def hello(spec: PolicySpec, name: str) -> dict[str, Any]:
    """The payload that answers a HELLO. harness_version: ours, as we are the server's side of the harness."""
    dims = ACTION_SPACES[spec.action_space].size
    arm = {
        "position": {"name": "position", "dims": 3, "format": "delta_xyz"},
        "rotation": {"name": "rotation", "dims": 3, "format": "axis_angle"},
        "gripper": {"name": "gripper", "dims": 1, "format": "continuous_01", "range": [0.0, 1.0]},
    }
    raw = {"raw": {"name": "raw", "dims": dims, "format": "raw"}}
    return {
        "harness_version": dualvla.__version__,
        "protocol_version": PROTOCOL_VERSION,
        "model_server": name,
        "capabilities": {},
        "observation_params": {},
        "action_spec": arm if dims == 7 else raw,
        "observation_spec": {
            "image": {"name": "image", "dims": 0, "format": "rgb_hwc_uint8"},
            "language": {"name": "language", "dims": 0, "format": "language"},
        },
    }


def observation_from_payload(payload: Mapping[str, Any], cameras: Sequence[str], step: int) -> dict[str, Any]:
    """An OBSERVATION's payload in our own keys (messages.py): its image of a camera's name, else its k-th image for the
    k-th camera. Raises: WireError."""
    pictures = payload.get("images")
    if not isinstance(pictures, Mapping) or not pictures:
        raise WireError("'images' must be a map: camera -> image.")
    by_place = list(pictures.values())
    out: dict[str, Any] = {"prompt": payload.get("task_description"), "step": step}
    for place, camera in enumerate(cameras):
        if camera in pictures:
            out[f"images/{camera}"] = pictures[camera]
        elif place < len(by_place):
            out[f"images/{camera}"] = by_place[place]
    state = next((payload[key] for key in _STATES if payload.get(key) is not None), None)
    if state is not None:
        out["observation/state"] = state
    return out


def _pack_numpy(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no place on the wire")


def _unpack_numpy(value: dict[Any, Any], limits: WireLimits) -> Any:
    if "__ndarray__" in value:
        return openpi.array_of(value.get("data"), value.get("dtype"), value.get("shape"), limits)
    if images.is_encoded(value):
        return images.decode_marked("image", value)
    return value
