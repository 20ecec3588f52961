"""Where is the target? A heat map over image tokens read out of the latent action, and what lies there.

The supervision (the target's pixel and position) is a training-time signal only; at inference the module uses its own
heat map. Knows nothing of how the states were made.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dualvla.models.config import GroundingConfig


class Grounded(NamedTuple):
    """latents [B, N, d] with the pooled image state added; heat logits [B, M]; target position [B, 3] (normalised)."""

    latents: Tensor
    heat_logits: Tensor
    position: Tensor


class Grounding(nn.Module):
    """The last query asks, the image tokens answer."""

    def __init__(self, config: GroundingConfig, hidden_size: int):
        super().__init__()
        self.config = config
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.position = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, 3))

    def forward(self, latents_BNd: Tensor, image_BMd: Tensor) -> Grounded:
        asked_Bd = latents_BNd[:, -1]
        logits_BM = torch.einsum("bd,bmd->bm", self.query(asked_Bd), self.key(image_BMd)) / math.sqrt(
            asked_Bd.shape[-1]
        )
        if self.config.pool:
            pooled_Bd = torch.einsum("bm,bmd->bd", logits_BM.softmax(dim=-1), self.value(image_BMd))
            latents_BNd = latents_BNd + pooled_Bd.unsqueeze(1)
        return Grounded(latents_BNd, logits_BM, self.position(latents_BNd[:, -1]))


def target_cell(pixel_B2: Tensor, side: int) -> Tensor:
    """[u, v] in [0, 1] -> index of the cell of a side x side grid, row by row; -1 where outside the picture or NaN."""
    inside = ((pixel_B2 >= 0) & (pixel_B2 < 1)).all(dim=-1)
    column_row = (torch.nan_to_num(pixel_B2).clamp(0, 1 - 1e-6) * side).long()
    return torch.where(inside, column_row[:, 1] * side + column_row[:, 0], -1)
