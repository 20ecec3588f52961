"""Where the soft targets of Eq. 5 and 6 come from. The data domain picks the teacher; never both on one sample.

Knows the two things a teacher is asked for, and no model class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dualvla.distill.alignment import ids_for_teacher

Forward = Callable[..., dict[str, Tensor]]  # a VLA's forward(batch, mode=...)


class Teacher(Protocol):
    """Batch in, targets out: tensors with the batch's leading dimension, zero on rows of the other domain."""

    def targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class ActionTeacher:
    """The specialist, without the reasoning text (Eq. 5): what its head predicts.

    velocity [B, K, H, D] at the batch's own (A_tau, tau), or bin logits [B, H, D, bins].
    """

    model: Forward

    def targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return _on_rows(self.model, "action", batch, batch["robot"])


@dataclass(frozen=True)
class ReasoningTeacher:
    """The reasoning policy that training started from: logits [B, T + 1, V] of the answers (Eq. 6)."""

    model: Forward

    def targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return _on_rows(self.model, "logits", batch, ~batch["robot"])


@dataclass(frozen=True)
class Aligned:
    """A teacher whose tokenizer numbers the same words otherwise, as one with the student's numbers.

    mapping: of `alignment.token_map`.
    """

    model: Forward
    mapping: np.ndarray

    def __call__(self, batch: dict[str, Tensor], mode: str) -> dict[str, Tensor]:
        found = self.model(ids_for_teacher(batch, self.mapping), mode=mode)
        return {n: t[..., torch.from_numpy(self.mapping)] if n == "logits" else t for n, t in found.items()}


@dataclass(frozen=True)
class Teachers:
    """Both teachers, or one of them (an ablation of the paper's Table 7)."""

    action: Teacher | None = None
    reasoning: Teacher | None = None

    @classmethod
    def in_process(cls, action: Forward | None, reasoning: Forward | None) -> Teachers:
        """Teachers that are models in this process, frozen and in eval mode."""
        return cls(action and ActionTeacher(action), reasoning and ReasoningTeacher(reasoning))

    def targets(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for teacher in (self.action, self.reasoning):
            if teacher is not None:
                found.update(teacher.targets(batch))
        return found


def _on_rows(model: Forward, mode: str, batch: dict[str, Tensor], rows_B: Tensor) -> dict[str, Tensor]:
    """Runs the teacher on its own rows only, and puts the result back in their places."""
    if not rows_B.any():
        return {}
    index = rows_B.nonzero().squeeze(1)
    with torch.no_grad():
        found: Any = model({name: tensor[index] for name, tensor in batch.items()}, mode=mode)
    return {
        name: tensor.new_zeros((len(rows_B), *tensor.shape[1:])).index_copy_(0, index, tensor)
        for name, tensor in found.items()
    }
