"""What the paper's claims are watched by while training goes on: losses by domain, kept reasoning, speed, memory, MFU.

Costs no collective of its own: what must be added up over workers goes with what the loss needs anyway. Knows batches,
not how they are trained on.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dualvla.models.config import LossWeights
from dualvla.models.processing import IGNORE
from dualvla.models.vla import LOSS_TERMS, VLA
from dualvla_pipelines.flops import Arithmetic, image_tokens, peak_flops
from dualvla_pipelines.recipes import TrainConfig

_OF_QUESTIONS = ("answer", "kd_token")
_GB = 1e9


class Watch:
    """The figures of one worker's run. Collective where it is made.

    MFU is the arithmetic of real tokens (`flops.py`) by the time of whole steps and the peak of all workers' devices:
    `peak_tflops` of each if the configuration says it, else what a large matrix product reaches, measured at the start
    by all workers at once.
    """

    def __init__(self, model: VLA, config: TrainConfig, device: torch.device):
        self._arithmetic, self._config, self._device = Arithmetic.of(model), config, device
        self._fixed = image_tokens(model) + model.config.num_queries
        dtype = torch.bfloat16 if config.zero.dtype == "bf16" else torch.float32
        own = config.peak_tflops * 1e12 if config.peak_tflops else peak_flops(device, dtype)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # what was just measured is no part of training
        peak = torch.tensor(own, dtype=torch.float64, device=device)
        dist.all_reduce(peak)
        self.peak = float(peak)

    def counts(self, batch: dict[str, Tensor]) -> Tensor:
        """What `figures` needs of this worker's share of a batch, to be summed over workers: float64 [7]."""
        instruction, text, robot = batch["instruction_mask"], batch["text_mask"], batch["robot"]
        samples = len(robot)
        proprio = batch["has_proprio"].sum() if batch["proprio"].shape[1] else torch.zeros_like(robot.sum())
        tokens = instruction.sum() + text.sum() + proprio + samples * self._fixed
        width = instruction.shape[1] + text.shape[1] + self._fixed + (1 if batch["proprio"].shape[1] else 0)
        thinking = (text.any(dim=1) & robot).sum()
        texts = (batch["labels"] != IGNORE).sum()
        device = robot.device
        sizes = torch.tensor([samples, samples * width, _memory_bytes(device)], dtype=torch.float64, device=device)
        return torch.cat([sizes, torch.stack([tokens, texts, robot.sum(), thinking]).double()])

    def figures(self, counts: Tensor, seconds: float) -> dict[str, float]:
        """counts: of the global batch. seconds: of the whole step.

        kept_reasoning: share of robot samples that have a text to learn. padding: share of the sequences' positions
        that hold nothing. memory_gb: 10^9 bytes, mean over workers (peak of a GPU, resident set on a CPU).
        """
        samples, positions, memory, tokens, texts, robot, thinking = counts.tolist()
        operations = self._arithmetic.training(samples, tokens, texts)
        return {
            "kept_reasoning": thinking / robot if robot else 0.0,
            "padding": 1.0 - tokens / positions,
            "samples_per_s": samples / seconds,
            "tokens_per_s": tokens / seconds,
            "memory_gb": memory / dist.get_world_size() / _GB,
            "mfu": operations / seconds / self.peak,
        }


def by_domain(metrics: dict[str, float], weights: LossWeights) -> dict[str, float]:
    """loss_robot and loss_multimodal, which add up to the loss."""
    parts = {"loss_robot": 0.0, "loss_multimodal": 0.0}
    for name in (term for term in LOSS_TERMS if term in metrics):  # in one order: sums differ in their last bit
        domain = "loss_multimodal" if name in _OF_QUESTIONS else "loss_robot"
        parts[domain] += getattr(weights, "kd" if name.startswith("kd_") else name) * metrics[name]
    return parts


def _memory_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    import psutil

    return float(psutil.Process().memory_info().rss)
