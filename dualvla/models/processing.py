"""Between the world and the model: tokenizer, prompt format, normalisation statistics, and batches of tensors.

A processor travels in the checkpoint, so that training, evaluation and serving share it. Noise, tau and colour jitter
are keyed by (seed, sample, step): neither the order of the samples nor the number of workers changes them. Knows
nothing of the network.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from dualvla.config import from_dict, to_dict
from dualvla.errors import CheckpointError, DataError, UsageError
from dualvla.io import storage
from dualvla.io.manifest import digest
from dualvla.models.config import ModelConfig
from dualvla.models.flow_head import draw_tau

Batch = dict[str, Tensor]
IGNORE = -100  # a label that is not supervised

PAD, EOS, ACT, USER, ASSISTANT = "<|pad|>", "<|eos|>", "<|act|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, EOS, ACT, USER, ASSISTANT)  # PAD is 0; ACT stands for the first action query
TOKENIZER_FILE, PROCESSOR_FILE = "tokenizer.json", "processor.json"


@dataclass(frozen=True)
class Sample:
    """One training sample. `key` identifies it in its data set, whatever batch it comes in.

    images: camera -> uint8 [S, S, 3]. reasoning: the text to learn (multimodal: the answer), None if pruned or not
    wanted. proprio float32 [P], actions float32 [H, D] in the action space's units, action_mask bool [H] (False past
    the episode's end), target_pixel float32 [2] ([u, v] in [0, 1]), target_position float32 [3] (m): None where there
    are none.
    """

    key: int
    domain: str
    images: Mapping[str, np.ndarray]
    instruction: str
    reasoning: str | None = None
    proprio: np.ndarray | None = None
    actions: np.ndarray | None = None
    action_mask: np.ndarray | None = None
    target_pixel: np.ndarray | None = None
    target_position: np.ndarray | None = None


@dataclass(frozen=True)
class Statistics:
    """Per-dimension mean, standard deviation, range, and 1 % and 99 % quantiles of one quantity.

    A constant dimension has deviation 1.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    q01: tuple[float, ...] = ()
    q99: tuple[float, ...] = ()

    @classmethod
    def of(cls, values: np.ndarray) -> Statistics:
        """values [n, D]; with n = 0 the identity."""
        values = np.asarray(values, dtype=np.float64)
        if len(values) == 0:
            size = values.shape[-1]
            ends = ((-np.inf,) * size, (np.inf,) * size)
            return cls((0.0,) * size, (1.0,) * size, *ends, (-1.0,) * size, (1.0,) * size)
        std = values.std(axis=0)
        return cls(
            tuple(values.mean(axis=0).tolist()),
            tuple(np.where(std > 1e-6, std, 1.0).tolist()),
            tuple(values.min(axis=0).tolist()),
            tuple(values.max(axis=0).tolist()),
            tuple(np.quantile(values, 0.01, axis=0).tolist()),
            tuple(np.quantile(values, 0.99, axis=0).tolist()),
        )

    def normalise(self, values: np.ndarray) -> np.ndarray:
        return ((values - np.asarray(self.mean)) / np.asarray(self.std)).astype(np.float32)

    def restore(self, values: np.ndarray) -> np.ndarray:
        """Inverse of `normalise`, held within the range that was seen."""
        return np.clip(values * np.asarray(self.std) + np.asarray(self.mean), self.low, self.high).astype(np.float32)

    def to_unit(self, values: np.ndarray, as_they_are: Sequence[int] = ()) -> np.ndarray:
        """OpenVLA's normalisation: the quantiles to -1 and 1, what lies beyond clipped, constant dimensions to 0.

        as_they_are: dimensions that are left alone (grippers).
        """
        q01, q99 = np.asarray(self.q01), np.asarray(self.q99)
        unit = np.clip(2.0 * (values - q01) / (q99 - q01 + 1e-8) - 1.0, -1.0, 1.0)
        unit = np.where(np.asarray(self.low) == np.asarray(self.high), 0.0, unit)
        unit[..., list(as_they_are)] = values[..., list(as_they_are)]
        return unit.astype(np.float32)

    def from_unit(self, unit: np.ndarray, as_they_are: Sequence[int] = ()) -> np.ndarray:
        """Inverse of `to_unit`, within the quantiles."""
        q01, q99 = np.asarray(self.q01), np.asarray(self.q99)
        values = 0.5 * (unit + 1.0) * (q99 - q01) + q01
        values[..., list(as_they_are)] = unit[..., list(as_they_are)]
        return values.astype(np.float32)


@dataclass(frozen=True)
class PromptFormat:
    """What stands before the reply. `{text}` is the instruction or question; the first word tells the domains apart."""

    robot: str = f"{USER}Robot: {{text}}{ASSISTANT}"
    multimodal: str = f"{USER}Question: {{text}}{ASSISTANT}"

    def render(self, domain: str, text: str) -> str:
        template = self.robot if domain == "robot" else self.multimodal
        return template.replace("{text}", text.strip())


