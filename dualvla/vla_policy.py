"""A checkpoint as a `Policy`: think if it wants to, then act. Also answers questions about pictures.

Greedy text until the first action query (KV cache, whole batch at once), all queries in one pass, Euler steps. What a
session remembers is its last text and how old it is; `reset` drops it. Actions depend on the observation, the session's
name and the step only, never on the batch they were computed in. Knows no environment and no network.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dualvla.errors import PolicyError, UsageError
from dualvla.models.checkpoint import load_model
from dualvla.models.config import ModelConfig
from dualvla.models.processing import Batch, Processor
from dualvla.models.vla import VLA, Prefix
from dualvla.schema import Observation, PolicyReply, PolicySpec
from dualvla.wire.images import fit


@dataclass(frozen=True)
class PolicyOptions:
    """reasoning: "auto" (the model decides at every query), "never", or "every:K" (it thinks every K control steps; in
    between the last text stays in the prompt). noise_scale scales the noise that Euler starts from; 0, its mean, acts
    most surely: *pick* 72 % against 50 % of 40 episodes with 1."""

    reasoning: str = "auto"
    noise_scale: float = 0.0
    euler_steps: int | None = None  # None: the checkpoint's
    execute_steps: int | None = None  # None: the checkpoint's
    device: str = "cpu"

    def __post_init__(self) -> None:
        reasoning_every(self.reasoning)


def reasoning_every(reasoning: str) -> int | None:
    """K of "every:K"; None of "auto" and "never". Raises: UsageError."""
    if reasoning in ("auto", "never"):
        return None
    mode, _, steps = reasoning.partition(":")
    if mode != "every" or not steps.isdecimal() or int(steps) < 1:
        raise UsageError(f"Reasoning '{reasoning}' does not exist.", "choose auto, never or every:K (K >= 1)")
    return int(steps)


@dataclass
class Thought:
    """A session's last text, as token ids, and the control step it was generated at."""

    ids: list[int]
    step: int


