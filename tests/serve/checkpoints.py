"""Checkpoints that load and answer: tiny random reasoning policies for suite `blocks`."""

from __future__ import annotations

from unit import vla_fakes

from dualvla.models.checkpoint import save_checkpoint
from dualvla.models.stages import prepare
from dualvla.models.vla import VLA


def write_checkpoint(folder: str, seed: int = 0) -> str:
    config = prepare(vla_fakes.config(proprio_dim=4, image_size=64), "dual")
    processor = vla_fakes.processor(config)
    model = VLA.create(config, processor, seed=seed)
    save_checkpoint(folder, model.state_dict(), model.config, processor, {"stage": "dual"})
    return folder