class Processor:
    """Samples and observations to tensors, tokens to text, normalised actions to units."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        action: Statistics,
        proprio: Statistics,
        position: Statistics,
        prompt: PromptFormat,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.action = action
        self.proprio = proprio
        self.position = position
        self.prompt = prompt
        self.pad_id, self.eos_id, self.act_id = (_token_id(tokenizer, t) for t in (PAD, EOS, ACT))

    @classmethod
    def fit(
        cls,
        config: ModelConfig,
        texts: Iterable[str],
        actions: np.ndarray,
        proprios: np.ndarray,
        positions: np.ndarray,
    ) -> Processor:
        """Statistics of the training data and, unless the backbone brings one, a byte-level BPE tokenizer of `texts`.

        actions [n, D], proprios [n, P], positions [n, 3] (m).
        """
        prompt = PromptFormat()
        if config.backbone is None:
            tokenizer = train_tokenizer([prompt.robot, prompt.multimodal, *texts], config.vocab_size)
        else:
            tokenizer = pretrained_tokenizer(config.backbone)
        return cls(config, tokenizer, Statistics.of(actions), Statistics.of(proprios), Statistics.of(positions), prompt)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def prompts(
        self,
        images: Sequence[Mapping[str, np.ndarray]],
        texts: Sequence[str],
        domains: Sequence[str],
        proprios: Sequence[np.ndarray | None],
    ) -> Batch:
        """The part of a batch that the model sees before it replies.

        images uint8 [B, cameras, S, S, 3], instruction_ids and instruction_mask [B, I] (padded on the left), proprio
        [B, P] (normalised) and has_proprio [B]. Raises: DataError if a camera or a size does not fit the model.
        """
        ids = [self.encode(self.prompt.render(d, t)) for d, t in zip(domains, texts, strict=True)]
        width = max(len(i) for i in ids)
        size = self.config.proprio_dim
        for proprio in proprios:
            if size and proprio is not None and np.shape(proprio) != (size,):
                raise DataError(f"proprio has shape {np.shape(proprio)}, the model wants ({size},).", _REFIT)
        rows = [np.zeros(size) if p is None or not size else self.proprio.normalise(p) for p in proprios]
        return {
            "images": torch.from_numpy(np.stack([self._cameras(i) for i in images])),
            "instruction_ids": torch.tensor([[self.pad_id] * (width - len(i)) + i for i in ids]),
            "instruction_mask": torch.tensor([[False] * (width - len(i)) + [True] * len(i) for i in ids]),
            "proprio": torch.from_numpy(np.stack(rows).astype(np.float32)),
            "has_proprio": torch.tensor([size > 0 and p is not None for p in proprios]),
        }

    def replies(self, texts: Sequence[Sequence[int]]) -> Batch:
        """Token ids of reasoning or answers as text_ids and text_mask [B, T], padded on the right."""
        lengths = torch.tensor([len(t) for t in texts])
        mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        ids = torch.full(mask.shape, self.pad_id)
        ids[mask] = torch.tensor([i for t in texts for i in t], dtype=torch.long)
        return {"text_ids": ids, "text_mask": mask}

    def collate(self, samples: Sequence[Sample], seed: int, step: int | Sequence[int], train: bool = True) -> Batch:
        """One training batch; every tensor has leading dimension B = len(samples). step: of all, or of each sample.

        Beside `prompts` and `replies`: labels [B, T + 1] (what follows the prompt and each text token: text, then ACT
        on robot samples, EOS on multimodal ones), robot [B], actions [B, H, D] (normalised), action_mask [B, H], tau
        [B, K], noise [B, K, H, D], target_pixel [B, 2] (NaN: none), target_position [B, 3] (normalised; NaN: none).
        train=False leaves the colours alone.
        """
        config = self.config
        steps = [step] * len(samples) if isinstance(step, int) else step
        rngs = [np.random.default_rng([seed, s.key, n]) for s, n in zip(samples, steps, strict=True)]
        draws = config.head.draws
        shape = (draws, config.horizon, config.actions.size)
        tau = np.stack([draw_tau(r, draws, config.head.tau_scale) for r in rngs])
        noise = np.stack([r.standard_normal(shape, dtype=np.float32) for r in rngs])
        jitter = config.color_jitter if train else 0.0
        images = [_jitter(s.images, jitter, r) for s, r in zip(samples, rngs, strict=True)]

        robot = [s.domain == "robot" for s in samples]
        texts = [self.encode(s.reasoning.strip())[: config.max_text_tokens] if s.reasoning else [] for s in samples]
        ends = [self.act_id if r else self.eos_id for r in robot]
        replies = self.replies(texts)
        labels = torch.full((len(samples), replies["text_ids"].shape[1] + 1), IGNORE)
        for row, (text, end) in enumerate(zip(texts, ends, strict=True)):
            labels[row, : len(text) + 1] = torch.tensor([*text, end])

        actions, masks = zip(*(self._chunk(s) for s in samples), strict=True)
        domains = [s.domain for s in samples]
        return {
            **self.prompts(images, [s.instruction for s in samples], domains, [s.proprio for s in samples]),
            **replies,
            "labels": labels,
            "robot": torch.tensor(robot),
            "actions": torch.from_numpy(np.stack(actions)),
            "action_mask": torch.from_numpy(np.stack(masks)),
            "tau": torch.from_numpy(tau),
            "noise": torch.from_numpy(noise),
            "target_pixel": torch.from_numpy(np.stack([_or_nan(s.target_pixel, 2) for s in samples])),
            "target_position": torch.from_numpy(
                np.stack([self.position.normalise(_or_nan(s.target_position, 3)) for s in samples])
            ),
        }  # fmt: skip

    def normalise_actions(self, actions: np.ndarray) -> np.ndarray:
        """[..., D] in units -> what the head predicts: in quantiles for a token head, else in deviations."""
        if self.config.head.kind == "token":
            return self.action.to_unit(actions, self.config.actions.gripper_dims)
        return self.action.normalise(actions)

    def restore_actions(self, normalised: np.ndarray) -> np.ndarray:
        """Inverse of `normalise_actions`, held within the range that was seen."""
        if self.config.head.kind == "token":
            return self.action.from_unit(normalised, self.config.actions.gripper_dims)
        return self.action.restore(normalised)

    def _chunk(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        shape = (self.config.horizon, self.config.actions.size)
        if sample.actions is None:
            return np.zeros(shape, np.float32), np.zeros(shape[0], bool)
        if sample.actions.shape != shape:
            raise DataError(f"An action chunk of shape {sample.actions.shape}; the model wants {shape}.", _REFIT)
        mask = np.ones(shape[0], bool) if sample.action_mask is None else sample.action_mask.astype(bool)
        return self.normalise_actions(sample.actions), mask

    def _cameras(self, images: Mapping[str, np.ndarray]) -> np.ndarray:
        size = self.config.image_size
        for camera in self.config.cameras:
            if camera not in images:
                raise DataError(f"No camera '{camera}' among {sorted(images)}.", _REFIT)
            if np.shape(images[camera]) != (size, size, 3):
                raise DataError(
                    f"Camera '{camera}' gives {np.shape(images[camera])}, the model wants ({size}, {size}, 3).", _REFIT
                )
        return np.stack([np.asarray(images[c], dtype=np.uint8) for c in self.config.cameras])

    def fingerprints(self) -> dict[str, str]:
        """A digest of each thing that must agree between a teacher and its student: name -> sha256."""
        statistics = {name: to_dict(getattr(self, name)) for name in ("action", "proprio")}
        values = {"tokenizer": json.loads(self.tokenizer.to_str()), "prompt format": to_dict(self.prompt)}
        values |= {f"{name} normalisation": value for name, value in statistics.items()}
        return {name: digest(value) for name, value in values.items()}

    def save(self, folder: str) -> None:
        storage.write_bytes(storage.join(folder, TOKENIZER_FILE), self.tokenizer.to_str(pretty=True).encode())
        values = {
            "prompt": to_dict(self.prompt),
            **{name: to_dict(getattr(self, name)) for name in ("action", "proprio", "position")},
        }
        storage.write_bytes(storage.join(folder, PROCESSOR_FILE), (json.dumps(values, indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: str, config: ModelConfig) -> Processor:
        """Raises: CheckpointError on a missing or damaged file."""
        try:
            text = storage.read_bytes(storage.join(folder, TOKENIZER_FILE)).decode()
            values = json.loads(storage.read_bytes(storage.join(folder, PROCESSOR_FILE)))
            json.loads(text)  # the tokenizers library reports a damaged file with a bare Exception
            statistics = {n: from_dict(Statistics, values[n], n) for n in ("action", "proprio", "position")}
            prompt = from_dict(PromptFormat, values["prompt"], "prompt")
        except (DataError, UsageError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"The processor files of '{folder}' cannot be read: {error}.", "train it again"
            ) from error
        tokenizer = Tokenizer.from_str(text)
        return cls(config, tokenizer, **statistics, prompt=prompt)


_REFIT = "use the data, the environment and the checkpoint of one suite"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE: every text has an encoding and decodes to itself. Deterministic in the order of `texts`.

    An answer's first word ("red") is another token than the word within an instruction (" red"). With one token for
    both, answers that are not learned yet may pull the embeddings of the colours together: in one run with shared
    tokens (and more weight on answers) *touch* came out at 48 %, without at 92 %.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pretrained_tokenizer(name: str) -> Tokenizer:
    """The backbone's own tokenizer with our special tokens added."""
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_str(AutoTokenizer.from_pretrained(name).backend_tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise CheckpointError(f"The tokenizer has no token '{token}'.", "fit the processor with this version")
    return found


def _jitter(images: Mapping[str, np.ndarray], share: float, rng: np.random.Generator) -> Mapping[str, np.ndarray]:
    if share == 0.0:
        return images
    gain = 1.0 + share * rng.uniform(-1.0, 1.0, 3)
    offset = 255.0 * share * rng.uniform(-1.0, 1.0)
    return {n: np.clip(i * gain + offset, 0, 255).astype(np.uint8) for n, i in images.items()}


def _or_nan(values: Any, size: int) -> np.ndarray:
    return np.full(size, np.nan, np.float32) if values is None else np.asarray(values, np.float32)
