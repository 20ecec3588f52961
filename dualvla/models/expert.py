"""What both action heads share: a transformer over [vision | latent action | proprioception | chunk].

Attention is block-wise causal in that order. A head adds what a chunk's tokens are made of, what it predicts, and the
losses of that. Knows nothing of text, prompts or units: actions are normalised numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualvla.models.config import HeadConfig, LossWeights
from dualvla.models.tower import VisionTower

Context = list[tuple[Tensor, Tensor]]  # per layer: keys and values [B, heads, n, hidden / heads]
ActionBatch = Mapping[str, Tensor]  # of a training batch: actions, action_mask, tau and noise


class ExpertBlock(nn.Module):
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


class ActionExpert(nn.Module, ABC):
    """Latent action [B, N, d], proprioception [B, P], image states [B, M, d] and pictures -> a chunk of actions.

    term: the head's name among the loss terms, and with "kd_" before it that of its distillation. target: what its
    prediction is called among a teacher's targets.
    """

    term: ClassVar[Literal["flow", "bins"]]
    target: ClassVar[Literal["velocity", "bins"]]

    def __init__(
        self, config: HeadConfig, latent_dim: int, horizon: int, action_dim: int, proprio_dim: int, cameras: int = 1
    ):
        super().__init__()
        hidden = config.hidden
        self.config = config
        self.latent_in = nn.Linear(latent_dim, hidden)
        self.vision_in = nn.Linear(latent_dim, hidden) if config.vision else None
        self.proprio_in = nn.Linear(proprio_dim, hidden) if proprio_dim else None
        self.make_chunk(horizon, action_dim)  # here: equal seeds go on giving equal weights
        self.blocks = nn.ModuleList(ExpertBlock(hidden, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(hidden)
        self.make_output(horizon, action_dim)
        self.tower = VisionTower(config.tower, latent_dim, hidden, cameras) if config.tower is not None else None

    @abstractmethod
    def make_chunk(self, horizon: int, action_dim: int) -> None:
        """Adds the modules that embed a chunk."""

    @abstractmethod
    def make_output(self, horizon: int, action_dim: int) -> None:
        """Adds the modules that read the prediction out."""

    @abstractmethod
    def predict(self, context: Context, batch: ActionBatch) -> Tensor:
        """What is compared with the data and with a teacher: velocities [B, K, H, D] or bin logits [B, H, D, bins]."""

    @abstractmethod
    def loss(self, predicted: Tensor, batch: ActionBatch, mask_BH: Tensor, count: Tensor | None) -> Tensor:
        """The hard loss over unmasked chunk steps."""

    @abstractmethod
    def kd(
        self, predicted: Tensor, teacher: Tensor, mask_BH: Tensor, weights: LossWeights, count: Tensor | None
    ) -> Tensor:
        """Eq. 5 between this prediction and the teacher's, over unmasked chunk steps."""

    @abstractmethod
    def sample(self, context: Context, noise_BHD: Tensor, steps: int) -> Tensor:
        """Normalised actions [B, H, D]. noise and the number of Euler steps are used by a flow head only."""

    def context(
        self,
        latents_BNd: Tensor,
        proprio_BP: Tensor | None = None,
        vision_BMd: Tensor | None = None,
        images_BCHW3: Tensor | None = None,
    ) -> Context:
        """Everything the chunk attends to. It never attends back, so one context serves every draw and Euler step.

        vision: the backbone's image states (config.vision). images: uint8, for a vision tower (config.tower).
        """
        blocks = []
        if self.tower is not None and images_BCHW3 is not None:
            blocks.append(self.tower(images_BCHW3, latents_BNd))
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

    def attend(self, context: Context, chunk_BKHc: Tensor) -> Tensor:
        """[B, K, H, hidden]: each of the K chunks attends to the context and to itself, alone."""
        x = chunk_BKHc
        for block, (k_context, v_context) in zip(self.blocks, context, strict=True):
            q, k, v = block.project(x)  # [B, K, heads, H, c]
            scores = torch.cat([q @ k_context.unsqueeze(1).transpose(-1, -2), q @ k.transpose(-1, -2)], dim=-1)
            weights = (scores / math.sqrt(q.shape[-1])).softmax(dim=-1)
            n = k_context.shape[-2]
            x = block.finish(x, weights[..., :n] @ v_context.unsqueeze(1) + weights[..., n:] @ v)
        return self.norm(x)
