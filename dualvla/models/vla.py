"""The vision-language-action model: backbone, action queries, grounding and action head, in one sequence.

    [image tokens | proprioception | instruction] -> [reasoning or answer]? -> [action queries]

Masked tokens take up no position, so a pruned text is removed from the sequence, not hidden in it. The token after the
prompt is supervised in both cases (the first word, or ACT, which stands for the first query): *when to think* is
learned.

Everything training needs goes through `VLA.forward`: under ZeRO-3 a parameter is whole only inside it. Knows nothing of
samples, files or schedules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from dualvla.distill.losses import masked_mean, token_kd
from dualvla.distill.topk import Known, known_kd
from dualvla.models import backbone as backbones
from dualvla.models import heads, tower
from dualvla.models.adapters import attach_adapters
from dualvla.models.config import LossWeights, ModelConfig
from dualvla.models.expert import Context
from dualvla.models.grounding import Grounding, target_cell
from dualvla.models.processing import IGNORE, Batch, Processor

LOSS_TERMS = ("lm", "answer", "flow", "heat", "position", "kd_flow", "kd_token", "bins", "kd_bins")
"""The terms of L_total, in the order of `loss_counts`: flow of a flow head, bins of a token head.

LossWeights has a field of each name (kd_*: `kd`).
"""


@dataclass
class Encoded:
    """States of a pass over whole sequences: text [B, T + 1, d] predicts labels, latents [B, N, d], image [B, M, d]."""

    text: Tensor
    latents: Tensor
    image: Tensor
    heat_logits: Tensor | None
    position: Tensor | None


@dataclass
class Prefix:
    """A prompt that was read: its cache, mask [B, L], image states [B, M, d] and next-token logits [B, V]."""

    cache: Cache
    mask: Tensor
    image: Tensor
    logits: Tensor


class VLA(nn.Module):
    """`config.backbone_config` must be complete (`VLA.create` and `load_model` see to it)."""

    def __init__(self, config: ModelConfig, pretrained: bool = False):
        super().__init__()
        self.config = config
        self.backbone = backbones.build(config, pretrained)
        width = self.backbone.hidden_size
        if config.adapters:
            attach_adapters(self.backbone.language_model.layers, width, config.adapters, config.lora)
        self.queries = nn.Embedding(config.num_queries, width)
        self.proprio_in = nn.Linear(config.proprio_dim, width) if config.proprio_dim else None
        self.grounding = Grounding(config.grounding, width) if config.grounding is not None else None
        self.head = heads.build(config, width)
        nn.init.normal_(self.queries.weight, std=0.02)

    @classmethod
    def create(cls, config: ModelConfig, processor: Processor, seed: int) -> VLA:
        """A new model with seeded random weights (the backbone's own where `config.backbone` names one)."""
        config = dataclasses.replace(config, backbone_config=backbones.resolve(config, processor.vocab_size))
        if config.head.tower is not None:
            head = dataclasses.replace(config.head, tower=tower.resolve(config.head.tower))
            config = dataclasses.replace(config, head=head)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(config, pretrained=config.backbone is not None)
        if model.head.tower is not None and model.head.tower.config.name is not None:
            tower.load_published(model.head.tower)
        return model

    def forward(
        self,
        batch: Batch,
        mode: Literal["loss", "action", "logits"] = "loss",
        counts: Tensor | None = None,
        weights: LossWeights | None = None,
        targets: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """What training needs of a batch.

        mode "loss": "loss" = L_VLA + lambda L_KD (Eq. 7) and each term, detached. counts: see `loss_counts`. targets:
        what the teachers gave: "velocity" [B, K, H, D] or "bins" [B, H, D, bins] (Eq. 5, of the head's kind), "logits"
        [B, T + 1, V] or `topk.Known.targets` of [B, T + 1] (Eq. 6), either or both.
        mode "action": {"velocity" or "bins"} of an action teacher, pi(a | o, i): the text is left out.
        mode "logits": {"logits": [B, T + 1, V]} of a reasoning teacher, pi(r | o, i).
        """
        if mode == "action":
            batch = {**batch, "text_mask": torch.zeros_like(batch["text_mask"])}
            encoded = self.encode(batch)
            context = self._context(encoded.latents, encoded.image, batch)
            return {self.head.target: self.head.predict(context, batch)}
        encoded = self.encode(batch)
        if mode == "logits":
            return {"logits": self.backbone.logits(encoded.text)}
        return self._losses(batch, encoded, counts, weights or LossWeights(), targets or {})

    def encode(self, batch: Batch) -> Encoded:
        """One causal pass over [prompt | text | queries]."""
        prompt, prompt_mask, image_tokens = self._prompt(batch)
        length, number = prompt.shape[1], len(batch["text_ids"])
        embeds = torch.cat([prompt, self.backbone.embed(batch["text_ids"]), self._query_embeds(number)], dim=1)
        mask = torch.cat(
            [prompt_mask, batch["text_mask"], prompt_mask.new_ones(number, self.config.num_queries)], dim=1
        )
        hidden = self.backbone.decode(embeds, mask)
        image, latents = hidden[:, :image_tokens], hidden[:, -self.config.num_queries :]
        text = hidden[:, length - 1 : length + batch["text_ids"].shape[1]]
        if self.grounding is None:
            return Encoded(text, latents, image, None, None)
        grounded = self.grounding(latents, image[:, : image_tokens // len(self.config.cameras)])
        return Encoded(text, grounded.latents, image, grounded.heat_logits, grounded.position)

    # Inference, in steps: read_prompt, then read_text any number of times, then act.

    def read_prompt(self, batch: Batch) -> Prefix:
        prompt, mask, image_tokens = self._prompt(batch)
        cache = self.backbone.new_cache()
        hidden = self.backbone.decode(prompt, mask, cache)
        return Prefix(cache, mask, hidden[:, :image_tokens], self.backbone.logits(hidden[:, -1:])[:, 0])

    def read_text(self, prefix: Prefix, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Appends text (masked tokens do not exist) and returns the next-token logits [B, T, V]; extends `prefix`."""
        prefix.mask = torch.cat([prefix.mask, mask_BT], dim=1)
        hidden = self.backbone.decode(self.backbone.embed(ids_BT), prefix.mask, prefix.cache)
        return self.backbone.logits(hidden)

    def act(self, prefix: Prefix, batch: Batch, noise_BHD: Tensor, steps: int) -> Tensor:
        """`latent_action`, then `expert`: normalised actions [B, H, D]."""
        return self.expert(self.latent_action(prefix), prefix.image, batch, noise_BHD, steps)

    def latent_action(self, prefix: Prefix) -> Tensor:
        """All queries in one pass: [B, N, d]; extends `prefix`."""
        number = len(prefix.mask)
        mask = torch.cat([prefix.mask, prefix.mask.new_ones(number, self.config.num_queries)], dim=1)
        latents = self.backbone.decode(self._query_embeds(number), mask, prefix.cache)
        if self.grounding is None:
            return latents
        first_camera = prefix.image[:, : prefix.image.shape[1] // len(self.config.cameras)]
        return self.grounding(latents, first_camera).latents

    def expert(self, latents_BNd: Tensor, image_BMd: Tensor, batch: Batch, noise_BHD: Tensor, steps: int) -> Tensor:
        """`steps` Euler steps from `noise_BHD`: normalised actions [B, H, D]. The latent action may be an earlier one:
        of `batch` only proprioception and, with a vision tower, pictures are seen."""
        return self.head.sample(self._context(latents_BNd, image_BMd, batch), noise_BHD, steps)

    def _prompt(self, batch: Batch) -> tuple[Tensor, Tensor, int]:
        """Embeddings [B, L, d], mask [B, L] and the number of image tokens, which come first."""
        image = self.backbone.image_states(batch["images"])
        instruction = self.backbone.embed(batch["instruction_ids"])
        image_mask = batch["instruction_mask"].new_ones(image.shape[:2])
        if self.proprio_in is None:
            parts, masks = [image, instruction], [image_mask, batch["instruction_mask"]]
        else:
            proprio = self.proprio_in(batch["proprio"].to(image.dtype)).unsqueeze(1)
            parts = [image, proprio, instruction]
            masks = [image_mask, batch["has_proprio"].unsqueeze(1), batch["instruction_mask"]]
        return torch.cat(parts, dim=1), torch.cat(masks, dim=1), image.shape[1]

    def _query_embeds(self, number: int) -> Tensor:
        indices = torch.arange(self.config.num_queries, device=self.queries.weight.device)
        return self.queries(indices).expand(number, -1, -1)

    def _context(self, latents: Tensor, image: Tensor, batch: Batch) -> Context:
        proprio = batch["proprio"].to(latents.dtype) if self.config.proprio_dim else None
        return self.head.context(latents, proprio, image, batch["images"])

    def _losses(
        self,
        batch: Batch,
        encoded: Encoded,
        counts: Tensor | None,
        weights: LossWeights,
        targets: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        number = dict(zip(LOSS_TERMS, loss_counts(batch) if counts is None else counts, strict=True))
        masks = _masks(batch)
        logits = self.backbone.logits(encoded.text).float()
        token_loss = F.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE, reduction="none"
        ).view_as(batch["labels"])
        terms = {name: masked_mean(token_loss, masks[name], number[name]) for name in ("lm", "answer")}

        acted = self.head.term
        predicted = self.head.predict(self._context(encoded.latents, encoded.image, batch), batch).float()
        terms[acted] = self.head.loss(predicted, batch, masks["steps"], number[acted])

        if encoded.heat_logits is not None and encoded.position is not None:
            cells = target_cell(batch["target_pixel"], backbones.grid_side(encoded.heat_logits.shape[1], 1))
            heat = F.cross_entropy(encoded.heat_logits.float(), cells, ignore_index=-1, reduction="none")
            terms["heat"] = masked_mean(heat, masks["heat"], number["heat"])
            known = torch.nan_to_num(batch["target_position"])
            off = F.smooth_l1_loss(encoded.position.float(), known, reduction="none").mean(dim=-1)
            terms["position"] = masked_mean(off, masks["position"], number["position"])

        if self.head.target in targets:  # Eq. 5
            teacher = targets[self.head.target]
            terms[f"kd_{acted}"] = self.head.kd(predicted, teacher, masks["steps"], weights, number[f"kd_{acted}"])
        if "logits" in targets:  # Eq. 6
            teacher = targets["logits"]
            terms["kd_token"] = token_kd(
                logits,
                teacher,
                masks["kd_token"],
                weights.temperature,
                count=number["kd_token"],
                kind=weights.divergence,
                mix=weights.divergence_mix,
            )
        if "top_ids" in targets:
            terms["kd_token"] = known_kd(
                logits,
                Known.of(targets),
                masks["kd_token"],
                weights.temperature,
                count=number["kd_token"],
                kind=weights.divergence,
                mix=weights.divergence_mix,
            )
        loss = sum(getattr(weights, "kd" if name.startswith("kd_") else name) * term for name, term in terms.items())
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}


def loss_counts(batch: Batch) -> Tensor:
    """The denominators of LOSS_TERMS in this batch, float64 [9].

    Sum them over all workers and divide by their number: then the mean of the workers' losses is the global batch's.
    """
    masks = _masks(batch)
    draws = batch["tau"].shape[1]
    per_entry = {"flow": draws, "kd_flow": draws}
    masks |= dict.fromkeys(("flow", "kd_flow", "bins", "kd_bins"), masks["steps"])
    return torch.stack([masks[term].sum().double() * per_entry.get(term, 1) for term in LOSS_TERMS])


def _masks(batch: Batch) -> dict[str, Tensor]:
    """What each loss term is taken over: tokens [B, T + 1], chunk steps [B, H] (of either head) or samples [B]."""
    robot = batch["robot"]
    tokens = batch["labels"] != IGNORE
    steps = batch["action_mask"] & robot.unsqueeze(1)
    seen = robot & (target_cell(batch["target_pixel"], 1) == 0)
    return {
        "lm": tokens & robot.unsqueeze(1),
        "answer": tokens & ~robot.unsqueeze(1),
        "steps": steps,
        "heat": seen,
        "position": robot & batch["target_position"].isfinite().all(dim=-1),
        "kd_token": tokens & ~robot.unsqueeze(1),
    }
