"""A checkpoint as a `Policy`: think if it wants to, then act. Also answers questions about pictures.

Greedy text until the first action query (KV cache, whole batch at once), all queries in one pass, Euler steps. What a
session remembers (its last text, and by option its latent action and chunks) is one `Memory`; `reset` drops it. Actions
depend on the observation, the session's name, memory and step only, never on the batch they were computed in. Knows no
environment and no network.
"""

from __future__ import annotations

import base64
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from dualvla import ensembling
from dualvla.ensembling import Chunk
from dualvla.errors import PolicyError, UsageError
from dualvla.models.checkpoint import load_model
from dualvla.models.config import ModelConfig
from dualvla.models.processing import Batch, Processor
from dualvla.models.vla import VLA, Prefix
from dualvla.schema import Observation, PolicyReply, PolicySpec
from dualvla.wire.images import fit


@dataclass(frozen=True)
class PolicyOptions:
    """reasoning: "auto" (the model decides at every call), "never", or "every:K" (it thinks every K control steps; in
    between the last text stays in the prompt). think_first: with "auto", a session's first call writes a text whatever
    the model holds likely. noise_scale scales the noise that Euler starts from; 0, its mean, acts most surely: *pick*
    72 % against 50 % of 40 episodes with 1. latent_reuse: so many calls act on one latent action; only the first of
    them runs the backbone. ensemble: so many of the newest chunks are blended where they overlap (1: none; the paper
    has 7 for WidowX, 2 for Google Robot), weights exp(ensemble_alpha * cosine)."""

    reasoning: str = "auto"
    think_first: bool = True
    noise_scale: float = 0.0
    euler_steps: int | None = None  # None: the checkpoint's
    execute_steps: int | None = None  # None: the checkpoint's
    latent_reuse: int = 1
    ensemble: int = 1
    ensemble_alpha: float = 0.1
    device: str = "cpu"

    def __post_init__(self) -> None:
        reasoning_every(self.reasoning)
        for name in ("latent_reuse", "ensemble"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} = {getattr(self, name)}.", "pass 1 (none) or more")


def reasoning_every(reasoning: str) -> int | None:
    """K of "every:K"; None of "auto" and "never". Raises: UsageError."""
    if reasoning in ("auto", "never"):
        return None
    mode, _, steps = reasoning.partition(":")
    if mode != "every" or not steps.isdecimal() or int(steps) < 1:
        raise UsageError(f"Reasoning '{reasoning}' does not exist.", "choose auto, never or every:K (K >= 1)")
    return int(steps)


@dataclass(frozen=True)
class Thought:
    """A session's last text, as token ids, and the control step it was generated at."""

    ids: list[int]
    step: int


@dataclass(frozen=True)
class Latent:
    """A latent action [N, d] with the image states [M, d] that a head sees beside it (M = 0: it does not), the text
    behind it, the control step of its last use, and how often it was used."""

    action: torch.Tensor
    image: torch.Tensor
    ids: list[int]
    step: int
    uses: int


