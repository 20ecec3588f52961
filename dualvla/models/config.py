"""What a model is: frozen dataclasses, written whole into the checkpoint's `config.json`. Knows no torch.

`ModelConfig.backbone` names real weights; `backbone_config` describes a backbone built from scratch. A checkpoint
always carries `backbone_config`, so it needs no download to be loaded again.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from dualvla.errors import UsageError, did_you_mean
from dualvla.schema import ACTION_SPACES, ActionSpace

Adapter = Literal["action", "language"]
Group = Literal[
    "backbone", "vision", "words", "tower", "queries", "grounding", "head", "action", "language", "gate"
]  # of parameters; see stages.py
Divergence = Literal["forward", "reverse", "mixed", "jensen-shannon"]


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of the language model's attention and MLP projections (paper: rank 128, alpha 256, 0.05)."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    gate_hidden: int = 32  # width of the 4-layer MLP that weighs the two adapters at each token


@dataclass(frozen=True)
class TowerConfig:
    """A DINOv2 of the action expert's own, modulated by the latent action (FiLM)."""

    name: str | None = None  # a Hugging Face name or folder; None: random weights of `config`
    config: dict[str, Any] = field(default_factory=dict)  # of transformers' Dinov2Config; complete in a checkpoint
    image_size: int = 224  # pixels that pictures are resized to; a multiple of the patch size


@dataclass(frozen=True)
class HeadConfig:
    """The action expert: block-wise causal attention over [vision | latent action | proprioception | chunk].

    kind: "flow" (flow matching) or "token" (bins, OpenVLA's convention); the paper has 12 layers of 768 and 12 heads.
    """

    kind: Literal["flow", "token"] = "flow"
    hidden: int = 128
    layers: int = 3
    heads: int = 4
    vision: bool = False  # attend to the backbone's image states too
    tower: TowerConfig | None = None
    draws: int = 4  # flow: (tau, noise) pairs per sample and step: the head is cheap, the backbone is not
    euler_steps: int = 10  # flow
    tau_scale: float = 0.999  # flow: s of tau = s (1 - u), u ~ Beta(1.5, 1)
    bins: int = 256  # token: per dimension


@dataclass(frozen=True)
class GroundingConfig:
    """The module that points at the target: a heat map over the first camera's image tokens."""

    pool: bool = True  # add the heat-weighted image state to the latent action


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms of L_total (Eq. 7). A term without targets in a batch is 0 whatever its weight."""

    lm: float = 1.0  # robot samples: reasoning, and whether to think at all
    answer: float = 1.0  # multimodal samples; apart, because a few answer tokens would drown among those of reasoning
    flow: float = 1.0
    bins: float = 1.0
    heat: float = 0.2
    position: float = 0.5
    kd: float = 0.15  # lambda of Eq. 7
    temperature: float = 2.0  # of token distillation (Eq. 6)
    divergence: Divergence = "forward"  # of token distillation; see `distill.losses.divergence`
    divergence_mix: float = 0.5  # of "mixed" and "jensen-shannon"

    def __post_init__(self) -> None:
        if self.divergence in ("mixed", "jensen-shannon") and not 0.0 < self.divergence_mix < 1.0:
            raise UsageError(
                f"divergence_mix = {self.divergence_mix} of a {self.divergence} divergence.",
                "pass a number between 0 and 1, or choose divergence forward or reverse",
            )


@dataclass(frozen=True)
class ModelConfig:
    """A vision-language-action model. Sizes in pixels, rates in Hz, `horizon` and `execute_steps` in control steps."""

    backbone: str | None = None  # a Hugging Face name or folder; None: random weights from `backbone_config`
    backbone_config: dict[str, Any] = field(default_factory=dict)
    attention: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] = "eager"  # sdpa is slow on CPUs in bf16
    gradient_checkpointing: bool = False  # compute the backbone's layers again in the backward pass: less memory
    frozen: tuple[Group, ...] = ()  # groups of parameters that never train, whatever stages.py says
    tuned: tuple[Group, ...] = ()  # groups that train in every stage, beside those of stages.py
    vocab_size: int = 512  # of the tokenizer trained on the spot; a named backbone brings its own tokenizer
    image_size: int = 64
    cameras: tuple[str, ...] = ("main",)
    action_space: str = "ee_delta_pose+gripper"
    control_hz: float = 5.0
    horizon: int = 4
    execute_steps: int = 2
    num_queries: int = 4
    proprio_dim: int = 0
    kind: Literal["specialist", "reasoning"] = "specialist"
    adapters: tuple[Adapter, ...] = ()  # set by stages.prepare
    lora: LoraConfig = LoraConfig()
    head: HeadConfig = HeadConfig()
    grounding: GroundingConfig | None = GroundingConfig()
    color_jitter: float = 0.1  # brightness and per-channel gain of training images, +- this share
    max_text_tokens: int = 64
    think_above: float = 0.5  # it thinks where its probability of a text exceeds this; see `thinking_as_often`

    @property
    def actions(self) -> ActionSpace:
        """Raises: UsageError for an action space that schema.py does not name."""
        if self.action_space not in ACTION_SPACES:
            raise UsageError(
                f"Unknown action space '{self.action_space}'.", did_you_mean(self.action_space, ACTION_SPACES)
            )
        return ACTION_SPACES[self.action_space]


_HOW = ("attention", "gradient_checkpointing", "frozen", "tuned")


def computed_as(config: ModelConfig, other: ModelConfig) -> ModelConfig:
    """`config`'s model, computed and trained in the way that `other` says: what is no part of an architecture."""
    return dataclasses.replace(config, **{name: getattr(other, name) for name in _HOW})


def thinking_as_often(config: ModelConfig, keep_ratio: float) -> ModelConfig:
    """For a model trained on robot samples of which this share had a text.

    Where few have one, no single picture makes a text likelier than not, and a policy that took the likeliest token
    would never think. So it thinks where a text is likelier than it was on average.
    """
    return dataclasses.replace(config, think_above=min(0.5, keep_ratio))


_TINY_IDEFICS3: dict[str, Any] = {
    "model_type": "idefics3",
    "scale_factor": 1,  # one token per 8x8 patch: 64 image tokens ground, 16 do much less
    "vision_config": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "patch_size": 8,
        "initializer_range": 0.06,  # grounds in two thirds of the steps that 0.02 takes at this width
    },
    "text_config": {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "initializer_range": 0.06,
    },
    "tie_word_embeddings": True,
}


def tiny_backbone() -> dict[str, Any]:
    """A 0.8 M-parameter Idefics3 (the class of SmolVLM) that learns to ground within minutes of CPU."""
    return copy.deepcopy(_TINY_IDEFICS3)
