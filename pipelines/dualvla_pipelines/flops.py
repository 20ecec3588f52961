"""The arithmetic of a training step, counted from the model, for MFU and `plan`; and what a machine can do at most.

A multiplication and an addition are two operations. What is computed again (gradient checkpointing), padding, teachers,
normalisation and activation functions are not counted. Knows no data.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from dualvla.models.stages import group_of
from dualvla.models.vla import VLA

_PROBE = {"cpu": 768, "cuda": 8192}  # side of the matrices that are multiplied
_REPEATS = 3
_LANGUAGE = ("backbone", "action", "language", "gate")


@dataclass(frozen=True)
class Matrices:
    """Elements of the matrices of one part of a model, and of those of them that train."""

    total: int
    trained: int

    def forward(self, rows: float) -> float:
        return 2.0 * self.total * rows

    def training(self, rows: float, below: bool = True) -> float:
        """Forward, gradients of the weights, and (with something `below` that trains) of the inputs."""
        return self.forward(rows) * (2.0 if below else 1.0) + 2.0 * self.trained * rows


@dataclass(frozen=True)
class Arithmetic:
    """Of a VLA: language model (each of its tokens), words (each supervised position), vision and head (each sample,
    `patches` and `rows`), attention (elements of queries and keys of all layers of a token)."""

    language: Matrices
    words: Matrices
    vision: Matrices
    head: Matrices
    patches: int
    rows: int
    attention: int

    @classmethod
    def of(cls, model: VLA) -> Arithmetic:
        hf, head = model.backbone.hf.config, model.config.head
        text = hf.get_text_config()
        one = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        context = model.config.num_queries + 1 + (image_tokens(model) if head.vision else 0)
        draws = head.draws if head.kind == "flow" else 1
        vocabulary = model.backbone.hf.get_output_embeddings().weight
        return cls(
            language=_matrices(model, _LANGUAGE),
            words=Matrices(elements(vocabulary), elements(vocabulary) * vocabulary.requires_grad),
            vision=_matrices(model, ("vision",)),
            head=_matrices(model, ("head",)),
            patches=len(model.config.cameras) * (model.backbone.image_size // patch_size(model)) ** 2,
            rows=context + draws * model.config.horizon,
            attention=text.num_hidden_layers * text.num_attention_heads * one,
        )

    def forward(self, samples: float, tokens: float, texts: float) -> float:
        """Operations of a forward pass. tokens: of all samples' sequences; texts: positions whose word is predicted."""
        parts = self.language.forward(tokens) + self.words.forward(texts)
        parts += self.vision.forward(samples * self.patches) + self.head.forward(samples * self.rows)
        return parts + self._attention(samples, tokens)

    def training(self, samples: float, tokens: float, texts: float) -> float:
        """Operations of a forward and a backward pass."""
        parts = self.language.training(tokens) + self.words.training(texts)
        parts += self.vision.training(samples * self.patches, below=self.vision.trained > 0)
        parts += self.head.training(samples * self.rows)
        return parts + 3.0 * self._attention(samples, tokens)

    def _attention(self, samples: float, tokens: float) -> float:
        """Scores and weighted sums, all pairs of a sequence (as eager attention computes them)."""
        return 4.0 * self.attention * tokens * (tokens / samples) if samples else 0.0


def image_tokens(model: VLA) -> int:
    """Of all cameras. An upper bound for classes that merge tokens in a way of their own."""
    hf, cameras = model.backbone.hf.config, len(model.config.cameras)
    vision, side = hf.vision_config, model.backbone.image_size // patch_size(model)
    fixed = getattr(hf, "mm_tokens_per_image", None)
    if fixed is not None:
        return cameras * fixed
    merge = getattr(hf, "scale_factor", None) or getattr(vision, "spatial_merge_size", None) or 1
    merge = 1 / hf.downsample_ratio if getattr(hf, "downsample_ratio", None) else merge
    return cameras * int((side // merge) ** 2)


def patch_size(model: VLA) -> int:
    size = model.backbone.hf.config.vision_config.patch_size
    return size if isinstance(size, int) else size[0]


def elements(parameter: torch.Tensor) -> int:
    """Of the whole parameter, sharded or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the best of a few large matrix products, with this process's threads."""
    side = _PROBE["cuda" if device.type == "cuda" else "cpu"]
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    fastest = float("inf")
    for _ in range(_REPEATS + 1):  # the first warms up, and is the slowest
        _wait(device)
        started = time.perf_counter()
        matrix @ matrix
        _wait(device)
        fastest = min(fastest, time.perf_counter() - started)
    return 2.0 * side**3 / fastest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _matrices(model: nn.Module, groups: Iterable[str]) -> Matrices:
    found = [p for name, p in model.named_parameters() if group_of(name) in groups and _dimensions(p) >= 2]
    return Matrices(sum(map(elements, found)), sum(elements(p) for p in found if p.requires_grad))


def _dimensions(parameter: torch.Tensor) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))
