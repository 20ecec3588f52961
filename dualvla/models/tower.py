"""The action expert's own eyes: a DINOv2 whose every layer is modulated by the latent action (FiLM).

FiLM starts as the identity, so a pretrained tower sees at first what it has learned to see. Knows nothing of actions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from dualvla.errors import CheckpointError
from dualvla.models.config import TowerConfig

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as DINOv2 was trained


class VisionTower(nn.Module):
    """Pictures uint8 [B, cameras, S, S, 3] and a latent action [B, N, d] -> tokens [B, cameras * patches, hidden]."""

    def __init__(self, config: TowerConfig, latent_dim: int, hidden: int, cameras: int):
        super().__init__()
        self.config = config
        self.dino = Dinov2Model(_dino_config(config))
        width = self.dino.config.hidden_size
        self.film = nn.ModuleList(nn.Linear(latent_dim, 2 * width) for _ in self.dino.encoder.layer)
        self.camera = nn.Embedding(cameras, width)
        self.out = nn.Linear(width, hidden)
        nn.init.zeros_(self.camera.weight)
        for layer in self.film:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, images_BCHW3: Tensor, latents_BNd: Tensor) -> Tensor:
        batch, cameras = images_BCHW3.shape[:2]
        asked_Bd = latents_BNd.mean(dim=1).repeat_interleave(cameras, dim=0)
        x = self.dino.embeddings(self._pixels(images_BCHW3.flatten(0, 1)))
        for layer, film in zip(self.dino.encoder.layer, self.film, strict=True):
            scale, shift = film(asked_Bd).unsqueeze(1).chunk(2, dim=-1)
            x = layer(x) * (1.0 + scale) + shift
        patches = self.dino.layernorm(x)[:, 1:].unflatten(0, (batch, cameras))  # the first token is [CLS]
        return self.out(patches + self.camera.weight[:, None]).flatten(1, 2)

    def _pixels(self, images_NHW3: Tensor) -> Tensor:
        """[N, 3, image_size, image_size]"""
        pixels = images_NHW3.permute(0, 3, 1, 2).float() / 255.0
        size = (self.config.image_size, self.config.image_size)
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
        mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (_MEAN, _STD))
        return ((pixels - mean) / std).to(self.out.weight.dtype)


def resolve(config: TowerConfig) -> TowerConfig:
    """With the complete settings of the class, so that a checkpoint needs no download."""
    dino = Dinov2Config.from_pretrained(config.name) if config.name is not None else _dino_config(config)
    values = {k: v for k, v in dino.to_diff_dict().items() if k != "transformers_version"}
    return TowerConfig(config.name, values, config.image_size)


def load_published(tower: VisionTower) -> None:
    """Puts the weights of `config.name` in place."""
    tower.dino.load_state_dict(Dinov2Model.from_pretrained(tower.config.name).state_dict())


def _dino_config(config: TowerConfig) -> Any:
    """Raises: CheckpointError if pictures of this size cannot be cut into patches."""
    dino = Dinov2Config(**{k: v for k, v in config.config.items() if k != "model_type"})
    if config.image_size % dino.patch_size:
        raise CheckpointError(
            f"The vision tower's image_size {config.image_size} is no multiple of its patch size {dino.patch_size}.",
            f"set head.tower.image_size to {config.image_size // dino.patch_size * dino.patch_size or dino.patch_size}",
        )
    return dino
