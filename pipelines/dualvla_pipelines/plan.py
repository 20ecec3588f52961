"""`dualvla plan`: whether a recipe's stage fits on some GPUs, before anything is bought or started.

Parameters are counted on the real model without memory (PyTorch's meta device), and what the optimiser keeps follows
from them. Activations are a formula over the layers, within a third of what small models were measured to keep. Knows
neither data nor machines: what they decide is an argument, or is stated as an assumption.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from dualvla.config import override
from dualvla.console import table
from dualvla.distill import topk
from dualvla.distill.cache import CacheSettings
from dualvla.errors import UsageError
from dualvla.models import backbone as backbones
from dualvla.models import tower
from dualvla.models.config import ModelConfig
from dualvla.models.stages import apply_stage, prepare
from dualvla.models.vla import VLA
from dualvla_pipelines.flops import Arithmetic, image_tokens, patch_size
from dualvla_pipelines.recipes import Stage, TrainConfig, get_recipe
from dualvla_pipelines.zero import bucket_elements

GB = 1e9
_FP32 = 4
_PROMPT_TOKENS = 32
_RESERVED = 1.5 * GB  # CUDA context, communication buffers, fragments
_UTILISATION = 0.35  # of the peak, in a well-fed training step
_RECOMPUTED = 4 / 3  # forward, backward and the forward again, over forward and backward


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Parameters of a stage's model. small: in tensors below the persistence threshold. layer: the largest decoder
    layer's, gathered at once."""

    total: int
    trained: int
    small: int
    layer: int


def meta_model(config: ModelConfig, stage: Stage) -> VLA:
    """The model of a stage, without weights, its parameters marked as they train."""
    config = prepare(config, stage)
    config = dataclasses.replace(config, backbone_config=backbones.resolve(config, config.vocab_size))
    if config.head.tower is not None:
        head = dataclasses.replace(config.head, tower=tower.resolve(config.head.tower))
        config = dataclasses.replace(config, head=head)
    with torch.device("meta"):
        model = VLA(config)
    apply_stage(model, stage, config)
    return model


def sizes(model: VLA, config: TrainConfig) -> Sizes:
    parameters = list(model.parameters())
    layers = model.backbone.language_model.layers
    return Sizes(
        total=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        small=sum(p.numel() for p in parameters if p.numel() < config.zero.persistence_threshold),
        layer=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
    )


def state_bytes(found: Sizes, config: TrainConfig, gpus: int) -> dict[str, float]:
    """Bytes on each GPU that do not depend on the batch: name -> bytes. Weights and gradients are float32."""
    stage = config.zero.stage

    def share(first: int) -> int:
        return gpus if stage >= first else 1

    on_gpu = 0 if config.zero.offload == "cpu" else 1
    return {
        "weights": _FP32 * (found.small + (found.total - found.small) / share(3) if stage == 3 else found.total),
        "gradients": _FP32 * found.trained / share(2),
        "optimiser": on_gpu * 3 * _FP32 * found.trained / share(1),  # master weights and two moments
        "averages": on_gpu * _FP32 * found.trained / share(1),
        "gathered": _FP32 * (2 * found.layer + bucket_elements(found.total)) if stage == 3 and gpus > 1 else 0.0,
    }


def activation_bytes(model: VLA, config: TrainConfig) -> float:
    """Bytes that one sample keeps from forward to backward."""
    shape = model.config
    text = model.backbone.hf.config.get_text_config()
    tokens = image_tokens(model) + _PROMPT_TOKENS + shape.max_text_tokens + shape.num_queries
    number = 3 if config.zero.dtype == "bf16" else _FP32  # autocast: about half of what is kept is bf16
    width, heads = text.hidden_size, text.num_attention_heads
    one = width // heads if getattr(text, "head_dim", None) is None else text.head_dim
    projected = one * (heads + 2 * (text.num_key_value_heads or heads))
    outputs = projected + 2 * width + 2 * text.intermediate_size  # of a layer's seven linear maps
    kept = 5 * width + 2 * projected + 2.5 * text.intermediate_size + 0.8 * len(shape.adapters) * outputs
    scores = heads * tokens * (2 if shape.attention == "eager" else 0)
    layer = number * tokens * (kept + scores)
    if shape.gradient_checkpointing:
        layers = _FP32 * tokens * width * text.num_hidden_layers + layer
    else:
        layers = layer * text.num_hidden_layers
    words = 3 * _FP32 * (shape.max_text_tokens + 1) * text.vocab_size  # logits, their log-softmax, and a teacher's
    return layers + words + _vision_bytes(model, number) + _expert_bytes(model, number)


