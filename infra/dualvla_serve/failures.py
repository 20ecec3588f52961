"""What a client learns when something goes wrong: a short message and an id, and the log has the rest under that id."""

from __future__ import annotations

import logging
import uuid

from dualvla.errors import DualVLAError, ServerError, WireError
from dualvla.wire.messages import Failure

log = logging.getLogger("dualvla.serve")

STATUS = {"bad_request": 400, "unauthorized": 401, "forbidden": 403, "failed": 500, "unavailable": 503}


def new_failure(kind: str, message: str) -> Failure:
    return Failure(kind, uuid.uuid4().hex[:12], message)


def failure_of(error: DualVLAError, where: str) -> Failure:
    """Logs the error in full; what a client did wrong is told in full, what went wrong here only in kind."""
    if isinstance(error, WireError):
        failure = new_failure("bad_request", str(error))
        log.info("error %s (%s): %s", failure.id, where, error)
        return failure
    if isinstance(error, ServerError):
        failure = new_failure("unavailable", "the policy is not available, try again")
    else:
        failure = new_failure("failed", "the policy failed on this observation")
    log.error("error %s (%s): %s", failure.id, where, error)
    return failure
