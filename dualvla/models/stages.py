"""Which parameters train in which stage: one table. Knows parameter names, not how training is done."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

from torch import nn

from dualvla.errors import UsageError, did_you_mean
from dualvla.models.config import Adapter, Group, ModelConfig


@dataclass(frozen=True)
class Stage:
    """adapters: what the model has from this stage on; trains: the groups that learn. *_from_scratch: the same where
    the backbone started from random weights, and must first learn to see and to speak."""

    kind: Literal["specialist", "reasoning"]
    adapters: tuple[Adapter, ...]
    trains: frozenset[Group]
    adapters_from_scratch: tuple[Adapter, ...]
    from_scratch: frozenset[Group]


_BOTH: tuple[Adapter, ...] = ("action", "language")

# fmt: off
STAGES: dict[str, Stage] = {
    "specialist": Stage("specialist",
        ("action",), frozenset({"queries", "grounding", "head", "tower", "action"}),
        (),          frozenset({"queries", "grounding", "head", "tower", "backbone", "vision", "words"})),
    "reasoning": Stage("reasoning",
        _BOTH, frozenset({"language", "gate"}),
        _BOTH, frozenset({"language", "gate", "words"})),  # the specialist has hardly met the words of reasoning
    "dual": Stage("reasoning",
        _BOTH, frozenset({"queries", "action", "language", "gate"}),
        _BOTH, frozenset({"queries", "action", "language", "gate"})),
}
# fmt: on

_PATTERNS: tuple[tuple[str, Group], ...] = (
    (r"\.adapters\.action\.", "action"),
    (r"\.adapters\.language\.", "language"),
    (r"\.adapter_gate\.", "gate"),
    (r"\.(embed_tokens|lm_head)\.", "words"),
    (r"^backbone\.hf\.(model\.)?(vision_model|vision_tower|visual)\.", "vision"),
    (r"^backbone\.", "backbone"),
    (r"^(queries|proprio_in)\.", "queries"),
    (r"^grounding\.", "grounding"),
    (r"^head\.tower\.dino\.", "tower"),
    (r"^head\.", "head"),
)


def get_stage(name: str) -> Stage:
    """Raises: UsageError with the nearest name."""
    if name not in STAGES:
        raise UsageError(f"Unknown stage '{name}'.", did_you_mean(name, STAGES))
    return STAGES[name]


def group_of(parameter: str) -> Group:
    """The group of a VLA's parameter, by its name."""
    return next(group for pattern, group in _PATTERNS if re.search(pattern, parameter))


def prepare(config: ModelConfig, stage: str) -> ModelConfig:
    """The model's configuration in this stage: its kind, and the adapters it needs beside those it has."""
    row = get_stage(stage)
    wanted = row.adapters_from_scratch if config.backbone is None else row.adapters
    adapters = tuple(name for name in _BOTH if name in wanted or name in config.adapters)
    return dataclasses.replace(config, kind=row.kind, adapters=adapters)


def apply_stage(model: nn.Module, stage: str, config: ModelConfig) -> list[str]:
    """Sets requires_grad of every parameter; returns the names of those that train."""
    row = get_stage(stage)
    groups = (row.from_scratch if config.backbone is None else row.trains) | set(config.tuned)
    groups -= set(config.frozen)
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(group_of(name) in groups)
        if parameter.requires_grad:
            trained.append(name)
    return trained
