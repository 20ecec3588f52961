"""How the gradients of acting and of reasoning pull on the weights they share: degeneration, watched while it happens.

Eq. 7 adds the terms up; where the gradients of two of them point against each other, one is learned at the cost of the
other. Knows the model's forward and nothing of optimisers: no gradient is kept, no weight is touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualvla.models.config import LossWeights

_ACTING = ("flow", "bins")
_TALKING = "lm"
_TERMS = (_TALKING, "answer", *_ACTING, "heat", "position")


def gradient_conflict(
    model: nn.Module, batch: dict[str, Tensor], counts: Tensor, weights: LossWeights, targets: Mapping[str, Tensor]
) -> dict[str, float]:
    """`grad_norm/TERM` of each weighted term, and `grad_cosine` between acting (flow or bins) and reasoning (lm).

    Of the global batch, over the trained parameters that are whole on every worker (under ZeRO-3 those below the
    persistence threshold: adapters, not the backbone). Terms that the batch lacks are left out. Collective.
    """
    shared = [p for p in model.parameters() if p.requires_grad and getattr(p, "ds_persist", True)]
    gradients = {}
    for name in _TERMS:
        gradient = _gradient(model, shared, batch, counts, _only(weights, name), {})
        if gradient is not None:
            gradients[name] = gradient
    for target in targets:
        gradient = _gradient(model, shared, batch, counts, _only(weights, "kd"), {target: targets[target]})
        if gradient is not None:
            gradients[f"kd_{target}"] = gradient
    found = {f"grad_norm/{name}": float(gradient.norm()) for name, gradient in gradients.items()}
    acting = next((gradients[name] for name in _ACTING if name in gradients), None)
    talking = gradients.get(_TALKING)
    if acting is not None and talking is not None:
        found["grad_cosine"] = float(torch.cosine_similarity(acting, talking, dim=0))
    return found


def _only(weights: LossWeights, name: str) -> LossWeights:
    others: dict[str, Any] = dict.fromkeys({*_TERMS, "kd"} - {name}, 0.0)
    return dataclasses.replace(weights, **others)


def _gradient(
    model: Any, shared: list[Tensor], batch: Any, counts: Tensor, weights: LossWeights, targets: Mapping[str, Tensor]
) -> Tensor | None:
    """The global batch's gradient of one term as one vector; None where it is zero everywhere."""
    loss = model(batch, mode="loss", counts=counts, weights=weights, targets=targets)["loss"]
    parts = torch.autograd.grad(loss, shared, allow_unused=True)
    flat = torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten().float() for p, g in zip(shared, parts, strict=True)]
    )
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    return flat if bool(flat.any()) else None
