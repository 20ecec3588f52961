"""`dualvla detector train`: the event-boundary detector, learned from episodes with boundaries.

A plain PyTorch loop that fits one process: minutes on a CPU at the default size. Every draw is keyed by (seed, epoch,
episode) and the state is kept now and then, so an interrupted run goes on to the very same weights. Knows the
network and clips; nothing of the simulator.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from dualvla.config import to_dict
from dualvla.console import progress
from dualvla.errors import CheckpointError, DataError, TrainingError
from dualvla.io import manifest, storage
from dualvla.pruning.boundaries import RELATIVE_DISTANCES, Counts, best_threshold, pick_peaks
from dualvla.pruning.ddm import (
    CONFIG_FILE,
    KIND,
    WEIGHTS_FILE,
    DDMConfig,
    DDMNet,
    EventDetector,
    fit_images,
    pretrained_net,
    save_detector,
    window_indices,
)
from dualvla_pipelines.clips import BoundaryRule, Shares, Split, annotations_for, data_digest, read_clips

log = logging.getLogger(__name__)

_RESUME = ("resume", "state.safetensors")
_FACTS = ("episodes", "boundaries", "threshold", "validation")


@dataclass(frozen=True)
class Augmentation:
    """What is drawn anew for an episode in every epoch. All of its frames are changed alike.

    brightness, tint: relative change of all and of each colour channel, at most. shift: of the picture, at most, as a
    share of its side. flip: left and right exchanged in this share of draws. crop: this share of draws begins and ends
    at frames of their own, so that the ends of a demonstration do not give away what happens there.
    """

    brightness: float = 0.3
    tint: float = 0.15
    shift: float = 0.08
    flip: float = 0.5
    crop: float = 0.5


@dataclass(frozen=True)
class DetectorConfig:
    """A detector and how it is trained.

    pretrained: a Hugging Face ResNet to start from (default: random weights). spread_frames: the target at d frames
    from a boundary is exp(-d^2 / (2 spread_frames^2)). positive_weight: of boundaries in the loss. The threshold is the
    best one for the validation share. keep_every: after how many steps the state to resume from is written.
    """

    network: DDMConfig = field(default_factory=DDMConfig)
    boundaries: BoundaryRule = field(default_factory=BoundaryRule)
    shares: Shares = field(default_factory=Shares)
    augmentation: Augmentation = field(default_factory=Augmentation)
    pretrained: str | None = None
    steps: int = 800
    batch_episodes: int = 6
    keep_every: int = 25
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warm_up: float = 0.1
    positive_weight: float = 3.0
    spread_frames: float = 0.7
    seed: int = 0


@dataclass(frozen=True)
class Example:
    """episode: (data set's digest, episode_id). images: uint8 [N, 3, S, S]. boundaries: int [B]."""

    episode: tuple[str, str]
    images: np.ndarray
    boundaries: np.ndarray


def train_detector(
    folders: Sequence[str], out: str, config: DetectorConfig, labels: Sequence[str] = (), device: str = "cpu"
) -> dict[str, Any]:
    """Makes or resumes the detector folder `out` from the data sets `folders`.

    labels: files of annotations, which then replace the events. Returns counts, and how the detector does on the
    validation share. Raises: DataError if there is nothing to learn from or to validate on.
    """
    config.network.check()
    inputs = {f"data-{i}": data_digest(folder) for i, folder in enumerate(folders)}
    inputs |= {f"labels-{i}": manifest.file_digest(url) for i, url in enumerate(labels)}
    work = manifest.begin(out, KIND, to_dict(config), inputs)
    if work:
        examples = _read(folders, config, labels)
        train, validation = (_share(examples, config.shares, split) for split in ("train", "validation"))
        net = _fit(train, out, config, device)
        threshold, agreement = _validate(net, validation, config, device)
        save_detector(out, net, threshold, config.boundaries.gap)
        files = {name: manifest.file_digest(storage.join(out, name)) for name in (CONFIG_FILE, WEIGHTS_FILE)}
        manifest.finish(
            out, KIND, to_dict(config), inputs,
            files=files, threshold=threshold, validation=agreement,
            episodes={"train": len(train), "validation": len(validation)},
            boundaries={"train": _boundaries(train), "validation": _boundaries(validation)},
            seen=_names([*train, *validation]),
        )  # fmt: skip
    found = manifest.require(out, KIND)
    return {"out": out, "skipped": not work, **{name: found[name] for name in _FACTS}}


def _read(folders: Sequence[str], config: DetectorConfig, labels: Sequence[str]) -> list[Example]:
    return [
        Example(
            (data_digest(folder), clip.episode_id),
            fit_images(clip.frames, config.network.image_size),
            clip.boundaries,
        )
        for folder in folders
        for clip in read_clips(folder, config.boundaries, annotations_for(folder, labels))
    ]


def _share(examples: Sequence[Example], shares: Shares, split: Split) -> list[Example]:
    splits = shares.split(["/".join(example.episode) for example in examples])
    chosen = [example for example, its in zip(examples, splits, strict=True) if its == split]
    if not _boundaries(chosen):
        raise DataError(
            f"The {split} share has {len(chosen)} of {len(examples)} episodes, and no boundary.",
            f"give more episodes, or another share (--set shares.{'test' if split == 'train' else split}=...)",
        )
    return chosen


def _names(examples: Sequence[Example]) -> dict[str, list[str]]:
    """Data set's digest -> episodes."""
    names: dict[str, list[str]] = {}
    for example in examples:
        data, episode_id = example.episode
        names.setdefault(data, []).append(episode_id)
    return names


def _boundaries(examples: Sequence[Example]) -> int:
    return sum(len(example.boundaries) for example in examples)


def _fit(examples: Sequence[Example], out: str, config: DetectorConfig, device: str) -> DDMNet:
    # Dropout and the first weights draw from PyTorch's own state.
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = pretrained_net(config.network, config.pretrained) if config.pretrained else DDMNet(config.network)
        net.to(device).train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=config.weight_decay)
        first = _restore(out, net, optimizer)
        losses: list[float] = []
        with progress("detector (steps)", config.steps, first) as advance:
            for step in range(first, config.steps):
                torch.manual_seed(int(np.random.default_rng([config.seed, 2, step]).integers(2**62)))
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * _pace(step / config.steps, config.warm_up)
                batch = [_augment(examples[i], config, epoch, i) for epoch, i in _draw(step, len(examples), config)]
                losses.append(_step(net, optimizer, batch, config, device))
                advance(1)
                if (step + 1) % config.keep_every == 0 or step + 1 == config.steps:
                    log.info("detector: step %d of %d, loss %.4f", step + 1, config.steps, np.mean(losses))
                    _keep(out, net, optimizer, step + 1)
                    losses.clear()
    return net


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Several threads add up in an order of their own, and a resumed training would end in other bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _draw(step: int, count: int, config: DetectorConfig) -> list[tuple[int, int]]:
    """The examples of one step, as (epoch, index): every example once an epoch, in an order of its own."""
    chosen = []
    for draw in range(step * config.batch_episodes, (step + 1) * config.batch_episodes):
        epoch, place = divmod(draw, count)
        order = np.random.default_rng([config.seed, 0, epoch]).permutation(count)
        chosen.append((epoch, int(order[place])))
    return chosen