class VLAPolicy:
    """Implements `dualvla.policy.SessionPolicy`."""

    def __init__(self, model: VLA, processor: Processor, config: ModelConfig, options: PolicyOptions = PolicyOptions()):
        self.model = model.eval().to(options.device)
        self.processor = processor
        self.config = config
        self.options = options
        self.spec = PolicySpec(
            action_space=config.action_space,
            control_hz=config.control_hz,
            cameras=config.cameras,
            kind=config.kind,
            horizon=config.horizon,
            execute_steps=options.execute_steps or config.execute_steps,
        )
        self._cadences: dict[str, str] = {}
        self._thoughts: dict[str, Thought] = {}

    @classmethod
    def from_pretrained(cls, folder: str, *, options: PolicyOptions = PolicyOptions()) -> VLAPolicy:
        """Raises: CheckpointError."""
        return cls(*load_model(folder), options)

    @torch.inference_mode()
    def infer(self, observations: Sequence[Observation], sessions: Sequence[str]) -> list[PolicyReply]:
        """Raises: PolicyError if actions are not finite, DataError on a misfit observation."""
        if not observations:
            return []
        started = time.perf_counter()
        batch = self._batch(observations, ["robot"] * len(observations))
        prefix = self.model.read_prompt(batch)
        due = [self._thinks(o, s) for o, s in zip(observations, sessions, strict=True)]
        texts = [self._kept(s) if not d else [] for d, s in zip(due, sessions, strict=True)]
        generated = self._generate(prefix, texts, self._starts(prefix, due, sessions))
        thought = time.perf_counter()
        for i, (observation, session) in enumerate(zip(observations, sessions, strict=True)):
            if due[i]:
                texts[i] = generated[i]
                self._thoughts[session] = Thought(generated[i], observation.step)
        noise = torch.stack([self._noise(o, s) for o, s in zip(observations, sessions, strict=True)])
        steps = self.options.euler_steps or self.config.head.euler_steps
        chunk = self.model.act(prefix, batch, noise, steps).float().cpu().numpy()
        if not np.isfinite(chunk).all():
            raise PolicyError("The policy's actions are not finite.", "check the checkpoint's training losses")
        acted = time.perf_counter()
        timing = {"think_ms": 1e3 * (thought - started), "act_ms": 1e3 * (acted - thought)}
        return [
            PolicyReply(
                actions=self.processor.restore_actions(chunk[i]),
                reasoning=self.processor.decode(texts[i]) if texts[i] else None,
                keyframe=bool(generated[i]),
                reasoning_tokens=len(generated[i]),
                timing=timing,
                id=observation.id,
            )
            for i, observation in enumerate(observations)
        ]

    def reset(self, session: str) -> None:
        self._thoughts.pop(session, None)
        self._cadences.pop(session, None)

    def configure(self, session: str, reasoning: str) -> None:
        """This session's reasoning from now on, in place of the policy's own. Raises: UsageError."""
        reasoning_every(reasoning)
        self._cadences[session] = reasoning

    def state_of(self, session: str) -> dict[str, Any]:
        """{"thought": {"ids", "step"}}, or {} before the first thought."""
        thought = self._thoughts.get(session)
        return {"thought": {"ids": list(thought.ids), "step": thought.step}} if thought else {}

    def restore(self, session: str, state: Mapping[str, Any]) -> None:
        self._thoughts.pop(session, None)
        if "thought" in state:
            self._thoughts[session] = Thought(list(state["thought"]["ids"]), state["thought"]["step"])

    @torch.inference_mode()
    def answer(self, observations: Sequence[Observation]) -> list[str]:
        """The greedy answer to the question in each observation's `instruction`. Keeps no state.

        A question comes from anywhere: its pictures are fitted to the model's size (black bars keep their shape), and
        one that comes alone is shown to every camera.
        """
        if not observations:
            return []
        seen = [replace(o, images=self._fitted(o.images)) for o in observations]
        batch = self._batch(seen, ["multimodal"] * len(seen))
        prefix = self.model.read_prompt(batch)
        ids = self._generate(prefix, [[] for _ in observations], [True] * len(observations))
        return [self.processor.decode(i) for i in ids]

    def _fitted(self, images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        size, cameras = self.config.image_size, self.config.cameras
        fitted = {name: fit(image, size, size) for name, image in images.items()}
        return dict.fromkeys(cameras, *fitted.values()) if len(fitted) == 1 else fitted

    def _batch(self, observations: Sequence[Observation], domains: Sequence[str]) -> Batch:
        batch = self.processor.prompts(
            [o.images for o in observations],
            [o.instruction for o in observations],
            domains,
            [o.proprio if d == "robot" else None for o, d in zip(observations, domains, strict=True)],
        )
        return {name: tensor.to(self.options.device) for name, tensor in batch.items()}

    def _thinks(self, observation: Observation, session: str) -> bool:
        """Whether the model is asked at this step (with "auto" it may still answer with no text)."""
        if self.config.kind == "specialist" or self._reasoning(session) == "never":
            return False
        every = reasoning_every(self._reasoning(session))
        if every is None:
            return True
        last = self._thoughts.get(session)
        return last is None or observation.step - last.step >= every or observation.step < last.step

    def _kept(self, session: str) -> list[int]:
        """The text to put back into the prompt between two thoughts."""
        every = reasoning_every(self._reasoning(session))
        return self._thoughts[session].ids if every is not None and session in self._thoughts else []

    def _reasoning(self, session: str) -> str:
        return self._cadences.get(session, self.options.reasoning)

    def _starts(self, prefix: Prefix, due: Sequence[bool], sessions: Sequence[str]) -> list[bool]:
        """Which of the rows that are due begin a text: with "auto" those where the model holds one likely enough."""
        thinks = 1.0 - prefix.logits.float().softmax(dim=-1)[:, self.processor.act_id]
        likely = [t > self.config.think_above for t in thinks.tolist()]
        every = [reasoning_every(self._reasoning(s)) is not None for s in sessions]
        return [d and (e or t) for d, e, t in zip(due, every, likely, strict=True)]

    def _generate(self, prefix: Prefix, given: Sequence[list[int]], speaks: Sequence[bool]) -> list[list[int]]:
        """Greedy tokens until an end token, for the rows that speak; the others read their `given` text.

        Extends `prefix`. ACT and EOS both end a text, and neither can begin one.
        """
        number = len(speaks)
        texts: list[list[int]] = [[] for _ in range(number)]
        device = prefix.logits.device
        if any(given):
            replies = self.processor.replies(list(given))
            self.model.read_text(prefix, replies["text_ids"].to(device), replies["text_mask"].to(device))
        stops = [self.processor.eos_id, self.processor.act_id, self.processor.pad_id]
        logits = prefix.logits.clone()
        logits[:, stops] = -torch.inf
        speaking = list(speaks)
        for _ in range(self.config.max_text_tokens):
            tokens = logits[:, : self.processor.vocab_size].argmax(dim=-1).tolist()
            speaking = [s and t not in stops for s, t in zip(speaking, tokens, strict=True)]
            if not any(speaking):
                break
            for row in range(number):
                if speaking[row]:
                    texts[row].append(tokens[row])
            ids = torch.tensor([[t if s else self.processor.pad_id] for t, s in zip(tokens, speaking, strict=True)])
            mask = torch.tensor(speaking).unsqueeze(1)
            logits = self.model.read_text(prefix, ids.to(device), mask.to(device))[:, -1]
        return texts

    def _noise(self, observation: Observation, session: str) -> torch.Tensor:
        rng = np.random.default_rng([zlib.crc32(session.encode()), observation.step])
        noise = rng.standard_normal((self.config.horizon, self.config.actions.size), dtype=np.float32)
        return torch.from_numpy(self.options.noise_scale * noise).to(self.options.device)