def _vision_bytes(model: VLA, number: int) -> float:
    vision = model.backbone.hf.config.vision_config
    if not any(p.requires_grad for p in model.backbone.hf.model.parameters() if p.dim() == 4):
        return 0.0  # a frozen tower keeps nothing
    patches = len(model.config.cameras) * (model.backbone.image_size // patch_size(model)) ** 2
    width, layers = vision.hidden_size, vision.num_hidden_layers
    inner = getattr(vision, "intermediate_size", None) or 4 * width
    return number * patches * layers * (7 * width + 2 * inner + 2 * vision.num_attention_heads * patches)


def _expert_bytes(model: VLA, number: int) -> float:
    head, shape = model.config.head, model.config
    draws = head.draws if head.kind == "flow" else 1
    context = shape.num_queries + 1 + (image_tokens(model) if head.vision else 0)
    rows = context + draws * shape.horizon
    scores = 3 * head.heads * draws * shape.horizon * (context + shape.horizon)
    return number * head.layers * (16 * rows * head.hidden + scores)


def plan(
    recipe: str,
    *,
    gpus: int,
    gpu_memory_gb: float,
    stage: Stage = "dual",
    assignments: tuple[str, ...] = (),
    teacher_cache: bool = False,
    gpu_tflops: float = 400.0,
    answers: int | None = None,
) -> dict[str, Any]:
    """What a stage of a recipe needs on each of `gpus` GPUs of this memory (GB = 10^9 bytes).

    teacher_cache: without online teachers. gpu_tflops: the peak of one GPU in the recipe's dtype. answers: questions in
    the data, for the size of the cache (default: the recipe's). Raises: UsageError.
    """
    if gpus < 1 or gpu_memory_gb <= 0:
        raise UsageError(f"{gpus} GPUs of {gpu_memory_gb} GB.", "pass at least one GPU, and its memory in GB")
    chosen = override(get_recipe(recipe), assignments)
    config = chosen.stage(stage)
    model = meta_model(chosen.model, stage)
    found = sizes(model, config)
    state = state_bytes(found, config, gpus)
    online = stage == "dual" and not teacher_cache
    state["teachers"] = _FP32 * found.total * len(config.taught) if online else 0.0
    sample = activation_bytes(model, config)
    free = gpu_memory_gb * GB - _RESERVED - sum(state.values())
    batch = max(0, int(free // sample))
    texts = model.config.max_text_tokens
    tokens = image_tokens(model) + _PROMPT_TOKENS + texts + model.config.num_queries
    arithmetic = Arithmetic.of(model)
    flops = arithmetic.training(1, tokens, texts + 1)
    flops *= _RECOMPUTED if model.config.gradient_checkpointing else 1.0
    flops += arithmetic.forward(1, tokens, texts + 1) if online and config.taught else 0.0
    settings = CacheSettings()
    vocab_size = model.backbone.vocab_size
    kept = min(settings.top_k, vocab_size - 1)
    questions = chosen.collect.qa if answers is None else answers
    per_token = topk.bytes_per_token(kept, settings.tail_draws, vocab_size, settings.packed)
    share = -(-config.batch_size // gpus)
    return {
        "recipe": recipe,
        "stage": stage,
        "gpus": gpus,
        "parameters": found.total,
        "trained_parameters": found.trained,
        "state_gb": {name: size / GB for name, size in state.items()},
        "activation_gb_per_sample": sample / GB,
        "batch_per_gpu": batch,
        "fits": batch >= 1,
        "micro_batch": max((b for b in range(1, min(batch, share) + 1) if share % b == 0), default=0),
        "samples_per_s": gpus * gpu_tflops * 1e12 * _UTILISATION / flops,
        "cache_bytes_per_token": per_token,
        "cache_gb": settings.views * questions * model.config.max_text_tokens * per_token / GB,
        "assumptions": (
            f"{_PROMPT_TOKENS} tokens of prompt, texts of {model.config.max_text_tokens} tokens, {_RESERVED / GB:g} GB "
            f"reserved, {_UTILISATION:.0%} of {gpu_tflops:g} TFLOP/s a GPU; cache: {questions} questions in "
            f"{settings.views} views, reasoning only"
        ),
    }


def _size(gb: float) -> str:
    return f"{gb:.2f} GB" if gb >= 1 else f"{1000 * gb:.1f} MB"


def render(result: Mapping[str, Any]) -> str:
    """For a person."""
    rows = [[f"memory: {name}", _size(size)] for name, size in result["state_gb"].items() if size]
    rows = [
        ["parameters", f"{result['parameters'] / 1e6:.1f} M"],
        ["of them trained", f"{result['trained_parameters'] / 1e6:.1f} M"],
        *rows,
        ["memory: one sample", _size(result["activation_gb_per_sample"])],
        ["samples that fit on a GPU", str(result["batch_per_gpu"])],
        ["zero.micro_batch for the recipe's batch", str(result["micro_batch"]) if result["fits"] else "does not fit"],
        ["samples a second, at most", f"{result['samples_per_s']:.3g}"],
        ["teacher cache", f"{_size(result['cache_gb'])} ({result['cache_bytes_per_token']} bytes a token)"],
    ]
    title = f"{result['recipe']}, stage {result['stage']}, on each of {result['gpus']} GPUs"
    return f"{table(title, ['', 'estimate'], rows)}\nassumed: {result['assumptions']}"
