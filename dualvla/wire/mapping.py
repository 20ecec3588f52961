"""Other people's observation keys as ours: which of their images, states and prompts a robot's messages carry.

openpi's keys differ from robot to robot, so an endpoint names a mapping, or recognises one ("auto"). The k-th image of
a mapping is the k-th camera of the policy, unless the mapping names its cameras. Knows messages.py's keys only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualvla.errors import WireError, did_you_mean

OWN = "dualvla"
AUTO = "auto"
_KEPT = ("step", "id", "deadline_ms", "age_ms")


@dataclass(frozen=True)
class ObservationKeys:
    """images: their keys in the order of the policy's cameras (or of `cameras`). state: keys whose numbers make the
    proprio, one after another. Keys that are not named here are left aside."""

    images: tuple[str, ...]
    state: tuple[str, ...] = ()
    prompt: str = "prompt"
    cameras: tuple[str, ...] = ()


BUILT_IN: Mapping[str, ObservationKeys] = {
    "droid": ObservationKeys(
        ("observation/exterior_image_1_left", "observation/wrist_image_left"),
        ("observation/joint_position", "observation/gripper_position"),
    ),
    "libero": ObservationKeys(("observation/image", "observation/wrist_image"), ("observation/state",)),
}


def translate(
    message: Any, name: str, cameras: Sequence[str], mappings: Mapping[str, ObservationKeys] = BUILT_IN
) -> tuple[dict[str, Any], str]:
    """The message in our own keys (messages.py), and the mapping that fitted. `name`: one of `mappings`, "dualvla" for
    our own keys, or "auto": ours if any `images/` key is there, else the first whose first image is there.

    Raises: WireError if it is no map, nothing fits, or a state is no numbers.
    """
    if not isinstance(message, Mapping):
        raise WireError(f"An observation must be a map, not {type(message).__name__}.")
    if name == AUTO:
        name = _recognise(message, mappings)
    if name == OWN:
        return dict(message), OWN
    if name not in mappings:
        raise WireError(f"Observation keys '{name[:60]}' are not known here.", did_you_mean(name, (*mappings, OWN)))
    keys = mappings[name]
    out: dict[str, Any] = {key: message[key] for key in _KEPT if key in message}
    for theirs, camera in zip(keys.images, keys.cameras or cameras, strict=False):
        if theirs not in message:
            raise WireError(f"'{theirs}' is missing; with keys '{name}' it is camera '{camera}'.", "send it")
        out[f"images/{camera}"] = message[theirs]
    out["prompt"] = message.get(keys.prompt)
    state = [_numbers(key, message[key]) for key in keys.state if key in message]
    if state:
        out["observation/state"] = np.concatenate(state)
    return out, name


def _recognise(message: Mapping[Any, Any], mappings: Mapping[str, ObservationKeys]) -> str:
    if any(isinstance(key, str) and key.startswith("images/") for key in message):
        return OWN
    for name, keys in mappings.items():
        if keys.images[0] in message:
            return name
    return OWN  # whose own error names what is missing


def _numbers(key: str, value: Any) -> np.ndarray:
    array = np.asarray(value) if isinstance(value, int | float | np.ndarray | np.generic) else None
    if array is None or array.dtype.kind not in "iuf" or array.ndim > 1:
        raise WireError(f"'{key}' must be numbers [N].")
    return array.reshape(-1).astype(np.float64)
