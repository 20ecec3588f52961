"""The DeepSpeed engine around a model: set-up, learning rate, averaged weights, and whole weights out of shards.

Knows nothing of data or losses. Every function here is called by all workers together, unless it says otherwise.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dualvla.errors import CheckpointError
from dualvla_pipelines.recipes import TrainConfig, ZeroConfig

# DeepSpeed allocates whole buckets up front; its defaults (2 GB each) are made for models a thousand times larger.
_MAX_BUCKET_ELEMENTS = 500_000_000


def initialize(model: nn.Module, config: TrainConfig, micro_batches: int, universal: bool = False) -> Any:
    """A DeepSpeed engine that trains the parameters of `model` that require grad.

    micro_batches: backward passes a step. universal: its `load_checkpoint` reads what `universal_state` made. Weight
    decay is applied to matrices only. torch.distributed must be up.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # read at import
    import deepspeed
    import deepspeed.ops

    # Its shared-memory collectives for CPUs are compiled on first use (most of a minute, needs a C++ compiler).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas}
    whole = config.zero.stage == 0
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=_Careful(groups, config.grad_clip, **settings) if whole else torch.optim.AdamW(groups, **settings),
        dist_init_required=False,
        config={
            **_engine_config(config.zero, config.grad_clip, micro_batches, sum(p.numel() for p in model.parameters())),
            "checkpoint": {"load_universal": universal},
        },
    )
    return engine


class _Careful(torch.optim.AdamW):
    """AdamW that does of itself what DeepSpeed's optimisers of stages 1 to 3 do, and its stage 0 does not: it clips and
    tells the norm of all gradients, and leaves the weights alone where that is not finite."""

    def __init__(self, groups: list[dict[str, Any]], clip: float, **settings: Any):
        super().__init__(groups, **settings)
        self._clip = clip
        self._global_grad_norm: float | None = None  # names that DeepSpeed looks for
        self.overflow = False

    def step(self, closure: Any = None) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self._global_grad_norm = float(norm)
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow:
            return None
        if self._clip > 0:
            parameters = [p for group in self.param_groups for p in group["params"]]
            nn.utils.clip_grads_with_norm_(parameters, self._clip, norm)
        return super().step(closure)