def _step(
    net: DDMNet, optimizer: torch.optim.Optimizer, batch: Sequence[Example], config: DetectorConfig, device: str
) -> float:
    images = torch.from_numpy(np.concatenate([example.images for example in batch])).to(device)
    lengths = [len(example.images) for example in batch]
    starts = np.cumsum([0, *lengths[:-1]])
    windows = torch.cat([window_indices(n, config.network) + int(s) for n, s in zip(lengths, starts, strict=True)]).to(
        device
    )
    target = torch.from_numpy(
        np.concatenate([_target(e.boundaries, len(e.images), config.spread_frames) for e in batch])
    ).to(device)
    logits = net(net.frame_features(images)[windows])
    weight = 1 + (config.positive_weight - 1) * target
    loss = functional.binary_cross_entropy_with_logits(logits, target, weight)
    if not torch.isfinite(loss):
        raise TrainingError(f"The detector's loss is {loss.item()}.", "lower learning_rate")
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _target(boundaries: np.ndarray, frames: int, spread: float) -> np.ndarray:
    """1 at a boundary, falling off to both sides, float32 [frames]."""
    if not len(boundaries):
        return np.zeros(frames, dtype=np.float32)
    distance = np.abs(np.arange(frames)[:, None] - boundaries).min(axis=1)
    return np.exp(-(distance**2) / (2 * spread**2)).astype(np.float32)


