"""The learned event-boundary detector after DDM-Net (arXiv 2112.04771): dense difference maps, progressive attention.

Knows decoded images and its own checkpoint folder: nothing of poses, text, labels or training. A frame is judged from a
window of 2w + 1 frames around it, before and after: pruning looks at finished episodes.

Suffixes: N frames of one episode, B windows, T frames of a window, L levels, D features, C channels, Q queries.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import ResNetConfig, ResNetModel

from dualvla.config import from_dict, to_dict
from dualvla.errors import CheckpointError, DataError, UsageError
from dualvla.io import manifest, storage
from dualvla.pruning.boundaries import pick_peaks

KIND = "detector"
ARCHITECTURE = "dualvla.DDMNet"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_REMEDY = "pass a folder that `dualvla detector train` has finished"
_FRAMES_AT_ONCE = 64  # bounds memory, whatever the length of an episode
# Of ImageNet, which pretrained ResNets expect.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DDMConfig:
    """The network. The defaults train in minutes on a CPU and see 64 px simulator pictures well.

    image_size: frames are resized to this square (px). half_window: w frames before and after; frame_step: every how
    many frames of the episode (w * frame_step / control_hz is the time seen to either side). stem, widths, depths,
    layer: the ResNet (paper: ResNet-50; `pretrained_net` takes one with its weights). levels: how many of its last
    stages are used. grid: cells per side to which a feature map is pooled. dim: width of the features afterwards;
    map_channels: of a difference map. queries, heads, dropout: of the attention.
    """

    image_size: int = 64
    half_window: int = 5
    frame_step: int = 1
    stem: int = 8
    widths: tuple[int, ...] = (16, 32, 64)
    depths: tuple[int, ...] = (1, 1, 1)
    layer: Literal["basic", "bottleneck"] = "basic"
    levels: int = 3
    grid: int = 4
    dim: int = 64
    map_channels: int = 16
    queries: int = 4
    heads: int = 4
    dropout: float = 0.1

    @property
    def window(self) -> int:
        return 2 * self.half_window + 1

    def check(self) -> None:
        """Raises: UsageError if the sizes do not fit each other (options are set one by one, so not at once)."""
        if len(self.widths) != len(self.depths) or not 1 <= self.levels <= len(self.widths):
            raise UsageError(
                f"{len(self.widths)} widths, {len(self.depths)} depths and {self.levels} levels do not fit.",
                "give a width and a depth for each stage, and at most as many levels as stages",
            )
        if self.dim % self.heads:
            raise UsageError(f"dim {self.dim} is no multiple of heads {self.heads}.", "change one of them")
        if min(self.half_window, self.frame_step, self.grid, self.image_size // 16) < 1:
            raise UsageError("half_window, frame_step and grid must be 1 or more, image_size 16 or more.")


class DDMNet(nn.Module):
    """`frame_features` once a frame, then `forward` once a window."""

    def __init__(self, config: DDMConfig):
        super().__init__()
        config.check()
        self.config = config
        sizes: dict[str, Any] = {"hidden_sizes": list(config.widths), "depths": list(config.depths)}
        self.resnet = ResNetModel(ResNetConfig(embedding_size=config.stem, layer_type=config.layer, **sizes))
        widths, cells = config.widths[-config.levels :], config.grid**2
        dim, window = config.dim, config.window
        self.project = nn.ModuleList(nn.Sequential(nn.Linear(w * cells, dim), nn.LayerNorm(dim)) for w in widths)
        self.maps = nn.ModuleList(DifferenceMap(config) for _ in widths)
        self.place_LTD = nn.Parameter(0.02 * torch.randn(len(widths), window, dim))
        self.appearance = QueryAttention(config)
        self.difference = QueryAttention(config)
        self.appearance_asks = _attention(config)
        self.difference_asks = _attention(config)
        self.head = nn.Sequential(
            nn.LayerNorm(2 * dim), nn.Linear(2 * dim, dim), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(dim, 1)
        )

    def frame_features(self, images: Tensor) -> Tensor:
        """uint8 or float 0..255 [N, 3, image_size, image_size] -> [N, L, D]."""
        mean, std = (images.new_tensor(v, dtype=torch.float32).view(1, 3, 1, 1) for v in (_MEAN, _STD))
        stages = self.resnet((images / 255 - mean) / std, output_hidden_states=True).hidden_states
        pooled = [functional.adaptive_avg_pool2d(s, self.config.grid).flatten(1) for s in stages[-self.config.levels :]]
        return torch.stack([project(p) for project, p in zip(self.project, pooled, strict=True)], dim=1)

    def forward(self, windows_BTLD: Tensor) -> Tensor:
        """Logits of a boundary at the centre of each window, [B]."""
        levels = windows_BTLD.unbind(dim=2)
        seen = torch.cat([level + place for level, place in zip(levels, self.place_LTD, strict=True)], dim=1)
        changed = torch.cat(
            [make(level) + place for make, level, place in zip(self.maps, levels, self.place_LTD, strict=True)], dim=1
        )
        appearance_BQD, difference_BQD = self.appearance(seen), self.difference(changed)
        fused = torch.cat(
            [
                self.appearance_asks(appearance_BQD, difference_BQD).mean(dim=1),
                self.difference_asks(difference_BQD, appearance_BQD).mean(dim=1),
            ],
            dim=-1,
        )
        return self.head(fused).squeeze(-1)


class DifferenceMap(nn.Module):
    """The dense difference map of one level: |f_i - f_j| of all pairs of frames, as an image of T x T pixels.

    Its row i, what frame i differs in from every other one, becomes a token: [B, T, D] -> [B, T, D].
    """

    def __init__(self, config: DDMConfig):
        super().__init__()
        channels = config.map_channels
        self.shrink = nn.Linear(config.dim, 2 * channels)
        self.look = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
        )
        self.row = nn.Sequential(nn.Linear(channels * config.window, config.dim), nn.LayerNorm(config.dim))

    def forward(self, level_BTD: Tensor) -> Tensor:
        small = self.shrink(level_BTD)
        map_BCTT = (small[:, :, None] - small[:, None]).abs().permute(0, 3, 1, 2)
        return self.row(self.look(map_BCTT).permute(0, 2, 1, 3).flatten(2))


class QueryAttention(nn.Module):
    """Intra-modal aggregation: learned queries read the tokens of all levels, [B, L * T, D] -> [B, Q, D]."""

    def __init__(self, config: DDMConfig):
        super().__init__()
        self.queries_QD = nn.Parameter(0.02 * torch.randn(config.queries, config.dim))
        self.read = _attention(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.read(self.queries_QD.expand(len(tokens), -1, -1), tokens)


def _attention(config: DDMConfig) -> nn.TransformerDecoderLayer:
    return nn.TransformerDecoderLayer(
        config.dim, config.heads, 2 * config.dim, config.dropout, batch_first=True, norm_first=True
    )


def pretrained_net(config: DDMConfig, source: str) -> DDMNet:
    """A network on the ResNet `source` (a Hugging Face name or folder), with its sizes and weights.

    Raises: UsageError if it is no ResNet of the usual kind.
    """
    try:
        resnet = ResNetModel.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UsageError(f"No ResNet can be loaded from '{source}': {error}.", "name a Hugging Face ResNet") from error
    found = resnet.config
    if found.downsample_in_first_stage or found.downsample_in_bottleneck:
        raise UsageError(f"The ResNet '{source}' has its strides in unusual places.", "take microsoft/resnet-50")
    net = DDMNet(
        dataclasses.replace(
            config,
            stem=found.embedding_size,
            widths=tuple(found.hidden_sizes),
            depths=tuple(found.depths),
            layer=found.layer_type,
        )
    )
    net.resnet.load_state_dict(resnet.state_dict())
    return net


def window_indices(frames: int, config: DDMConfig) -> Tensor:
    """Which frames of an episode of N each frame's window shows, int [N, T]; beyond an end, that end again."""
    offsets = config.frame_step * torch.arange(-config.half_window, config.half_window + 1)
    return (torch.arange(frames)[:, None] + offsets).clamp(0, max(frames - 1, 0))


