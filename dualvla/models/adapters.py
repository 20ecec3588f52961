"""Two low-rank adapters (action, language) and the per-token gate that weighs them, for any stack of decoder layers.

Adapters start with zero effect and the gate with weight 1 for both, so attaching them changes nothing. Knows no model
class: a decoder layer is a module whose first input is its hidden states.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualvla.models.config import Adapter, LoraConfig

GATED: tuple[Adapter, ...] = ("action", "language")  # the order of the gate's two outputs


class LowRank(nn.Module):
    """x -> alpha / rank * up(down(x)); `up` starts at zero."""

    def __init__(self, in_features: int, out_features: int, config: LoraConfig):
        super().__init__()
        self.down = nn.Linear(in_features, config.rank, bias=False)
        self.up = nn.Linear(config.rank, out_features, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.scale = config.alpha / config.rank
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(self.dropout(x))) * self.scale


class Gate(nn.Module):
    """A 4-layer MLP on a layer's hidden states: each adapter's weight in (0, 2) at each token; 1 at the start.

    `weights` [..., 2] belongs to the layer call in progress: `before_layer` sets it, the layer's projections read it.
    """

    def __init__(self, hidden_size: int, config: LoraConfig):
        super().__init__()
        width = config.gate_hidden
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, width), nn.GELU(),
            nn.Linear(width, width), nn.GELU(),
            nn.Linear(width, width), nn.GELU(),
            nn.Linear(width, len(GATED)),
        )  # fmt: skip
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)
        self.weights: Tensor | None = None

    def forward(self, hidden_BTd: Tensor) -> Tensor:
        return 2.0 * torch.sigmoid(self.mlp(hidden_BTd))

    def before_layer(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.weights = self(args[0] if args else kwargs["hidden_states"])


class AdaptedLinear(nn.Linear):
    """A linear map (with the weights of the one it replaces, under the same names) plus its adapters."""

    def __init__(self, base: nn.Linear, names: Sequence[Adapter], config: LoraConfig, gate: Gate | None):
        nn.Module.__init__(self)  # nn.Linear's own would allocate weights that are replaced at once
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.adapters = nn.ModuleDict({n: LowRank(base.in_features, base.out_features, config) for n in names})
        self._gate = (gate,)  # in a tuple, so that the layer stays its only owner

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        (gate,) = self._gate
        for name, adapter in self.adapters.items():
            update = adapter(x)
            if gate is not None and gate.weights is not None:
                update = update * gate.weights[..., GATED.index(name)].unsqueeze(-1)
            y = y + update
        return y


def attach_adapters(
    layers: Iterable[nn.Module], hidden_size: int, names: Sequence[Adapter], config: LoraConfig
) -> None:
    """Replaces every linear projection inside each decoder layer; with both adapters a layer gets an `adapter_gate`."""
    for layer in layers:
        gate = Gate(hidden_size, config) if set(names) == set(GATED) else None
        for parent in list(layer.modules()):
            for child_name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, child_name, AdaptedLinear(child, names, config, gate))
        if gate is not None:
            layer.adapter_gate = gate
            layer.register_forward_pre_hook(gate.before_layer, with_kwargs=True)
