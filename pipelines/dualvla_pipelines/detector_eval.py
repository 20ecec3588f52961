"""`dualvla detector eval`: how well the detector's boundaries agree with the true ones, beside what needs no learning.

All methods are judged on the same episodes in one run. What needs no training gets every advantage: its free number
(a threshold, the k of "every k-th frame") is the best for these very episodes. Knows no simulator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dualvla.config import from_dict
from dualvla.console import progress
from dualvla.errors import DataError
from dualvla.io import manifest
from dualvla.pruning import FrameDifferences
from dualvla.pruning.boundaries import (
    RELATIVE_DISTANCES,
    Counts,
    best_every_kth,
    best_threshold,
    bootstrap_f1_difference,
    pick_peaks,
)
from dualvla.pruning.ddm import KIND, EventDetector, load_detector
from dualvla.pruning.similarity import SelfSimilarity
from dualvla_pipelines.clips import BoundaryRule, annotations_for, data_digest, read_clips
from dualvla_pipelines.detector import DetectorConfig

DETECTOR = "detector"
EVERY_KTH = "every k-th frame"
TRAINING_FREE = {"self-similarity": SelfSimilarity().scores, "frame differences": FrameDifferences().scores}


@dataclass
class _Judged:
    """What is kept of the episodes, one entry each: scores of every method, true boundaries, lengths, tasks."""

    scores: dict[str, list[np.ndarray]] = field(default_factory=dict)
    true: list[np.ndarray] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)


def evaluate_detector(
    model: str, folders: Sequence[str], labels: Sequence[str] = (), device: str = "cpu"
) -> dict[str, Any]:
    """F1 of every method at relative distances 0.05 to 0.5, and the detector's lead with bootstrap intervals.

    Episodes that the detector was trained or validated on are left out. Raises: DataError if no episode is left or
    none has a boundary.
    """
    detector = load_detector(model, device)
    made = manifest.require(model, KIND)
    config = from_dict(DetectorConfig, made["config"])
    judged, left_out = _Judged(), 0
    for folder in folders:
        seen = frozenset(made["seen"].get(data_digest(folder), ()))
        left_out += _judge(detector, folder, labels, config.boundaries, seen, judged)
    if not sum(len(true) for true in judged.true):
        raise DataError(
            f"The {len(judged.true)} episodes to judge on have no boundary ({left_out} were trained on and left out).",
            "give a data set that the detector has not seen",
        )
    found, free = _find(judged, detector)
    counts = {name: Counts.of(boundaries, judged.true, judged.frames) for name, boundaries in found.items()}
    tasks = np.array(judged.tasks)
    return {
        "model": model,
        "data": list(folders),
        "episodes": len(judged.true),
        "episodes_left_out": left_out,
        "frames": sum(judged.frames),
        "boundaries": sum(len(true) for true in judged.true),
        "relative_distances": list(RELATIVE_DISTANCES),
        "methods": {name: {**_summary(c), **free.get(name, {})} for name, c in counts.items()},
        "lead": {
            name: dict(zip(("f1", "low", "high"), bootstrap_f1_difference(counts[DETECTOR], c), strict=True))
            for name, c in counts.items()
            if name != DETECTOR
        },
        "tasks": {
            task: {
                "episodes": int((tasks == task).sum()),
                "f1": {name: float(c.take(tasks == task).f1()[0]) for name, c in counts.items()},
            }
            for task in sorted(set(judged.tasks))
        },
    }


def _judge(
    detector: EventDetector,
    folder: str,
    labels: Sequence[str],
    rule: BoundaryRule,
    seen: frozenset[str],
    judged: _Judged,
) -> int:
    """Adds the episodes of one data set that are not `seen` to `judged`. Returns how many were."""
    left_out = 0

    def wanted(episode_id: str) -> bool:
        nonlocal left_out
        left_out += episode_id in seen
        return episode_id not in seen

    scorers = {DETECTOR: detector.scores, **TRAINING_FREE}
    with progress(f"judging on {folder} (episodes)", manifest.require(folder, "dataset")["episodes"]) as advance:
        for clip in read_clips(folder, rule, annotations_for(folder, labels), wanted):
            for name, scores in scorers.items():
                judged.scores.setdefault(name, []).append(scores(clip.frames))
            judged.true.append(clip.boundaries)
            judged.frames.append(len(clip.frames))
            judged.tasks.append(clip.task)
            advance(1)
    return left_out


def _find(judged: _Judged, detector: EventDetector) -> tuple[dict[str, list[np.ndarray]], dict[str, dict[str, Any]]]:
    """(method -> boundaries of each episode, method -> its free numbers)."""
    distance = RELATIVE_DISTANCES[0]
    thresholds = {
        name: best_threshold(scores, judged.true, detector.gap, distance)
        for name, scores in judged.scores.items()
        if name != DETECTOR
    }
    thresholds[DETECTOR] = detector.threshold
    found = {
        name: [pick_peaks(s, thresholds[name], detector.gap) for s in scores] for name, scores in judged.scores.items()
    }
    choice = best_every_kth(judged.true, judged.frames, distance)
    found[EVERY_KTH] = [choice(frames) for frames in judged.frames]
    free: dict[str, dict[str, Any]] = {name: {"threshold": threshold} for name, threshold in thresholds.items()}
    return found, {**free, EVERY_KTH: asdict(choice)}


def _summary(counts: Counts) -> dict[str, Any]:
    precision, recall = counts.precision_recall()
    f1 = counts.f1()
    return {
        "f1": float(f1[0]),
        "precision": float(precision[0]),
        "recall": float(recall[0]),
        "found": int(counts.found.sum()),
        "f1_curve": [float(value) for value in f1],
    }


def render(result: Mapping[str, Any]) -> str:
    from dualvla.console import table

    methods, lead = result["methods"], result["lead"]
    rows = [
        [
            name,
            f"{m['f1']:.3f}",
            f"{m['precision']:.3f}",
            f"{m['recall']:.3f}",
            *(f"{value:.2f}" for value in m["f1_curve"][1:]),
            f"{lead[name]['f1']:+.3f} [{lead[name]['low']:+.3f}, {lead[name]['high']:+.3f}]" if name in lead else "",
        ]
        for name, m in methods.items()
    ]
    distances = [f"{distance:g}" for distance in result["relative_distances"]]
    title = (
        f"{result['boundaries']} boundaries in {result['episodes']} episodes, {result['frames']} frames"
        f" ({result['episodes_left_out']} episodes trained on and left out). Columns: F1 at relative distance"
    )
    header = ["method", f"F1 at {distances[0]}", "precision", "recall", *distances[1:], "detector's lead [95 %]"]
    by_task = [
        [task, str(values["episodes"]), *(f"{values['f1'][name]:.3f}" for name in methods)]
        for task, values in result["tasks"].items()
    ]
    return "\n".join(
        [
            table(title, header, rows),
            table(f"F1 at {distances[0]} by task", ["task", "episodes", *methods], by_task),
            "Thresholds of the methods without training, and k, are the best for these very episodes.",
        ]
    )
