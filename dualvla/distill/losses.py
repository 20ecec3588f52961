"""The loss terms as plain functions of tensors: Eq. 5 to 7 and flow matching. Knows nothing of models or data.

Every term is a sum over its unmasked entries divided by a count. By default the count is the number of unmasked entries
here; passing `count` (the global batch's count / number of workers) makes the mean over workers of the local losses
equal the loss of the global batch exactly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """Sum of `values` where `mask` / count; 0 for an empty mask."""
    mask = mask.to(torch.bool).expand_as(values)
    total = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device)).sum()
    number = mask.sum() if count is None else count
    number = number.to(device=values.device, dtype=values.dtype)
    return total / torch.where(number > 0, number, torch.ones_like(number))


def token_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    temperature: float,
    count: Tensor | None = None,
) -> Tensor:
    """T^2 x mean over unmasked tokens of KL(teacher || student), both softened by T (Eq. 6; Eq. 5 for token heads).

    Logits [B, T, V], mask [B, T]. A scalar in the student's dtype; 0 for an empty mask.
    """
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    kl_BT = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    return (temperature**2 * masked_mean(kl_BT, mask, count)).to(student_logits.dtype)


def flow_mse(velocity: Tensor, target: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """L_FM: mean over unmasked chunk steps and all dimensions of the squared velocity error.

    [B, H, D], mask [B] or [B, H]; `count` counts chunk steps.
    """
    return masked_mean((velocity - target).square().mean(dim=-1), _steps(mask, velocity), count)


def flow_kd(
    student_velocity: Tensor,
    teacher_velocity: Tensor,
    mask: Tensor,
    weight: Tensor | float = 1.0,
    count: Tensor | None = None,
) -> Tensor:
    """KL of two Gaussians of equal isotropic variance at the same (A_tau, tau) (Eq. 5).

    That is the squared error reduced exactly as L_FM, times 1/2.

    [B, H, D], mask [B] or [B, H], weight w(tau) [B]. Zero iff the velocities agree on every unmasked step.
    """
    error_BH = (student_velocity - teacher_velocity).square().mean(dim=-1)
    weight_B1 = torch.as_tensor(weight, dtype=error_BH.dtype, device=error_BH.device).reshape(-1, 1)
    return 0.5 * masked_mean(error_BH * weight_B1, _steps(mask, student_velocity), count)


def _steps(mask: Tensor, velocity: Tensor) -> Tensor:
    mask = mask.unsqueeze(1) if mask.dim() == 1 else mask
    return mask.expand(velocity.shape[:2])
