"""The loss terms as plain functions of tensors: Eq. 5 to 7 and flow matching. Knows nothing of models or data.

Every term is a sum over its unmasked entries divided by a count. By default the count is the number of unmasked entries
here; passing `count` (the global batch's count / number of workers) makes the mean over workers of the local losses
equal the loss of the global batch exactly.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dualvla.models.config import Divergence


def masked_mean(values: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """Sum of `values` where `mask` / count; 0 for an empty mask."""
    mask = mask.to(torch.bool).expand_as(values)
    total = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device)).sum()
    number = mask.sum() if count is None else count
    number = number.to(device=values.device, dtype=values.dtype)
    return total / torch.where(number > 0, number, torch.ones_like(number))


def divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, kind: Divergence = "forward", mix: float = 0.5
) -> Tensor:
    """Between the categorical distributions p (teacher) and q (student), both softened by T; [..., V] -> [...].

    forward KL(p || q) (Eq. 5 and 6); reverse KL(q || p); mixed: mix x forward + (1 - mix) x reverse; jensen-shannon:
    mix x KL(p || m) + (1 - mix) x KL(q || m) with m = mix p + (1 - mix) q. Each is 0 iff p = q (0 < mix < 1).
    In float32, or float64 where the student's logits are.
    """
    p = F.log_softmax(wide(teacher_logits) / temperature, dim=-1)
    q = F.log_softmax(wide(student_logits) / temperature, dim=-1)
    if kind == "forward":
        return _kl(p, q)
    if kind == "reverse":
        return _kl(q, p)
    if kind == "mixed":
        return mix * _kl(p, q) + (1.0 - mix) * _kl(q, p)
    m = torch.logaddexp(p + math.log(mix), q + math.log1p(-mix))
    return mix * _kl(p, m) + (1.0 - mix) * _kl(q, m)


def token_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    temperature: float,
    count: Tensor | None = None,
    kind: Divergence = "forward",
    mix: float = 0.5,
) -> Tensor:
    """T^2 x mean over unmasked tokens of `divergence` (Eq. 6).

    Logits [B, T, V], mask [B, T]. A scalar in the student's dtype; 0 for an empty mask.
    """
    mask = mask.to(torch.bool)  # only unmasked tokens [n, V] are softened: of a batch they are few
    apart_n = divergence(student_logits[mask], teacher_logits[mask], temperature, kind, mix)
    return (temperature**2 * masked_mean(apart_n, mask[mask], count)).to(student_logits.dtype)


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


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities [..., V]."""
    return F.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1)


def wide(logits: Tensor) -> Tensor:
    """In float32, or float64 if they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _steps(mask: Tensor, velocity: Tensor) -> Tensor:
    mask = mask.unsqueeze(1) if mask.dim() == 1 else mask
    return mask.expand(velocity.shape[:2])
