"""A checkpoint folder as a policy to serve. The one module of this package that knows the model; it needs torch."""

from __future__ import annotations

import numpy as np

from dualvla.models.checkpoint import load_config
from dualvla.schema import Observation
from dualvla.vla_policy import VLAPolicy
from dualvla_serve.backend import LoadedPolicy


def load(folder: str) -> LoadedPolicy:
    """Raises: CheckpointError."""
    config = load_config(folder)
    pixels = np.zeros((config.image_size, config.image_size, 3), np.uint8)
    example = Observation(
        images=dict.fromkeys(config.cameras, pixels),
        instruction="wait",
        proprio=np.zeros(config.proprio_dim, np.float32) if config.proprio_dim else None,
    )
    return LoadedPolicy(VLAPolicy.from_pretrained(folder), example)
