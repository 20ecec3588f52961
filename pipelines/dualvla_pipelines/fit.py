"""Whether model, recipe and data belong together, said before anything is trained. Knows configurations only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dualvla.config import to_dict
from dualvla.errors import CheckpointError
from dualvla.models.config import ModelConfig, computed_as
from dualvla_pipelines.samples import RobotFacts

_LEARNED = ("think_above",)  # set from data when a checkpoint is written


def check_architecture(found: ModelConfig, wanted: ModelConfig, folder: str) -> None:
    """Raises: CheckpointError naming the first thing in which a checkpoint's model is not the recipe's."""
    ours = {n: value for n, value in to_dict(computed_as(wanted, found)).items() if n not in _LEARNED}
    difference = _difference(to_dict(found), ours)
    if difference is not None:
        name, there, here = difference
        raise CheckpointError(
            f"'{folder}' is of another architecture: {name} is {there!r} there, {here!r} in the recipe.",
            "pass a checkpoint of this recipe, or set the model's keys with --set model.KEY=VALUE",
        )


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """What `wanted` names and `found` has otherwise. A checkpoint says more of its backbone than a recipe does."""
    for name, ours in wanted.items():
        theirs = found.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            inner = _difference(theirs, ours)
            if inner is not None:
                return f"{name}.{inner[0]}", *inner[1:]
        elif theirs != ours:
            return name, theirs, ours
    return None


def check_fit(config: ModelConfig, facts: RobotFacts, data: str) -> None:
    """Raises: CheckpointError naming the first thing in which model and data do not agree."""
    size = (config.image_size, config.image_size)
    wanted: dict[str, tuple[Any, Any]] = {
        "action_space": (config.action_space, facts.action_space),
        "control_hz": (config.control_hz, facts.control_hz),
        "cameras": (list(config.cameras), [c for c in config.cameras if c in facts.cameras]),
        "image_size": (size, facts.image_size),
    }
    if config.proprio_dim:
        wanted["proprio_dim"] = (config.proprio_dim, facts.proprio_dim)
    for name, (model, found) in wanted.items():
        if model != found:
            raise CheckpointError(
                f"The model's {name} is {model!r}, but the data in '{data}' has {found!r}.",
                f"train on other data, or set model.{name}",
            )
