"""The action expert: a flow-matching transformer over [vision | latent action | proprioception | noisy chunk].

Attention is block-wise causal in that order. Conventions of flow matching, everywhere: A_tau = tau A + (1 - tau) eps
(tau 0 noise, tau 1 data), velocity target A - eps, forward Euler from noise.

Knows nothing of text, images or units: actions are normalised numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualvla.models.config import FlowHeadConfig

Context = list[tuple[Tensor, Tensor]]  # per layer: keys and values [B, heads, n, hidden / heads]


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


class FlowBlock(nn.Module):
    """Pre-norm attention and MLP, applied to the context once and to the chunk of every draw."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.norm_mlp = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., n, hidden] -> query, key, value [..., heads, n, hidden / heads]"""
        q, k, v = self.qkv(self.norm_attention(x)).chunk(3, dim=-1)
        split = (self.heads, x.shape[-1] // self.heads)
        return tuple(t.unflatten(-1, split).transpose(-3, -2) for t in (q, k, v))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.out(attended.transpose(-3, -2).flatten(-2))
        return x + self.mlp(self.norm_mlp(x))


class FlowHead(nn.Module):
    """Latent action [B, N, d], proprioception [B, P], noisy chunks [B, K, H, D] at tau [B, K] -> velocities."""

    def __init__(self, config: FlowHeadConfig, latent_dim: int, horizon: int, action_dim: int, proprio_dim: int):
        super().__init__()
        hidden = config.hidden
        self.config = config
        self.latent_in = nn.Linear(latent_dim, hidden)
        self.vision_in = nn.Linear(latent_dim, hidden) if config.vision else None
        self.proprio_in = nn.Linear(proprio_dim, hidden) if proprio_dim else None
        self.action_in = nn.Linear(action_dim, hidden)
        self.positions = nn.Embedding(horizon, hidden)
        self.tau_in = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.blocks = nn.ModuleList(FlowBlock(hidden, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(hidden)
        self.velocity_out = nn.Linear(hidden, action_dim)
        nn.init.zeros_(self.velocity_out.weight)
        nn.init.zeros_(self.velocity_out.bias)

    def forward(
        self,
        latents_BNd: Tensor,
        proprio_BP: Tensor | None,
        vision_BMd: Tensor | None,
        noisy_BKHD: Tensor,
        tau_BK: Tensor,
    ) -> Tensor:
        """[B, K, H, D] velocities."""
        return self.velocity(self.context(latents_BNd, proprio_BP, vision_BMd), noisy_BKHD, tau_BK)

    def context(self, latents_BNd: Tensor, proprio_BP: Tensor | None, vision_BMd: Tensor | None) -> Context:
        """Everything the chunk attends to. It never attends back, so one context serves every draw and Euler step."""
        blocks = []
        if self.vision_in is not None and vision_BMd is not None:
            blocks.append(self.vision_in(vision_BMd))
        blocks.append(self.latent_in(latents_BNd))
        if self.proprio_in is not None and proprio_BP is not None:
            blocks.append(self.proprio_in(proprio_BP).unsqueeze(1))
        order = torch.cat([torch.full((b.shape[1],), i, device=b.device) for i, b in enumerate(blocks)])
        seen = order[:, None] >= order[None, :]
        x = torch.cat(blocks, dim=1)
        context: Context = []
        for block in self.blocks:
            q, k, v = block.project(x)
            context.append((k, v))
            if block is not self.blocks[-1]:
                x = block.finish(x, F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
        return context

    def velocity(self, context: Context, noisy_BKHD: Tensor, tau_BK: Tensor) -> Tensor:
        """[B, K, H, D]; the chunk attends to the context and to itself, each draw alone."""
        horizon = noisy_BKHD.shape[2]
        x = self.action_in(noisy_BKHD) + self.positions(torch.arange(horizon, device=noisy_BKHD.device))
        x = x + self.tau_in(_sinusoids(tau_BK, x.shape[-1]).to(x.dtype)).unsqueeze(2)
        for block, (k_context, v_context) in zip(self.blocks, context, strict=True):
            q, k, v = block.project(x)  # [B, K, heads, H, c]
            scores = torch.cat([q @ k_context.unsqueeze(1).transpose(-1, -2), q @ k.transpose(-1, -2)], dim=-1)
            weights = (scores / math.sqrt(q.shape[-1])).softmax(dim=-1)
            n = k_context.shape[-2]
            x = block.finish(x, weights[..., :n] @ v_context.unsqueeze(1) + weights[..., n:] @ v)
        return self.velocity_out(self.norm(x))

    def sample(
        self, latents_BNd: Tensor, proprio_BP: Tensor | None, vision_BMd: Tensor | None, noise_BHD: Tensor, steps: int
    ) -> Tensor:
        """Actions [B, H, D] by forward Euler."""
        context = self.context(latents_BNd, proprio_BP, vision_BMd)
        return euler(
            lambda chunk, tau: self.velocity(context, chunk.unsqueeze(1), tau.unsqueeze(1)).squeeze(1), noise_BHD, steps
        )


def _sinusoids(tau: Tensor, size: int) -> Tensor:
    frequencies = torch.exp(torch.linspace(0.0, math.log(1000.0), size // 2, device=tau.device))
    angles = tau.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
