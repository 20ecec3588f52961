"""What a student and a distant teacher say to each other: msgpack over a WebSocket. Knows numpy; no model, no socket.

The server speaks first. Then every ask gets one answer, in order.

    greeting    {"server": "dualvla-teacher", "protocol": 1, "checkpoint": digest of its files,
                 "model": {"head", "horizon", "action_size", "cameras", "image_size", "proprio_dim", "vocab_size"},
                 "fingerprints": name -> sha256 of tokenizer, prompt format and normalisation,
                 "limits": {"message_bytes", "rows", "top_k"}}
    ask         {"ask": "velocity" | "bins", "batch": {...}}          what the action head predicts (Eq. 5)
                {"ask": "words", "batch": {...}, "top_k": k, "temperature": T}  of an answer's tokens (Eq. 6)
                {"ask": "tokenizer"}                                  to align token ids with
    answer      {"values": float32 [B, K, H, D] velocities at the batch's (A_tau, tau), or [B, H, D, bins] logits}
                {"ids": int64 [B, T + 1, k], rising, "log_p": float32 [B, T + 1, k + 1]}   softened by T; the last is
                                                                      the mass of all other tokens
                {"tokenizer": its JSON}
    error       {"error": {"kind": "bad_ask" | "failed", "message"}}

Arrays are those of `openpi.pack`. A batch holds, with equal first dimension: images uint8 [B, cameras, S, S, 3],
instruction_ids int64 and instruction_mask bool [B, I], proprio float32 [B, P], has_proprio bool [B], text_ids int64 and
text_mask bool [B, T]; for an action teacher also actions float32 [B, H, D] (normalised), action_mask bool [B, H], tau
float32 [B, K], noise float32 [B, K, H, D].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualvla.errors import ServerError, WireError
from dualvla.wire.openpi import WireLimits, pack, unpack

SERVER = "dualvla-teacher"
PROTOCOL = 1
SCHEMES = ("ws://", "wss://")  # by which a teacher's address is told from a checkpoint's
LIMITS = WireLimits(max_message_bytes=64 * 2**20, max_rank=5)
MAX_ROWS = 512

_PROMPT = {
    "images": ("uint8", 5), "instruction_ids": ("int64", 2), "instruction_mask": ("bool", 2),
    "proprio": ("float32", 2), "has_proprio": ("bool", 1), "text_ids": ("int64", 2), "text_mask": ("bool", 2),
}  # fmt: skip
_ACTIONS = {"actions": ("float32", 3), "action_mask": ("bool", 2), "tau": ("float32", 2), "noise": ("float32", 4)}
FIELDS: Mapping[str, Mapping[str, tuple[str, int]]] = {
    "velocity": {**_PROMPT, **_ACTIONS},
    "bins": {**_PROMPT, **_ACTIONS},
    "words": _PROMPT,
}
"""ask -> field of its batch -> (dtype, rank)."""


@dataclass(frozen=True)
class Ask:
    """kind: velocity, bins, words or tokenizer. batch: see FIELDS; top_k and temperature: of words."""

    kind: str
    batch: Mapping[str, np.ndarray]
    top_k: int = 0
    temperature: float = 1.0


def ask_to_bytes(ask: Ask) -> bytes:
    """Raises: WireError for a batch beyond the limits."""
    message: dict[str, Any] = {"ask": ask.kind}
    if ask.kind in FIELDS:
        message["batch"] = {name: np.ascontiguousarray(ask.batch[name]) for name in FIELDS[ask.kind]}
    if ask.kind == "words":
        message |= {"top_k": ask.top_k, "temperature": float(ask.temperature)}
    frame = pack(message)
    if len(frame) > LIMITS.max_message_bytes:
        raise WireError(
            f"A batch of {len(frame)} bytes is over a teacher's limit of {LIMITS.max_message_bytes}.",
            "ask with smaller batches: more micro-batches",
        )
    return frame


def ask_from_bytes(frame: bytes) -> Ask:
    """Every field checked but against the model. Raises: WireError naming what is wrong."""
    message = _map(unpack(frame, LIMITS))
    kind = message.get("ask")
    if kind == "tokenizer":
        return Ask("tokenizer", {})
    if not isinstance(kind, str) or kind not in FIELDS:
        raise WireError(f"A teacher cannot be asked for {kind!r:.40}.")
    batch = _map(message.get("batch"))
    rows = None
    for name, (dtype, rank) in FIELDS[kind].items():
        array = batch.get(name)
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != rank:
            raise WireError(f"'{name}' must be a {dtype} array of rank {rank}.")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise WireError(f"'{name}' holds values that are not finite.")
        rows = len(array) if rows is None else rows
        if len(array) != rows or not 1 <= rows <= MAX_ROWS:
            raise WireError(f"'{name}' has {len(array)} rows; all have equally many, 1 to {MAX_ROWS}.")
    if kind != "words":
        return Ask(kind, batch)
    top_k, temperature = message.get("top_k"), message.get("temperature")
    if type(top_k) is not int or top_k < 1:
        raise WireError(f"'top_k' must be a positive integer, not {top_k!r:.40}.")
    if not isinstance(temperature, float) or not 0.01 <= temperature <= 100.0:
        raise WireError(f"'temperature' must be a number from 0.01 to 100, not {temperature!r:.40}.")
    return Ask(kind, batch, top_k, temperature)


def greeting_to_bytes(checkpoint: str, model: Mapping[str, Any], fingerprints: Mapping[str, str], top_k: int) -> bytes:
    return pack(
        {
            "server": SERVER,
            "protocol": PROTOCOL,
            "checkpoint": checkpoint,
            "model": dict(model),
            "fingerprints": dict(fingerprints),
            "limits": {"message_bytes": LIMITS.max_message_bytes, "rows": MAX_ROWS, "top_k": top_k},
        }
    )


def greeting_from_bytes(frame: Any) -> dict[str, Any]:
    """Raises: WireError if the other side is no teacher of this protocol version."""
    greeting = dict(_map(unpack(frame, LIMITS))) if isinstance(frame, bytes) else {}
    if greeting.get("server") != SERVER:
        raise WireError("This endpoint did not greet as a teacher.", "check the URL: `dualvla teach --serve` prints it")
    if greeting.get("protocol") != PROTOCOL:
        raise WireError(
            f"The teacher speaks protocol {greeting.get('protocol')!r:.20}, this student {PROTOCOL}.",
            "install the same version of dualvla on both sides",
        )
    for name in ("model", "fingerprints", "limits"):
        _map(greeting.get(name))
    if not isinstance(greeting.get("checkpoint"), str):
        raise WireError("The teacher's greeting names no checkpoint.")
    return greeting


def answer_from_bytes(frame: Any) -> dict[str, Any]:
    """Raises: WireError for an answer that is none; ServerError for the teacher's own error."""
    if not isinstance(frame, bytes):
        raise WireError("The teacher answered with text.")
    answer = _map(unpack(frame, LIMITS))
    if "error" in answer:
        error = _map(answer["error"])
        kind = WireError if error.get("kind") == "bad_ask" else ServerError
        raise kind(f"The teacher answered: {str(error.get('message'))[:300]}")
    return dict(answer)


def error_to_bytes(kind: str, message: str) -> bytes:
    return pack({"error": {"kind": kind, "message": message}})


def array(answer: Mapping[str, Any], name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """One array of an answer. Raises: WireError if it is not of this dtype and shape, or not a number."""
    found = answer.get(name)
    if not isinstance(found, np.ndarray) or found.dtype != dtype or found.shape != shape:
        what = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__
        raise WireError(f"The teacher's '{name}' is {what}, not {dtype} {shape}.")
    if np.isnan(found).any():
        raise WireError(f"The teacher's '{name}' holds values that are no numbers.")
    return found


def _map(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise WireError(f"A message of a teacher must be a map of names, not {type(value).__name__}.")
    return value