def universal_state(saved: str, out: str) -> None:
    """Rewrites a ZeRO-3 state that `engine.save_checkpoint` made in DeepSpeed's universal format, which any number of
    workers can load. Called by one worker. Raises: CheckpointError with DeepSpeed's own words."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", saved]
    ended = subprocess.run(
        [*command, "--output_folder", out, "--num_extract_workers", "1", "--num_merge_workers", "1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ended.returncode:
        last = (ended.stderr or ended.stdout).strip().splitlines()[-1:]
        raise CheckpointError(
            f"'{saved}' cannot be taken over by another number of workers: {' '.join(last)}",
            "go on with the number of workers that wrote it",
        )


def load_universal_state(engine: Any, folder: str, tag: str) -> None:
    """`engine.load_checkpoint` of a universal state, with what DeepSpeed 0.19 gets wrong in it put right.

    It gives all groups one and the same step counter, which each of them then advances, and the hyperparameters of the
    first group, so that what is exempt from weight decay no longer is.
    """
    optimizer = engine.optimizer.optimizer
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    engine.load_checkpoint(folder, tag=tag)
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in optimizer.state.values():
        state["step"] = state["step"].clone()


def bucket_elements(parameters: int) -> int:
    """Elements of a communication bucket for a model of so many parameters."""
    return min(_MAX_BUCKET_ELEMENTS, 2 * parameters)


def _engine_config(zero: ZeroConfig, grad_clip: float, micro_batches: int, elements: int) -> dict[str, Any]:
    bucket = bucket_elements(elements)
    stage: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": torch.cuda.is_available(),
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "sub_group_size": bucket,
        "offload_optimizer": {"device": zero.offload},
    }
    if zero.stage == 3:
        stage |= {
            "stage3_param_persistence_threshold": zero.persistence_threshold,
            "stage3_prefetch_bucket_size": bucket,
            "memory_efficient_linear": False,  # its hand-written backward costs more than the rest of the step on CPUs
        }
    return {
        "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own logs only
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": grad_clip if zero.stage else 0.0,  # see _Careful
        "zero_optimization": stage,
        "zero_force_ds_cpu_optimizer": False,  # its CPU Adam is compiled on first use
        # No "safe" modules: DeepSpeed would sum their gradients over workers in bf16.
        "torch_autocast": {"enabled": zero.dtype == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "steps_per_print": 1 << 62,
    }


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of step 0, 1, ...: linear warm-up to `lr`, then constant, or a cosine down to a tenth of it."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def set_learning_rate(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


class Averages:
    """Exponential moving averages of this worker's shard of the float32 master weights.

    The average after step t is decay_t * average + (1 - decay_t) * weights, decay_t = min(decay, (1 + t) / (10 + t)).
    """

    def __init__(self, engine: Any, decay: float):
        self._masters = _masters(engine)
        self._parts = _parts(engine) if engine.zero_optimization_stage() == 3 else None
        self._decay = decay
        self.shadows = [master.detach().clone() for master in self._masters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """step: 0 for the first one."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadows, [master.detach() for master in self._masters], 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """This worker's part, by parameter under ZeRO-3 (so that another number of workers can take it over)."""
        if self._parts is None:
            return {f"shard{i}": shadow for i, shadow in enumerate(self.shadows)}
        return {part.name: self.shadows[part.group][part.start : part.start + part.size] for part in self._parts}

    @torch.no_grad()
    def load(self, states: Sequence[dict[str, Tensor]], rank: int) -> None:
        """states: what `state` gave on each of the workers that saved, in order of their ranks."""
        if self._parts is None:
            for i, shadow in enumerate(self.shadows):
                shadow.copy_(states[rank][f"shard{i}"])
            return
        for part in self._parts:
            whole = torch.cat([state[part.name] for state in states])[: part.numel]
            own = whole[rank * part.size : (rank + 1) * part.size]
            shadow = self.shadows[part.group][part.start : part.start + part.size]
            shadow.zero_()  # what pads the last worker's part
            shadow[: len(own)].copy_(own)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The engine's master weights are the averages inside this block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for shadow, master in zip(self.shadows, self._masters, strict=True):
            held = master.detach().clone()
            master.detach().copy_(shadow)
            shadow.copy_(held)


@dataclass(frozen=True)
class _Part:
    """Where a worker's part of a parameter of `numel` elements lies in the flat master weights of its group."""

    name: str
    group: int
    start: int
    size: int
    numel: int


def _parts(engine: Any) -> list[_Part]:
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    parts = []
    for group, parameters in enumerate(engine.optimizer.fp16_groups):
        start = 0
        for parameter in parameters:
            size = parameter.partition_numel()
            parts.append(_Part(names[id(parameter)], group, start, size, parameter.ds_numel))
            start += size
    return parts


def _masters(engine: Any) -> list[Tensor]:
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    return list(optimizer.single_partition_of_fp32_groups)


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """Every parameter (in float32) and persistent buffer, whole, on the CPU of every worker."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    module, sharded = engine.module, engine.zero_optimization_stage() > 0
    whole: dict[int, Tensor] = {}
    for parameter in module.parameters():
        if parameter.requires_grad and sharded:
            whole[id(parameter)] = safe_get_full_fp32_param(parameter).detach().cpu().clone()
        else:
            with deepspeed.zero.GatheredParameters([parameter]):
                whole[id(parameter)] = parameter.detach().float().cpu().clone()
    state = {name: whole[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}
    buffers = dict(module.named_buffers(remove_duplicate=False))
    return state | {name: buffers[name].detach().cpu().clone() for name in _persistent(module) & buffers.keys()}


def _persistent(module: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, child in module.named_modules(remove_duplicate=False)
        for name in child._buffers.keys() - child._non_persistent_buffers_set
    }
