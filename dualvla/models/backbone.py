"""One face for any Hugging Face image-text-to-text model: image states, token embeddings, causal decoding, logits.

The sequence is assembled from embeddings by `vla.py`, so every class takes the same path: the vision tower and its
connector give image tokens, the language model reads embeddings left to right. Knows nothing of actions or of text.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, Cache, DynamicCache

from dualvla.errors import CheckpointError
from dualvla.models.config import ModelConfig

_Triple = tuple[float, float, float]
_HALF: tuple[_Triple, _Triple] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_CLIP: tuple[_Triple, _Triple] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET: tuple[_Triple, _Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Family:
    """How a class wants its pictures. pixels: mean and deviation per channel it was trained with.

    nested: a dimension of images per sample. patches: already cut (Qwen-VL), and image tokens at rows and columns
    (M-RoPE) rather than one after the other.
    """

    pixels: tuple[_Triple, _Triple] = _HALF
    nested: bool = False
    patches: bool = False


FAMILIES: dict[str, Family] = {
    "gemma3": Family(),
    "idefics3": Family(nested=True),
    "internvl": Family(_IMAGENET),
    "llava": Family(_CLIP),
    "paligemma": Family(),
    "qwen2_5_vl": Family(_CLIP, patches=True),
    "qwen2_vl": Family(_CLIP, patches=True),
    "smolvlm": Family(nested=True),
}
"""The classes that are driven, by their `model_type`. Others may see differently (deepstack, cross-attention, ...)."""


class Backbone(nn.Module):
    """`hf` is the whole pretrained class; `hidden_size` the width d of its language model."""

    def __init__(self, hf: Any, cameras: int, image_size: int):
        super().__init__()
        self.hf = hf
        self.hidden_size: int = hf.config.get_text_config().hidden_size
        self.vocab_size: int = hf.config.get_text_config().vocab_size
        self.family = FAMILIES[hf.config.model_type]
        self.cameras = cameras
        self.image_size = _seen_size(hf.config, image_size)

    @property
    def language_model(self) -> Any:
        return self.hf.get_decoder()

    def image_states(self, images_BCHW3: Tensor) -> Tensor:
        """uint8 [B, cameras, S, S, 3] -> [B, cameras * tokens, d]; tokens lie row by row over each picture."""
        batch, cameras = images_BCHW3.shape[:2]
        pixels = self.pixels(images_BCHW3.flatten(0, 1))
        if self.family.patches:
            patches, grid = _cut(pixels, self.hf.config.vision_config)
            features = self.hf.get_image_features(patches, grid).pooler_output
        else:
            # Idefics3 drops pictures whose every value is exactly 0.0 as padding; no uint8 becomes 0.0.
            pixels = pixels.unsqueeze(1) if self.family.nested else pixels
            features = self.hf.get_image_features(pixels).pooler_output
        features = torch.stack(list(features)) if not isinstance(features, Tensor) else features
        return features.reshape(batch, cameras * features.shape[-2], features.shape[-1])

    def pixels(self, images_NHW3: Tensor) -> Tensor:
        """uint8 [N, S, S, 3] -> [N, 3, S', S'], normalised, in the size that the vision tower was made for."""
        dtype = next(self.hf.parameters()).dtype
        pixels = images_NHW3.permute(0, 3, 1, 2).to(dtype)
        if pixels.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True, align_corners=False)
            pixels = pixels.clamp(0.0, 255.0).to(dtype)
        if self.family.pixels is _HALF:
            return pixels / 127.5 - 1.0
        mean, std = (torch.tensor(v, dtype=dtype, device=pixels.device).view(3, 1, 1) for v in self.family.pixels)
        return (pixels / 255.0 - mean) / std

    def embed(self, ids_BT: Tensor) -> Tensor:
        """[B, T] -> [B, T, d]"""
        return self.hf.get_input_embeddings()(ids_BT)

    def decode(self, embeds_BTd: Tensor, mask_BL: Tensor, cache: Cache | None = None) -> Tensor:
        """Causal pass over the last T of L positions; [B, T, d] last hidden states.

        mask [B, L] is 1 for tokens that exist: a masked one is seen by no other and takes up no position, which is the
        same as removing it from the sequence. `cache` (of `new_cache`) holds the first L - T positions and grows.
        """
        output = self.language_model(
            inputs_embeds=embeds_BTd,
            attention_mask=mask_BL.long(),
            position_ids=self.positions(mask_BL)[..., -embeds_BTd.shape[1] :],
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state

    def positions(self, mask_BL: Tensor) -> Tensor:
        """[B, L], or [3, B, L] (time, row, column) where image tokens lie on a grid."""
        positions_BL = (mask_BL.long().cumsum(dim=1) - 1).clamp_min(0)
        if not self.family.patches:
            return positions_BL
        vision = self.hf.config.vision_config
        side = self.image_size // (vision.patch_size * vision.spatial_merge_size)
        tokens = torch.arange(self.cameras * side * side, device=mask_BL.device)
        camera, cell = tokens // side**2, tokens % side**2
        start = camera * side  # a picture takes up as many positions as it has rows
        grid = torch.stack([start, start + cell // side, start + cell % side]).unsqueeze(1)
        after = positions_BL[:, len(tokens) :] - len(tokens) + self.cameras * side
        return torch.cat([grid.expand(3, len(mask_BL), -1), after.expand(3, -1, -1)], dim=-1)

    def logits(self, hidden_BTd: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, V]"""
        return self.hf.get_output_embeddings()(hidden_BTd)

    def new_cache(self) -> Cache:
        return DynamicCache(config=self.language_model.config)


