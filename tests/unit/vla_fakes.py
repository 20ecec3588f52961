"""Small random models of real Hugging Face classes, and samples for them."""

from typing import Any

import numpy as np

from dualvla.models.config import HeadConfig, LoraConfig, ModelConfig
from dualvla.models.processing import Processor, Sample

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 8,
}
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
BACKBONES: dict[str, dict[str, Any]] = {
    "idefics3": {
        "model_type": "idefics3",
        "scale_factor": 1,
        "vision_config": dict(_VISION),
        "text_config": {"model_type": "llama", **_TEXT},
        "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3",
        "mm_tokens_per_image": 16,
        "vision_config": {"model_type": "siglip_vision_model", **_VISION},
        "text_config": {"model_type": "gemma3_text", **_TEXT},
    },
    "paligemma": {
        "model_type": "paligemma",
        "projection_dim": 32,
        "vision_config": {"model_type": "siglip_vision_model", **_VISION},
        "text_config": {"model_type": "gemma", **_TEXT},
    },
}
TEXTS = ("touch the red cube", "how many cubes are there?", "plan: reach the red cube. move: left.", "two cubes")


def config(of: str = "idefics3", **changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "backbone_config": BACKBONES[of],
        "image_size": 32,
        "proprio_dim": 3,
        "num_queries": 3,
        "horizon": 4,
        "lora": LoraConfig(rank=4, gate_hidden=8),
        "head": HeadConfig(hidden=32, layers=2, heads=2, draws=3),
        "max_text_tokens": 6,
    }
    return ModelConfig(**{**values, **changes})


def processor(model_config: ModelConfig) -> Processor:
    rng = np.random.default_rng(0)
    actions = rng.normal(size=(50, model_config.actions.size))
    proprios = rng.normal(size=(50, model_config.proprio_dim))
    return Processor.fit(model_config, TEXTS * 5, actions, proprios, rng.normal(size=(50, 3)))


def sample(
    key: int, domain: str = "robot", reasoning: str | None = None, cameras: tuple[str, ...] = ("main",), size: int = 7
) -> Sample:
    rng = np.random.default_rng(key)
    images = {c: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for c in cameras}
    if domain == "multimodal":
        return Sample(key, domain, images, TEXTS[1], reasoning or TEXTS[3])
    return Sample(
        key,
        domain,
        images,
        TEXTS[0],
        reasoning,
        proprio=rng.normal(size=3).astype(np.float32),
        actions=rng.normal(size=(4, size)).astype(np.float32),
        action_mask=np.array([True, True, True, key % 2 == 0]),
        target_pixel=rng.uniform(size=2).astype(np.float32),
        target_position=rng.normal(size=3).astype(np.float32),
    )


def mixed() -> list[Sample]:
    """Two robot samples with text of different lengths, one pruned, and two questions."""
    return [
        sample(0, reasoning=TEXTS[2]),
        sample(1),
        sample(2, reasoning="move: left."),
        sample(3, "multimodal"),
        sample(4, "multimodal", "two"),
    ]
