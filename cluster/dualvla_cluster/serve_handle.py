"""A policy that Ray Serve holds, asked by its handle from anywhere in the same cluster: for sweeps, not for robots.

What the policy remembers of a session stays here, on the asking side, and travels with each question; so any replica
may answer. Knows the endpoint only by two of its methods, `describe` and `infer_batch`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from dualvla.errors import DualVLAError, PolicyError, ServerError
from dualvla.schema import Observation, PolicyReply, PolicySpec

_TIMEOUT_S = 120.0


class HandlePolicy:
    """Implements `dualvla.policy.Policy`. app: the name of a running Serve application, as `dualvla serve` names its
    own "dualvla". Raises, from every call: ServerError if it is not there; PolicyError and others that it raises."""

    def __init__(self, app: str, model: str = ""):
        self._model = model
        self._states: dict[str, dict[str, Any]] = {}
        with _translated(app):
            self._handle = serve.get_app_handle(app)
            self.spec: PolicySpec = self._handle.describe.remote(model).result(timeout_s=_TIMEOUT_S)
        self._app = app

    def infer(self, observations: Sequence[Observation], sessions: Sequence[str]) -> list[PolicyReply]:
        states = [self._states.get(session, {}) for session in sessions]
        with _translated(self._app):
            call = self._handle.infer_batch.remote(list(observations), list(sessions), states, self._model)
            answers = call.result(timeout_s=_TIMEOUT_S)
        for session, (_, state) in zip(sessions, answers, strict=True):
            self._states[session] = state
        return [reply for reply, _ in answers]

    def reset(self, session: str) -> None:
        self._states.pop(session, None)


@contextlib.contextmanager
def _translated(app: str) -> Iterator[None]:
    """Ray's errors as ours: what the policy raised, or that nobody could be asked."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, DualVLAError):
            raise error.cause from None
        raise PolicyError(f"The policy raised {type(error.cause).__name__}.") from error
    except (RayError, RayServeException, TimeoutError) as error:
        raise ServerError(
            f"Serve app '{app}' does not answer: {type(error).__name__}: {error}.",
            "see which apps run with `serve status`, and join their cluster with RAY_ADDRESS",
        ) from error
