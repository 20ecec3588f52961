"""One pure training step: L_total = L_VLA + lambda L_KD (Eq. 7). Knows no optimiser, no engine, no workers."""

from __future__ import annotations

from torch import Tensor

from dualvla.distill.teachers import Forward, Teacher
from dualvla.models.config import LossWeights


def training_loss(
    student: Forward,
    batch: dict[str, Tensor],
    weights: LossWeights,
    counts: Tensor | None = None,
    teachers: Teacher | None = None,
) -> dict[str, Tensor]:
    """{"loss": with gradient, each term of LOSS_TERMS detached}. `student` is a VLA or an engine around one.

    counts: `loss_counts` of the global batch over the number of workers; None: of this batch alone.
    """
    targets = teachers.targets(batch) if teachers is not None and weights.kd > 0.0 else {}
    return student(batch, mode="loss", counts=counts, weights=weights, targets=targets)
