"""A checkpoint folder as a policy to serve. The one module of this package that knows the model; it needs torch."""

from __future__ import annotations

from functools import partial

import numpy as np

from dualvla.io import manifest, storage
from dualvla.models.checkpoint import load_config
from dualvla.schema import Observation
from dualvla.vla_policy import PolicyOptions, VLAPolicy
from dualvla_serve.batching import LoadedPolicy
from dualvla_serve.models import ModelSource


def load(folder: str, device: str = "cpu") -> LoadedPolicy:
    """Raises: CheckpointError."""
    config = load_config(folder)
    pixels = np.zeros((config.image_size, config.image_size, 3), np.uint8)
    example = Observation(
        images=dict.fromkeys(config.cameras, pixels),
        instruction="wait",
        proprio=np.zeros(config.proprio_dim, np.float32) if config.proprio_dim else None,
    )
    return LoadedPolicy(VLAPolicy.from_pretrained(folder, options=PolicyOptions(device=device)), example)


def source(folder: str, device: str = "cpu") -> ModelSource:
    """The version is a digest of the weights and the configuration: a folder written anew is another version."""
    files = [storage.join(folder, "config.json"), *storage.list_files(folder, ".safetensors")]
    version = manifest.digest([manifest.file_digest(file) for file in files])[:12]
    return ModelSource(partial(load, folder, device), version, folder)
