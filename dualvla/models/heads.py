"""Which action head a configuration asks for. Both have the interface of `ActionExpert`."""

from __future__ import annotations

from dualvla.models.config import ModelConfig
from dualvla.models.expert import ActionExpert
from dualvla.models.flow_head import FlowHead
from dualvla.models.token_head import TokenHead


def build(config: ModelConfig, latent_dim: int) -> ActionExpert:
    """A head with random weights, for latent actions of `latent_dim` numbers a query."""
    kind = {"flow": FlowHead, "token": TokenHead}[config.head.kind]
    return kind(
        config.head, latent_dim, config.horizon, config.actions.size, config.proprio_dim, cameras=len(config.cameras)
    )
