"""The token action head: every dimension of every step of the chunk as one of 256 bins, all at once.

OpenVLA's convention: actions normalised to [-1, 1] by their 1 % and 99 % quantiles (`Statistics.to_unit`), the 256
values of linspace(-1, 1) as lower edges, and the 255 centres between them to read a bin back (the top edge shares the
last centre).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualvla.distill.losses import divergence, masked_mean
from dualvla.models.config import LossWeights
from dualvla.models.expert import ActionBatch, ActionExpert, Context


def to_bins(actions: Tensor, bins: int) -> Tensor:
    """Actions in [-1, 1] (beyond: the outermost bin) -> int64 in [0, bins - 1]."""
    edges = torch.from_numpy(np.linspace(-1.0, 1.0, bins)).to(actions.device)
    return torch.bucketize(actions.double().clamp(-1.0, 1.0), edges, right=True) - 1


def from_bins(indices: Tensor, bins: int) -> Tensor:
    """The centre of each bin, float32; at most 1 / (bins - 1) from what went in."""
    edges = np.linspace(-1.0, 1.0, bins)
    centres = torch.from_numpy((edges[:-1] + edges[1:]) / 2).to(indices.device)
    return centres[indices.clamp_max(bins - 2)].float()


class TokenHead(ActionExpert):
    """Bin logits [B, H, D, bins]; the chunk's tokens are its H positions."""

    term = "bins"
    target = "bins"

    def make_chunk(self, horizon: int, action_dim: int) -> None:
        self.positions = nn.Embedding(horizon, self.config.hidden)

    def make_output(self, horizon: int, action_dim: int) -> None:
        self.bins_out = nn.Linear(self.config.hidden, action_dim * self.config.bins)
        nn.init.zeros_(self.bins_out.weight)
        nn.init.zeros_(self.bins_out.bias)

    def logits(self, context: Context) -> Tensor:
        batch = len(context[0][0])
        chunk = self.positions.weight.expand(batch, 1, -1, -1)
        return self.bins_out(self.attend(context, chunk)).squeeze(1).unflatten(-1, (-1, self.config.bins))

    def predict(self, context: Context, batch: ActionBatch) -> Tensor:
        return self.logits(context)

    def loss(self, predicted: Tensor, batch: ActionBatch, mask_BH: Tensor, count: Tensor | None) -> Tensor:
        """Cross-entropy: the mean over unmasked steps and all dimensions."""
        wanted = to_bins(batch["actions"], self.config.bins)
        error = F.cross_entropy(predicted.flatten(0, 2), wanted.flatten(), reduction="none").view_as(wanted)
        return masked_mean(error.mean(dim=-1), mask_BH, count)

    def kd(
        self, predicted: Tensor, teacher: Tensor, mask_BH: Tensor, weights: LossWeights, count: Tensor | None
    ) -> Tensor:
        """T^2 x the exact divergence of the softened bins, reduced as the hard loss."""
        apart_BHD = divergence(predicted, teacher, weights.temperature, weights.divergence, weights.divergence_mix)
        return weights.temperature**2 * masked_mean(apart_BHD.mean(dim=-1), mask_BH, count)

    def sample(self, context: Context, noise_BHD: Tensor, steps: int) -> Tensor:
        """The likeliest bin of every dimension."""
        return from_bins(self.logits(context).argmax(dim=-1), self.config.bins)
