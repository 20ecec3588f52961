"""The flow-matching action head: the velocity that carries noise to actions.

Conventions of flow matching, everywhere: A_tau = tau A + (1 - tau) eps (tau 0 noise, tau 1 data), velocity target
A - eps, forward Euler from noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from dualvla.distill.losses import flow_kd, flow_mse
from dualvla.models.config import LossWeights
from dualvla.models.expert import ActionBatch, ActionExpert, Context


def draw_tau(rng: np.random.Generator, size: int, scale: float) -> np.ndarray:
    """tau = scale (1 - u), u ~ Beta(1.5, 1): float32 [size], more weight on noisy times (mean 0.4)."""
    return (scale * (1.0 - rng.beta(1.5, 1.0, size))).astype(np.float32)


def interpolate(actions: Tensor, noise: Tensor, tau: Tensor) -> Tensor:
    """A_tau. actions and noise [..., H, D], tau [...]."""
    tau = tau[..., None, None]
    return tau * actions + (1.0 - tau) * noise


def euler(field: Callable[[Tensor, Tensor], Tensor], noise_BHD: Tensor, steps: int) -> Tensor:
    """Integrates d A / d tau = field(A_tau, tau [B]) from noise at tau 0 to data at tau 1."""
    actions = noise_BHD
    for step in range(steps):
        tau = torch.full(actions.shape[:1], step / steps, dtype=actions.dtype, device=actions.device)
        actions = actions + field(actions, tau) / steps
    return actions


class FlowHead(ActionExpert):
    """Noisy chunks [B, K, H, D] at tau [B, K] -> velocities."""

    term = "flow"
    target = "velocity"

    def make_chunk(self, horizon: int, action_dim: int) -> None:
        hidden = self.config.hidden
        self.action_in = nn.Linear(action_dim, hidden)
        self.positions = nn.Embedding(horizon, hidden)
        self.tau_in = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def make_output(self, horizon: int, action_dim: int) -> None:
        self.velocity_out = nn.Linear(self.config.hidden, action_dim)
        nn.init.zeros_(self.velocity_out.weight)
        nn.init.zeros_(self.velocity_out.bias)

    def velocity(self, context: Context, noisy_BKHD: Tensor, tau_BK: Tensor) -> Tensor:
        """[B, K, H, D], each draw alone."""
        horizon = noisy_BKHD.shape[2]
        x = self.action_in(noisy_BKHD) + self.positions(torch.arange(horizon, device=noisy_BKHD.device))
        x = x + self.tau_in(_sinusoids(tau_BK, x.shape[-1]).to(x.dtype)).unsqueeze(2)
        return self.velocity_out(self.attend(context, x))

    def predict(self, context: Context, batch: ActionBatch) -> Tensor:
        dtype = self.latent_in.weight.dtype
        known = batch["actions"] * batch["action_mask"].unsqueeze(-1)  # what lies past the episode's end tells nothing
        noisy = interpolate(known.unsqueeze(1), batch["noise"], batch["tau"]).to(dtype)
        return self.velocity(context, noisy, batch["tau"].to(dtype))

    def loss(self, predicted: Tensor, batch: ActionBatch, mask_BH: Tensor, count: Tensor | None) -> Tensor:
        wanted = (batch["actions"].unsqueeze(1) - batch["noise"]).flatten(0, 1)
        return flow_mse(predicted.flatten(0, 1), wanted, _per_draw(mask_BH, predicted), count)

    def kd(
        self, predicted: Tensor, teacher: Tensor, mask_BH: Tensor, weights: LossWeights, count: Tensor | None
    ) -> Tensor:
        """Two Gaussians of equal variance: there is no temperature."""
        student, steps = predicted.flatten(0, 1), _per_draw(mask_BH, predicted)
        return flow_kd(student, teacher.flatten(0, 1).float(), steps, count=count)

    def sample(self, context: Context, noise_BHD: Tensor, steps: int) -> Tensor:
        noise = noise_BHD.to(self.latent_in.weight.dtype)
        return euler(
            lambda chunk, tau: self.velocity(context, chunk.unsqueeze(1), tau.unsqueeze(1)).squeeze(1), noise, steps
        )


def _per_draw(mask_BH: Tensor, predicted_BKHD: Tensor) -> Tensor:
    return mask_BH.repeat_interleave(predicted_BKHD.shape[1], dim=0)


def _sinusoids(tau: Tensor, size: int) -> Tensor:
    frequencies = torch.exp(torch.linspace(0.0, math.log(1000.0), size // 2, device=tau.device))
    angles = tau.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