@dataclass
class Memory:
    """All that a session remembers."""

    thought: Thought | None = None
    latent: Latent | None = None
    chunks: list[Chunk] = field(default_factory=list)


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
        self._memories: dict[str, Memory] = {}

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
        memories = [self._memories.setdefault(s, Memory()) for s in sessions]
        kept = [self._reusable(m, o) for m, o in zip(memories, observations, strict=True)]
        fresh = [i for i, latent in enumerate(kept) if latent is None]
        generated: list[list[int]] = [[] for _ in observations]
        if fresh:
            thought = self._think(batch, fresh, observations, sessions)
            for i, (ids, latent) in zip(fresh, thought, strict=True):
                generated[i], kept[i] = ids, latent
        latents = [latent for latent in kept if latent is not None]
        thinking = time.perf_counter() - started
        chunks = self._act(batch, latents, observations, sessions)
        timing = {"think_ms": 1e3 * thinking, "act_ms": 1e3 * (time.perf_counter() - started - thinking)}
        for memory, latent, observation in zip(memories, latents, observations, strict=True):
            if self.options.latent_reuse > 1:
                memory.latent = replace(latent, step=observation.step, uses=latent.uses + 1)
        return [
            PolicyReply(
                actions=self._blended(memories[i], observation.step, self.processor.restore_actions(chunks[i])),
                reasoning=self.processor.decode(latents[i].ids) if latents[i].ids else None,
                keyframe=bool(generated[i]),
                reasoning_tokens=len(generated[i]),
                timing=timing,
                id=observation.id,
            )
            for i, observation in enumerate(observations)
        ]

    def reset(self, session: str) -> None:
        self._memories.pop(session, None)
        self._cadences.pop(session, None)

    def configure(self, session: str, reasoning: str) -> None:
        """This session's reasoning from now on, in place of the policy's own. Raises: UsageError."""
        reasoning_every(reasoning)
        self._cadences[session] = reasoning

    def state_of(self, session: str) -> dict[str, Any]:
        """What the session remembers, as numbers, text, lists and maps; {} if nothing.

        thought {"ids", "step"}; by option latent {"action", "image": {"shape", "data": base64 of float32}, "ids",
        "step", "uses"} and chunks [{"step", "actions"}].
        """
        memory = self._memories.get(session, Memory())
        state: dict[str, Any] = {}
        if memory.thought is not None:
            state["thought"] = {"ids": list(memory.thought.ids), "step": memory.thought.step}
        if memory.latent is not None:
            latent = memory.latent
            tensors = {"action": _packed(latent.action), "image": _packed(latent.image)}
            state["latent"] = {**tensors, "ids": list(latent.ids), "step": latent.step, "uses": latent.uses}
        if memory.chunks:
            state["chunks"] = [{"step": step, "actions": actions.tolist()} for step, actions in memory.chunks]
        return state

    def restore(self, session: str, state: Mapping[str, Any]) -> None:
        memory = Memory()
        if "thought" in state:
            memory.thought = Thought(list(state["thought"]["ids"]), state["thought"]["step"])
        if "latent" in state:
            kept = state["latent"]
            action, image = (_unpacked(kept[name]).to(self.options.device) for name in ("action", "image"))
            memory.latent = Latent(action, image, list(kept["ids"]), kept["step"], kept["uses"])
        if "chunks" in state:
            memory.chunks = [(c["step"], np.asarray(c["actions"], np.float32)) for c in state["chunks"]]
        self._memories[session] = memory

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

    def _reusable(self, memory: Memory, observation: Observation) -> Latent | None:
        latent = memory.latent
        if latent is None or latent.uses >= self.options.latent_reuse or observation.step <= latent.step:
            return None
        return latent

    def _think(
        self, batch: Batch, rows: Sequence[int], observations: Sequence[Observation], sessions: Sequence[str]
    ) -> list[tuple[list[int], Latent]]:
        """The newly generated text and the latent action of each of these rows: all that the backbone does."""
        index = torch.tensor(rows, device=batch["images"].device)
        prefix = self.model.read_prompt({name: tensor[index] for name, tensor in batch.items()})
        observations, sessions = [observations[i] for i in rows], [sessions[i] for i in rows]
        due = [self._thinks(o, s) for o, s in zip(observations, sessions, strict=True)]
        texts = [self._kept(s) if not d else [] for d, s in zip(due, sessions, strict=True)]
        generated = self._generate(prefix, texts, self._starts(prefix, due, observations, sessions))
        for i, (observation, session) in enumerate(zip(observations, sessions, strict=True)):
            if due[i]:
                texts[i] = generated[i]
                self._memories[session].thought = Thought(generated[i], observation.step)
        actions = self.model.latent_action(prefix)
        images = prefix.image if self.config.head.vision else prefix.image[:, :0]
        return [
            (generated[i], Latent(actions[i], images[i], texts[i], observation.step, uses=0))
            for i, observation in enumerate(observations)
        ]

    def _act(
        self, batch: Batch, latents: Sequence[Latent], observations: Sequence[Observation], sessions: Sequence[str]
    ) -> np.ndarray:
        """Normalised actions [B, H, D]. Raises: PolicyError."""
        noise = torch.stack([self._noise(o, s) for o, s in zip(observations, sessions, strict=True)])
        actions, images = torch.stack([x.action for x in latents]), torch.stack([x.image for x in latents])
        steps = self.options.euler_steps or self.config.head.euler_steps
        chunks = self.model.expert(actions, images, batch, noise, steps).float().cpu().numpy()
        if not np.isfinite(chunks).all():
            raise PolicyError("The policy's actions are not finite.", "check the checkpoint's training losses")
        return chunks

    def _blended(self, memory: Memory, step: int, actions: np.ndarray) -> np.ndarray:
        """actions [H, D] in units, after the ensemble; what it was made from is remembered."""
        past, options = ensembling.until(memory.chunks, step), self.options
        memory.chunks = ensembling.remember(past, step, actions, options.ensemble)
        grippers = self.config.actions.gripper_dims
        return ensembling.blend(past, step, actions, options.ensemble_alpha, grippers) if past else actions

    def _thinks(self, observation: Observation, session: str) -> bool:
        """Whether the model is asked at this step (with "auto" it may still answer with no text)."""
        if self.config.kind == "specialist" or self._reasoning(session) == "never":
            return False
        every = reasoning_every(self._reasoning(session))
        if every is None:
            return True
        last = self._memories[session].thought
        return last is None or observation.step - last.step >= every or self._begins(observation, session)

    def _kept(self, session: str) -> list[int]:
        """The text to put back into the prompt between two thoughts."""
        thought = self._memories[session].thought
        return thought.ids if thought is not None and reasoning_every(self._reasoning(session)) is not None else []

    def _reasoning(self, session: str) -> str:
        return self._cadences.get(session, self.options.reasoning)

    def _starts(
        self, prefix: Prefix, due: Sequence[bool], observations: Sequence[Observation], sessions: Sequence[str]
    ) -> list[bool]:
        """Which of the rows that are due begin a text: with "auto" an episode's first call, and those where the model
        holds one likely enough. An episode without any text has no plan to follow or to be judged by."""
        thinks = 1.0 - prefix.logits.float().softmax(dim=-1)[:, self.processor.act_id]
        likely = [t > self.config.think_above for t in thinks.tolist()]
        every = [reasoning_every(self._reasoning(s)) is not None for s in sessions]
        first = [self.options.think_first and self._begins(o, s) for o, s in zip(observations, sessions, strict=True)]
        return [d and (e or f or t) for d, e, f, t in zip(due, every, first, likely, strict=True)]

    def _begins(self, observation: Observation, session: str) -> bool:
        last = self._memories[session].thought
        return last is None or observation.step < last.step

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


def _packed(tensor: torch.Tensor) -> dict[str, Any]:
    values = tensor.float().cpu().numpy().astype("<f4")
    return {"shape": list(values.shape), "data": base64.b64encode(values.tobytes()).decode()}


def _unpacked(packed: Mapping[str, Any]) -> torch.Tensor:
    values = np.frombuffer(base64.b64decode(packed["data"]), "<f4").reshape(packed["shape"])
    return torch.from_numpy(values.copy())