def resolve(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The backbone's complete configuration as a dict, with this vocabulary, image size and attention.

    Raises: CheckpointError naming a class that transformers does not have.
    """
    if config.backbone is not None:
        hf_config = _published_config(config.backbone)
        vocab_size = max(vocab_size, hf_config.get_text_config().vocab_size)
        values = hf_config.to_dict()
    else:
        values = copy.deepcopy(config.backbone_config)
        if not _family(values).patches:
            values.setdefault("vision_config", {})["image_size"] = config.image_size
    values.setdefault("text_config", {})["vocab_size"] = vocab_size
    for part in (values, values["text_config"]):
        # A class's own default ids may lie outside a small vocabulary; only the processor's are used.
        part.update(pad_token_id=0, bos_token_id=None, eos_token_id=None)
    values["tie_word_embeddings"] = _hf_config(values).tie_word_embeddings
    return values


def build(config: ModelConfig, pretrained: bool = False) -> Backbone:
    """Random weights from `config.backbone_config`, or the published ones of `config.backbone`, in float32.

    Raises: CheckpointError if the class, its attention or the picture's size cannot be had.
    """
    hf_config = _hf_config(config.backbone_config)
    settings: dict[str, Any] = {"attn_implementation": config.attention, "dtype": torch.float32}
    try:
        if pretrained:
            hf = AutoModelForImageTextToText.from_pretrained(config.backbone, **settings)
            hf.resize_token_embeddings(hf_config.get_text_config().vocab_size, mean_resizing=False)
        else:
            hf = AutoModelForImageTextToText.from_config(hf_config, **settings)
    except ImportError as error:  # a kernel that is not installed
        raise CheckpointError(
            f"Attention '{config.attention}' cannot be had here: {error}.", "set model.attention to eager or sdpa"
        ) from error
    if config.gradient_checkpointing:
        hf.activation_checkpointing_enable({"use_reentrant": False})
    return Backbone(hf, len(config.cameras), config.image_size)


def grid_side(image_tokens: int, cameras: int) -> int:
    """Image tokens of one camera form a square grid, row by row; its side."""
    side = math.isqrt(image_tokens // cameras)
    if side * side * cameras != image_tokens:
        raise CheckpointError(
            f"{image_tokens} image tokens of {cameras} cameras are no square grids.",
            "set grounding to null for this backbone",
        )
    return side


def _published_config(name: str) -> Any:
    """Raises: CheckpointError if there is no such model, or its class is not driven."""
    try:
        found = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"'{name}' is no Hugging Face model that can be read: {str(error).splitlines()[0]}",
            "pass a folder, or the name of a model that this machine can reach",
        ) from error
    _family({"model_type": found.model_type})
    return found


def _family(values: Mapping[str, Any]) -> Family:
    """Raises: CheckpointError naming the classes that are driven."""
    if values.get("model_type") not in FAMILIES:
        raise CheckpointError(
            f"A backbone of class '{values.get('model_type')}' is not supported.",
            f"take one of: {', '.join(sorted(FAMILIES))}",
        )
    return FAMILIES[values["model_type"]]


def _seen_size(hf_config: Any, image_size: int) -> int:
    """The size in pixels that pictures of `image_size` are shown in."""
    vision = hf_config.vision_config
    if FAMILIES[hf_config.model_type].patches:
        step = vision.patch_size * vision.spatial_merge_size
        return max(step, round(image_size / step) * step)
    size = vision.image_size
    return size if isinstance(size, int) else size[0]


def _cut(pixels_N3SS: Tensor, vision: Any) -> tuple[Tensor, Tensor]:
    """Patches as Qwen-VL's processors cut them: [N * patches, values], in blocks that are merged into one token, and
    the grid [N, 3] (time, rows, columns)."""
    patch, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    number, channels, side = len(pixels_N3SS), pixels_N3SS.shape[1], pixels_N3SS.shape[-1] // patch
    still = pixels_N3SS.unsqueeze(1).expand(-1, frames, -1, -1, -1)  # a picture is a film of equal frames
    blocks = still.reshape(number, frames, channels, side // merge, merge, patch, side // merge, merge, patch)
    rows = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    grid = torch.tensor([[1, side, side]] * number, device=pixels_N3SS.device)
    return rows.reshape(number * side * side, channels * frames * patch * patch), grid


def _hf_config(values: Mapping[str, Any]) -> Any:
    _family(values)
    settings = copy.deepcopy(dict(values))
    return AutoConfig.for_model(settings.pop("model_type"), **settings)
