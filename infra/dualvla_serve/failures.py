"""What a client learns when something goes wrong: a short message and an id, and the log has the rest under that id."""

from __future__ import annotations

import logging
import uuid

from dualvla.errors import (
    BusyError,
    DualVLAError,
    LateError,
    ServerError,
    SessionLostError,
    StoppedError,
    UnsafeError,
    WireError,
)
from dualvla.wire.messages import Failure

log = logging.getLogger("dualvla.serve")

STATUS = {
    "bad_request": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "expired": 410,
    "unsafe": 422,
    "busy": 429,
    "failed": 500,
    "unavailable": 503,
    "stopped": 503,
    "late": 504,
}

# What a client did, or must know to act on, is told in full; what went wrong here only in kind.
_TOLD: dict[type[DualVLAError], str] = {
    WireError: "bad_request",
    LateError: "late",
    StoppedError: "stopped",
    UnsafeError: "unsafe",
    BusyError: "busy",
    SessionLostError: "expired",
}


def new_failure(kind: str, message: str) -> Failure:
    return Failure(kind, uuid.uuid4().hex[:12], message)


def kind_of(error: DualVLAError) -> str:
    for cls, kind in _TOLD.items():
        if isinstance(error, cls):
            return kind
    return "unavailable" if isinstance(error, ServerError) else "failed"


def failure_of(error: DualVLAError, where: str, observation: str = "") -> Failure:
    """Logs the error in full, and returns what may be told. observation: its id, if there is one."""
    kind = kind_of(error)
    if kind in _TOLD.values():
        failure = new_failure(kind, str(error))
    elif kind == "unavailable":
        failure = new_failure(kind, "the policy is not available, try again")
    else:
        failure = new_failure(kind, "the policy failed on this observation")
    level = logging.ERROR if kind in ("failed", "unavailable") else logging.INFO
    details = {"error_id": failure.id, "kind": kind, "where": where, "observation": observation[:128]}
    log.log(level, "error %s (%s): %s", failure.id, where, error, extra=details)
    return failure