def fit_images(frames: np.ndarray, size: int) -> np.ndarray:
    """uint8 [N, H, W, 3] -> uint8 [N, 3, size, size]: whole picture, aspect ratio not kept, area-averaged."""
    images = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    if images.shape[-2:] != (size, size):
        images = functional.interpolate(
            images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False
        ).round()
    return images.to(torch.uint8).numpy()


class EventDetector:
    """A trained network as a scene-label source (the protocol `events.SceneEventDetector`).

    threshold: of the probability. gap: two boundaries are more than this many frames apart. Each episode is judged by
    itself, so the answer does not depend on what else is in the batch.
    """

    def __init__(self, net: DDMNet, threshold: float, gap: int, device: str = "cpu"):
        self.net = net.to(device).eval()
        self.threshold, self.gap = threshold, gap
        self._device = torch.device(device)

    def __call__(self, episodes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Scene labels: every frame whose probability reaches the threshold, and the first, in which all is new."""
        labels = []
        for frames in episodes:
            fires = self.scores(frames) >= self.threshold
            fires[:1] = True
            labels.append(fires)
        return labels

    def boundaries(self, frames: np.ndarray) -> np.ndarray:
        """One frame an event, int [B], sorted: the peaks of `scores` (non-maximum suppression)."""
        return pick_peaks(self.scores(frames), self.threshold, self.gap)

    @torch.inference_mode()
    def scores(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3], one episode -> probability of a boundary at every frame, float64 [N]."""
        if not len(frames):
            return np.zeros(0)
        net = self.net
        images = torch.from_numpy(fit_images(frames, net.config.image_size))
        features_NLD = torch.cat([net.frame_features(part.to(self._device)) for part in images.split(_FRAMES_AT_ONCE)])
        windows_NT = window_indices(len(images), net.config).to(self._device)
        logits = torch.cat([net(features_NLD[part]) for part in windows_NT.split(_FRAMES_AT_ONCE)])
        return logits.double().sigmoid().cpu().numpy()


def save_detector(folder: str, net: DDMNet, threshold: float, gap: int) -> None:
    """Writes weights and configuration; the manifest is the trainer's business."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(net.state_dict().items())}
    values = {"architecture": ARCHITECTURE, "network": to_dict(net.config), "threshold": threshold, "gap": gap}
    storage.write_bytes(storage.join(folder, WEIGHTS_FILE), safetensors.torch.save(state))
    storage.write_bytes(storage.join(folder, CONFIG_FILE), (json.dumps(values, indent=2) + "\n").encode())


def load_detector(folder: str, device: str = "cpu") -> EventDetector:
    """A finished detector folder, ready to use. device: as PyTorch names it.

    Raises: DataError if the folder is missing or unfinished, CheckpointError if what it holds is damaged or of another
    architecture.
    """
    manifest.require(folder, KIND)
    url = storage.join(folder, CONFIG_FILE)
    try:
        values = json.loads(storage.read_bytes(url))
        if values["architecture"] != ARCHITECTURE:
            raise CheckpointError(f"'{folder}' holds {values['architecture']!r}, not '{ARCHITECTURE}'.", _REMEDY)
        net = DDMNet(from_dict(DDMConfig, values["network"], "network"))
        threshold, gap = float(values["threshold"]), int(values["gap"])
        state = safetensors.torch.load(storage.read_bytes(storage.join(folder, WEIGHTS_FILE)))
        net.load_state_dict(state)
    except (DataError, UsageError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"The detector in '{folder}' cannot be loaded: {error}.", _REMEDY) from error
    return EventDetector(net, threshold, gap, device)
