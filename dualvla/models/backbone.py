"""One face for any Hugging Face image-text-to-text model: image states, token embeddings, causal decoding, logits.

The sequence is assembled from embeddings by `vla.py`, so every class takes the same path: the vision tower and its
connector give image tokens, the language model reads embeddings left to right. Knows nothing of actions or of text.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, Cache, DynamicCache

from dualvla.errors import CheckpointError
from dualvla.models.config import ModelConfig


class Backbone(nn.Module):
    """`hf` is the whole pretrained class; `hidden_size` the width d of its language model."""

    def __init__(self, hf: Any):
        super().__init__()
        self.hf = hf
        self.hidden_size: int = hf.config.get_text_config().hidden_size
        self.vocab_size: int = hf.config.get_text_config().vocab_size

    @property
    def language_model(self) -> Any:
        return self.hf.get_decoder()

    def image_states(self, images_BCHW3: Tensor) -> Tensor:
        """uint8 [B, cameras, S, S, 3] -> [B, cameras * tokens, d]; tokens lie row by row over each picture."""
        batch, cameras = images_BCHW3.shape[:2]
        dtype = next(self.hf.parameters()).dtype
        pixels = images_BCHW3.flatten(0, 1).permute(0, 3, 1, 2).to(dtype) / 127.5 - 1.0
        if self.hf.config.model_type == "idefics3":
            # It drops pictures whose every value is exactly 0.0 as padding; no uint8 maps to 0.0 above.
            pixels = pixels.unsqueeze(1)
        features = self.hf.get_image_features(pixels).pooler_output
        features = torch.stack(list(features)) if not isinstance(features, Tensor) else features
        return features.reshape(batch, cameras * features.shape[-2], features.shape[-1])

    def embed(self, ids_BT: Tensor) -> Tensor:
        """[B, T] -> [B, T, d]"""
        return self.hf.get_input_embeddings()(ids_BT)

    def decode(self, embeds_BTd: Tensor, mask_BL: Tensor, cache: Cache | None = None) -> Tensor:
        """Causal pass over the last T of L positions; [B, T, d] last hidden states.

        mask [B, L] is 1 for tokens that exist: a masked one is seen by no other and takes up no position, which is the
        same as removing it from the sequence. `cache` (of `new_cache`) holds the first L - T positions and grows.
        """
        positions_BL = (mask_BL.long().cumsum(dim=1) - 1).clamp_min(0)
        output = self.language_model(
            inputs_embeds=embeds_BTd,
            attention_mask=mask_BL.long(),
            position_ids=positions_BL[:, -embeds_BTd.shape[1] :],
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state

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
        hf_config = AutoConfig.from_pretrained(config.backbone)
        vocab_size = max(vocab_size, hf_config.get_text_config().vocab_size)
        values = hf_config.to_dict()
    else:
        values = copy.deepcopy(config.backbone_config)
    values.setdefault("text_config", {})["vocab_size"] = vocab_size
    values.setdefault("vision_config", {})["image_size"] = config.image_size
    for part in (values, values["text_config"]):
        # A class's own default ids may lie outside a small vocabulary; only the processor's are used.
        part.update(pad_token_id=0, bos_token_id=None, eos_token_id=None)
    values["tie_word_embeddings"] = _hf_config(values).tie_word_embeddings
    return values


def build(config: ModelConfig, pretrained: bool = False) -> Backbone:
    """Random weights from `config.backbone_config`, or the published ones of `config.backbone`."""
    hf_config = _hf_config(config.backbone_config)
    if pretrained:
        hf = AutoModelForImageTextToText.from_pretrained(config.backbone, attn_implementation=config.attention)
        hf.resize_token_embeddings(hf_config.get_text_config().vocab_size, mean_resizing=False)
    else:
        hf = AutoModelForImageTextToText.from_config(hf_config, attn_implementation=config.attention)
    return Backbone(hf)


def grid_side(image_tokens: int, cameras: int) -> int:
    """Image tokens of one camera form a square grid, row by row; its side."""
    side = math.isqrt(image_tokens // cameras)
    if side * side * cameras != image_tokens:
        raise CheckpointError(
            f"{image_tokens} image tokens of {cameras} cameras are no square grids.",
            "set grounding to null for this backbone",
        )
    return side


def _hf_config(values: Mapping[str, Any]) -> Any:
    known = AutoModelForImageTextToText._model_mapping._model_mapping  # model_type -> class name
    if values.get("model_type") not in known:
        raise CheckpointError(
            f"'{values.get('model_type')}' is not an image-text-to-text class of the installed transformers.",
            f"set backbone_config.model_type to one of: {', '.join(sorted(known))}",
        )
    settings = copy.deepcopy(dict(values))
    return AutoConfig.for_model(settings.pop("model_type"), **settings)
