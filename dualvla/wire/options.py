"""What a client may choose for its session, by name, in the query of its URL: so unmodified clients can choose, too.

    ws://HOST:PORT/?session=arm-1&model=dual&deadline_ms=200&reasoning=every:5&ensemble=mean&on_fault=hold

Knows errors only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, cast, get_args

from dualvla.errors import WireError, did_you_mean

Gripper = Literal["open01", "closed01", "open11", "closed11"]
OnFault = Literal["error", "hold"]
Resize = Literal["refuse", "fit"]

SESSION, RESUME = "session", "resume"  # in the same query; they name the session and are no options of it
_MOST_MS = 3_600_000.0


@dataclass(frozen=True)
class SessionOptions:
    """model: of the endpoint's ("" for its first). deadline_ms: of observations that carry none of their own.

    reasoning: "auto", "never" or "every:K"; "" leaves it to the checkpoint. ensemble: "off", "mean", or "exp:RATE" (a
    chunk's weight falls by exp(-RATE) a control step). gripper: what 1 means and the range, 0..1 or -1..1; open01 is
    our own. on_fault "hold": a fault is answered by a safe action and what happened. keys: mapping.py. resize "fit":
    images of another size are made to fit, with black bars; "refuse": they are an error.
    """

    model: str = ""
    deadline_ms: float | None = None
    reasoning: str = ""
    ensemble: str = "off"
    gripper: Gripper = "open01"
    on_fault: OnFault = "error"
    keys: str = "auto"
    resize: Resize | None = None  # None: fit for other people's protocols, refuse for ours

    @property
    def ensemble_rate(self) -> float | None:
        """exp(-rate) is a chunk's weight per control step of age; None: no ensemble."""
        if self.ensemble == "off":
            return None
        return 0.0 if self.ensemble == "mean" else float(self.ensemble.removeprefix("exp:"))


def options_from_query(query: Mapping[str, str], defaults: SessionOptions = SessionOptions()) -> SessionOptions:
    """Raises: WireError for an unknown name or value; `session` and `resume` are passed over."""
    known = {field.name for field in fields(SessionOptions)}
    values = {name: getattr(defaults, name) for name in known}
    for name, text in query.items():
        if name in (SESSION, RESUME):
            continue
        if name not in known:
            raise WireError(f"Unknown option '{name[:60]}'.", did_you_mean(name, (*known, SESSION, RESUME)))
        values[name] = _value(name, text)
    return SessionOptions(**values)


def resume_from_query(query: Mapping[str, str]) -> int | None:
    """The number of the last reply that a returning client has. Raises: WireError."""
    text = query.get(RESUME)
    if text is None:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > 15:
        raise WireError(f"'{RESUME}={text[:40]}' is no number of a reply.", "pass `seq` of the last reply")
    return int(text)


def _value(name: str, text: str) -> str | float:
    if name == "deadline_ms":
        return _number(name, text, 1.0, _MOST_MS)
    if name == "reasoning":
        mode, _, steps = text.partition(":")
        counted = mode == "every" and steps.isascii() and steps.isdecimal() and len(steps) < 7 and int(steps) > 0
        return _chosen(name, text, counted or text in ("auto", "never"), "auto, never or every:K")
    if name == "ensemble":
        if text.startswith("exp:"):
            _number(name, text.removeprefix("exp:"), 0.0, 100.0)
            return text
        return _chosen(name, text, text in ("off", "mean"), "off, mean or exp:RATE")
    choices = {"gripper": Gripper, "on_fault": OnFault, "resize": Resize}
    if name in choices:
        allowed = cast(tuple[str, ...], get_args(choices[name]))
        return _chosen(name, text, text in allowed, ", ".join(allowed))
    return _chosen(name, text, len(text) <= 128 and text.isprintable(), "at most 128 printable characters")


def _chosen(name: str, text: str, good: bool, choices: str) -> str:
    if not good:
        raise WireError(f"'{name}={text[:40]}' is not allowed.", f"choose {choices}")
    return text


def _number(name: str, text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise WireError(f"'{name}={text[:40]}' is not {low:g} to {high:g}.", "pass a number")
    return value
