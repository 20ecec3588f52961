"""The checkpoint folder of contract.md: `config.json`, `model.safetensors`, processor files, `README.md`. Never pickle.

Written through storage.py, so a file is whole or absent; whether a folder is finished is its manifest's business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

import dualvla
from dualvla.config import from_dict, to_dict
from dualvla.errors import CheckpointError, DataError, UsageError
from dualvla.io import storage
from dualvla.models.config import Adapter, ModelConfig, computed_as
from dualvla.models.processing import Processor
from dualvla.models.stages import group_of, prepare
from dualvla.models.vla import VLA

ARCHITECTURE = "dualvla.VLA"
CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
_HEAD = "backbone.hf.lm_head.weight"
_REMEDY = "pass a folder that `dualvla train` has finished"


def save_checkpoint(
    folder: str, state: Mapping[str, Tensor], config: ModelConfig, processor: Processor, facts: Mapping[str, Any]
) -> None:
    """state: the model's whole `state_dict` (tied weights may come under both names). facts: rows of the model card."""
    kept: dict[str, Tensor] = {}
    for name, tensor in sorted(state.items()):
        if name != _tied_head(config, state):
            kept[name] = tensor.detach().cpu().contiguous()
    values = {"architecture": ARCHITECTURE, "version": dualvla.__version__, "model": to_dict(config)}
    processor.save(folder)
    storage.write_bytes(storage.join(folder, WEIGHTS_FILE), safetensors.torch.save(kept, metadata={"format": "pt"}))
    storage.write_bytes(storage.join(folder, CARD_FILE), model_card(config, kept, facts).encode())
    storage.write_bytes(storage.join(folder, CONFIG_FILE), (json.dumps(values, indent=2) + "\n").encode())


def load_config(folder: str) -> ModelConfig:
    """Raises: CheckpointError if `folder` holds no configuration of this architecture."""
    try:
        values = json.loads(storage.read_bytes(storage.join(folder, CONFIG_FILE)))
    except DataError as error:
        raise CheckpointError(f"'{folder}' is not a checkpoint: it has no {CONFIG_FILE}.", _REMEDY) from error
    except ValueError as error:
        raise CheckpointError(f"'{folder}/{CONFIG_FILE}' is not valid JSON: {error}.", _REMEDY) from error
    found = values.get("architecture") if isinstance(values, dict) else None
    if found != ARCHITECTURE:
        raise CheckpointError(f"'{folder}' holds architecture {found!r}, not '{ARCHITECTURE}'.", _REMEDY)
    try:
        config = from_dict(ModelConfig, values["model"], "model")
    except UsageError as error:
        raise CheckpointError(
            f"'{folder}/{CONFIG_FILE}' was written by another version: {error.message}", error.fix
        ) from error
    return config


def load_model(
    folder: str, stage: str | None = None, seed: int = 0, like: ModelConfig | None = None
) -> tuple[VLA, Processor, ModelConfig]:
    """The model in eval mode, its processor and its configuration.

    `stage` prepares it for training in that stage: adapters it lacks are added with zero effect (`seed` draws their
    inner weights). like: whose attention, gradient checkpointing and frozen groups are taken (default: its own).
    Raises: CheckpointError naming what is missing, damaged or of another architecture.
    """
    saved = load_config(folder)
    saved = saved if like is None else computed_as(saved, like)
    config = saved if stage is None else prepare(saved, stage)
    processor = Processor.load(folder, config)
    try:
        state = safetensors.torch.load(storage.read_bytes(storage.join(folder, WEIGHTS_FILE)))
    except DataError as error:
        raise CheckpointError(f"'{folder}' has no {WEIGHTS_FILE}.", _REMEDY) from error
    except SafetensorError as error:
        raise CheckpointError(f"'{folder}/{WEIGHTS_FILE}' is damaged or truncated: {error}.", _REMEDY) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VLA(config)
    _load_state(model, state, folder, new=set(config.adapters) - set(saved.adapters))
    return model.eval(), processor, config


def model_card(config: ModelConfig, state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """The checkpoint's README.md, in Markdown."""
    millions = sum(t.numel() for t in state.values()) / 1e6
    rows = {
        "kind": config.kind,
        "backbone": config.backbone or f"{config.backbone_config['model_type']}, trained from random weights",
        "parameters": f"{millions:.2f} M",
        "action space": f"{config.action_space}, {config.control_hz:g} Hz, chunks of {config.horizon}",
        "cameras": f"{', '.join(config.cameras)} at {config.image_size} px",
        "adapters": ", ".join(config.adapters) or "none",
        **facts,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"# A DualVLA {config.kind} policy\n\n| | |\n|---|---|\n{table}\n\n"
        "Load it with `dualvla.vla_policy.VLAPolicy.from_pretrained(folder)`, evaluate it with `dualvla eval --policy "
        "folder`, serve it with `dualvla serve folder`.\n"
    )


def _tied_head(config: ModelConfig, names: Mapping[str, Tensor]) -> str | None:
    """The output embedding's name where it is the input embedding itself."""
    return _HEAD if config.backbone_config.get("tie_word_embeddings", False) and _HEAD in names else None


def _load_state(model: VLA, state: dict[str, Tensor], folder: str, new: set[Adapter]) -> None:
    own = model.state_dict()
    present = {own[name].data_ptr() for name in state if name in own}
    added = {*new, "gate"} if new else set()
    for name, tensor in own.items():
        if name not in state and tensor.data_ptr() not in present and group_of(name) not in added:
            raise CheckpointError(f"'{folder}/{WEIGHTS_FILE}' lacks '{name}'.", _REMEDY)
    for name, tensor in state.items():
        if name not in own:
            raise CheckpointError(f"'{folder}/{WEIGHTS_FILE}' holds '{name}', which the model lacks.", _REMEDY)
        if own[name].shape != tensor.shape:
            raise CheckpointError(
                f"'{name}' in '{folder}' has shape {tuple(tensor.shape)}, the model's has {tuple(own[name].shape)}.",
                _REMEDY,
            )
    model.load_state_dict(state, strict=False)
