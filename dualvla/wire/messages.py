"""Our messages on the wire: what an observation, a reply, the greeting and an error look like. Knows schema.py only.

One WebSocket connection is one session. The server speaks first, with `metadata`; then each observation gets one reply:

    metadata     server, version, protocol, policy {action_space, control_hz, cameras, kind, horizon, execute_steps};
                 session {id, seq, resumed};  model {name, version};  models: names;  listener: URL or None;
                 limits {max_message_bytes}
    observation  images/<camera>: uint8 [H, W, 3], or {"__image__": True, "format": "png" | "jpeg", "data": bytes};
                 prompt: str;  observation/state: float [P] (proprio, optional);
                 observation/ee_pose: float [6 per arm] (m, rad, optional);  step: int;  id: str;
                 deadline_ms: float (from its arrival, optional);  age_ms: float (of the images when sent, optional)
    reply        actions: float32 [H, D];  reasoning: str or None;  keyframe: bool;  reasoning_tokens: int;  id: str;
                 server_timing, policy_timing: name -> milliseconds;  session: str;  seq: int (1, 2, ... of the
                 session);  model {name, version};  interventions: what the safety layer changed;
                 fault {kind, id, message}: only in place of an error, where a hold was asked for (options.py)
    reset        {"reset": True}, answered by the same: the session forgets everything
    error        a *text* frame (so openpi's clients show it): {"error": {"kind", "id", "message"}} as JSON

`id` is answered unchanged. The keys of JSON over HTTP are in http_json.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

import dualvla
from dualvla.config import from_dict, to_dict
from dualvla.errors import (
    BusyError,
    LateError,
    ServerError,
    SessionLostError,
    StoppedError,
    UnsafeError,
    UsageError,
    WireError,
    did_you_mean,
)
from dualvla.schema import Observation, PolicyReply, PolicySpec
from dualvla.wire import images
from dualvla.wire.images import MAX_SIDE

PROTOCOL = 1
SESSION_HEADER = "X-Session-Id"
TAKEN_OVER = 4001  # WebSocket close code: another connection goes on with this session
RESET: Mapping[str, Any] = MappingProxyType({"reset": True})

MAX_TEXT = 4000  # characters of an instruction
MAX_MS = 3_600_000
_IMAGE = "images/"
_KEYS = ("prompt", "observation/state", "observation/ee_pose", "step", "id", "deadline_ms", "age_ms")
_NAME = re.compile(r"[!-~]{1,128}")


@dataclasses.dataclass(frozen=True)
class Request:
    """An observation and how long its answer is worth anything, in ms from its arrival; age_ms: of its images."""

    observation: Observation
    deadline_ms: float | None = None
    age_ms: float | None = None


def metadata(spec: PolicySpec, **extra: Any) -> dict[str, Any]:
    """extra: what the server adds (session, model, models, listener, limits)."""
    policy = to_dict(spec)
    return {"server": "dualvla", "version": dualvla.__version__, "protocol": PROTOCOL, "policy": policy, **extra}


def spec_from_metadata(message: Any) -> PolicySpec:
    """Raises: WireError if the other side is no DualVLA endpoint of this protocol version."""
    if not isinstance(message, Mapping) or message.get("server") != "dualvla":
        raise WireError("This endpoint did not greet as a DualVLA server.", "check the URL")
    if message.get("protocol") != PROTOCOL:
        raise WireError(
            f"The endpoint speaks protocol {message.get('protocol')!r}, this client {PROTOCOL}.",
            "install the same version of dualvla on both sides",
        )
    try:
        return from_dict(PolicySpec, message["policy"], "policy")
    except (KeyError, TypeError, UsageError) as error:
        raise WireError(f"The endpoint's greeting does not describe its policy: {error}.") from error


def is_reset(message: Any) -> bool:
    return isinstance(message, Mapping) and message.keys() == RESET.keys() and message["reset"] is True


def observation_to_wire(observation: Observation) -> dict[str, Any]:
    message: dict[str, Any] = {f"{_IMAGE}{name}": image for name, image in observation.images.items()}
    message |= {"prompt": observation.instruction, "step": int(observation.step), "id": observation.id}
    if observation.proprio is not None:
        message["observation/state"] = observation.proprio
    if observation.ee_pose is not None:
        message["observation/ee_pose"] = observation.ee_pose
    return message


def observation_from_wire(message: Any) -> Observation:
    """Every field checked. Raises: WireError naming the key and the value."""
    return request_from_wire(message).observation


def request_from_wire(message: Any) -> Request:
    """Every field checked. Raises: WireError naming the key and the value."""
    if not isinstance(message, Mapping):
        raise WireError(f"An observation must be a map, not {type(message).__name__}.")
    pictures = {}
    for key, value in message.items():
        if key.startswith(_IMAGE):
            pictures[key.removeprefix(_IMAGE)] = _image(key, value)
        elif key not in _KEYS:
            raise WireError(f"Unknown key '{key[:60]}' in an observation.", did_you_mean(key, (*_KEYS, "images/main")))
    step = message.get("step", 0)
    if type(step) is not int or not 0 <= step < 2**31:
        raise WireError(f"'step' must be a non-negative integer, not {step!r:.60}.")
    observation = Observation(
        images=pictures,
        instruction=_text("prompt", message.get("prompt"), MAX_TEXT),
        proprio=_vector(message, "observation/state", np.float32),
        ee_pose=_vector(message, "observation/ee_pose", np.float64),
        step=step,
        id=_text("id", message.get("id", ""), 128),
    )
    return Request(observation, _milliseconds(message, "deadline_ms"), _milliseconds(message, "age_ms"))


def check_fits(observation: Observation, spec: PolicySpec, example: Observation) -> None:
    """Raises: WireError if it lacks a camera of the policy, or an image or the proprio is not of the example's size."""
    for name in spec.cameras:
        if name not in observation.images:
            raise WireError(
                f"The policy sees cameras {list(spec.cameras)}; '{name}' is missing.", f"send '{_IMAGE}{name}'"
            )
        shape, wanted = observation.images[name].shape, example.images[name].shape
        if shape != wanted:
            raise WireError(f"'{_IMAGE}{name}' is {list(shape)}; the policy sees {list(wanted)}.", "resize it")
    if observation.proprio is not None and example.proprio is not None:
        size, expected = observation.proprio.size, example.proprio.size
        if size != expected:
            raise WireError(
                f"'observation/state' has {size} numbers; the policy takes {expected}.", "check their order"
            )


