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
_QWEN_TEXT = {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}}
_QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
MORE_BACKBONES: dict[str, dict[str, Any]] = {
    "smolvlm": {**BACKBONES["idefics3"], "model_type": "smolvlm"},
    "internvl": {
        "model_type": "internvl",
        "downsample_ratio": 0.5,
        "vision_config": {**_VISION, "patch_size": 4},
        "text_config": {"model_type": "qwen2", **_TEXT},
    },
    "llava": {
        "model_type": "llava",
        "vision_config": {"model_type": "clip_vision_model", **_VISION, "num_hidden_layers": 2},
        "text_config": {"model_type": "llama", **_TEXT},
    },
    "qwen2_vl": {
        "model_type": "qwen2_vl",
        "vision_config": {**_QWEN_VISION, "embed_dim": 32, "hidden_size": 32},
        "text_config": _QWEN_TEXT,
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        "vision_config": {
            **_QWEN_VISION, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32,
            "window_size": 16, "fullatt_block_indexes": [1],
        },
        "text_config": _QWEN_TEXT,
    },
}  # fmt: skip
TEXTS = ("touch the red cube", "how many cubes are there?", "plan: reach the red cube. move: left.", "two cubes")


def config(of: str = "idefics3", **changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "backbone_config": (BACKBONES | MORE_BACKBONES)[of],
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