def _pace(done: float, warm_up: float) -> float:
    """Learning rate at this share of the training, in parts of the highest: a line up, half a cosine down."""
    if done < warm_up:
        return (done + 0.01) / (warm_up + 0.01)
    return 0.5 + 0.5 * float(np.cos(np.pi * (done - warm_up) / (1 - warm_up)))


def _augment(example: Example, config: DetectorConfig, epoch: int, index: int) -> Example:
    """Images become float32, 0..255."""
    how = config.augmentation
    rng = np.random.default_rng([config.seed, 1, epoch, index])
    images, boundaries = example.images, example.boundaries
    frames, _, size, _ = images.shape
    if rng.random() < how.crop and frames > 2:
        first = int(rng.integers(0, frames // 2))
        last = int(rng.integers(max(first + 1, frames * 2 // 3), frames + 1))
        images = images[first:last]
        boundaries = boundaries[(boundaries >= first) & (boundaries < last)] - first
    if rng.random() < how.flip:
        images = images[..., ::-1]
    most = round(how.shift * size)
    down, right = rng.integers(0, 2 * most + 1, size=2)
    images = np.pad(images, ((0, 0), (0, 0), (most, most), (most, most)), mode="edge")
    images = images[..., down : down + size, right : right + size].astype(np.float32)
    gain = 1 + rng.uniform(-how.brightness, how.brightness) + rng.uniform(-how.tint, how.tint, size=(3, 1, 1))
    return Example(example.episode, np.clip(images * gain.astype(np.float32), 0, 255), boundaries)


def _validate(
    net: DDMNet, examples: Sequence[Example], config: DetectorConfig, device: str
) -> tuple[float, dict[str, float]]:
    """(threshold, how the detector does with it on these examples)."""
    gap = config.boundaries.gap
    detector = EventDetector(net, 0.5, gap, device)
    scores = [detector.scores(example.images.transpose(0, 2, 3, 1)) for example in examples]
    true = [example.boundaries for example in examples]
    threshold = best_threshold(scores, true, gap, RELATIVE_DISTANCES[0])
    found = [pick_peaks(s, threshold, gap) for s in scores]
    counts = Counts.of(found, true, [len(s) for s in scores], [RELATIVE_DISTANCES[0]])
    precision, recall = counts.precision_recall()
    return threshold, {"f1": float(counts.f1()[0]), "precision": float(precision[0]), "recall": float(recall[0])}


def _keep(out: str, net: DDMNet, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One file, replaced whole: weights, AdamW's moments, and after which step."""
    state: dict[str, Tensor] = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    for i, values in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{i}.{name}": tensor for name, tensor in values.items()}
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()} | {"step": torch.tensor(step)}
    storage.write_bytes(storage.join(out, *_RESUME), safetensors.torch.save(kept))


def _restore(out: str, net: DDMNet, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on with, 0 in a fresh folder. `manifest.begin` has made sure that the state is this run's own."""
    url = storage.join(out, *_RESUME)
    if not storage.exists(url):
        return 0
    try:
        kept = safetensors.torch.load(storage.read_bytes(url))
    except SafetensorError as error:
        raise CheckpointError(f"'{url}' is damaged: {error}.", "delete it; training then starts anew") from error
    net.load_state_dict({name.removeprefix("net."): t for name, t in kept.items() if name.startswith("net.")})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in kept.items():
        if name.startswith("optimizer."):
            _, index, moment = name.split(".")
            moments.setdefault(int(index), {})[moment] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(kept["step"])