def reply_to_wire(reply: PolicyReply, server_timing_ms: Mapping[str, float], **extra: Any) -> dict[str, Any]:
    """extra: what the server adds to the policy's reply (session, seq, model, interventions, fault)."""
    return {
        **extra,
        "actions": np.asarray(reply.actions, np.float32),
        "reasoning": reply.reasoning,
        "keyframe": bool(reply.keyframe),
        "reasoning_tokens": int(reply.reasoning_tokens),
        "id": reply.id,
        "policy_timing": {name: float(ms) for name, ms in reply.timing.items()},
        "server_timing": dict(server_timing_ms),
    }


def reply_from_wire(message: Any) -> PolicyReply:
    """timing holds the server's and the policy's milliseconds. Raises: WireError for a reply that is not one."""
    actions = message.get("actions") if isinstance(message, Mapping) else None
    if not isinstance(actions, np.ndarray) or actions.ndim != 2:
        raise WireError("The endpoint's reply has no actions [H, D].")
    reply_id, reasoning = message.get("id"), message.get("reasoning")
    if not isinstance(reply_id, str) or not isinstance(reasoning, str | None):
        raise WireError("The endpoint's reply has an 'id' or 'reasoning' that is no text.")
    timing = {
        f"{side}_{name}": ms
        for side in ("server", "policy")
        for name, ms in (message.get(f"{side}_timing") or {}).items()
    }
    return PolicyReply(
        actions=actions.astype(np.float32),
        reasoning=reasoning,
        keyframe=bool(message.get("keyframe")),
        reasoning_tokens=int(message.get("reasoning_tokens") or 0),
        timing=timing,
        id=reply_id,
    )


@dataclasses.dataclass(frozen=True)
class Failure:
    """What a client learns of an error. kind: bad_request, unauthorized, forbidden, unavailable, failed, late, stopped,
    unsafe, busy, expired.

    id: also stands in the server's log, beside all that is not told here.
    """

    kind: str
    id: str
    message: str

    def to_dict(self) -> dict[str, Any]:
        return {"error": dataclasses.asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())


_ERRORS: Mapping[str, type[ServerError]] = {
    "late": LateError,
    "stopped": StoppedError,
    "unsafe": UnsafeError,
    "busy": BusyError,
    "expired": SessionLostError,
}


def error_from_text(text: str) -> ServerError | WireError:
    """The error that a text frame stands for: WireError if our own message was refused, else a ServerError."""
    try:
        failure = Failure(**json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return ServerError(f"The endpoint answered with an error: {text[:200]}")
    return error_from(failure)


def error_from(failure: Failure) -> ServerError | WireError:
    """The typed error that a failure's kind stands for."""
    if failure.kind == "bad_request":
        return WireError(f"The endpoint refused the message: {failure.message} (error {failure.id})")
    kind = _ERRORS.get(failure.kind, ServerError)
    return kind(f"The endpoint answered: {failure.message} ({failure.kind}, error {failure.id})")


def session_name(name: str) -> str:
    """A session's name as a client may choose it. Raises: WireError."""
    if not _NAME.fullmatch(name):
        raise WireError(f"The session name {name[:60]!r} is refused.", "use 1 to 128 printable ASCII characters")
    return name


def _image(key: str, value: Any) -> np.ndarray:
    if images.is_encoded(value):
        value = images.decode_marked(key, value)
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3:
        raise WireError(f"'{key[:60]}' must be a uint8 array [H, W, 3], not {_describe(value)}.")
    if not all(1 <= side <= MAX_SIDE for side in value.shape[:2]):
        raise WireError(f"'{key[:60]}' has size {value.shape[:2]}; each side must be 1 to {MAX_SIDE} pixels.")
    return value


def _text(key: str, value: Any, limit: int) -> str:
    if not isinstance(value, str):
        raise WireError(f"'{key}' must be text, not {_describe(value)}.")
    if len(value) > limit:
        raise WireError(f"'{key}' of {len(value)} characters is over the limit of {limit}.")
    return value


def _vector(message: Mapping[str, Any], key: str, dtype: type) -> np.ndarray | None:
    value = message.get(key)
    if value is None:
        return None
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in "iuf":
        raise WireError(f"'{key}' must be an array of numbers [N], not {_describe(value)}.")
    if not np.isfinite(value).all():
        raise WireError(f"'{key}' holds a value that is not finite.")
    return value.astype(dtype)


def _milliseconds(message: Mapping[str, Any], key: str) -> float | None:
    value = message.get(key)
    if value is None:
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_MS:
        raise WireError(f"'{key}' must be 0 to {MAX_MS} milliseconds, not {value!r:.60}.")
    return float(value)


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
