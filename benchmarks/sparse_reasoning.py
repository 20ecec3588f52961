"""What pruning the reasoning saves at inference, and whether the policy thinks when there is something to think about.

    python benchmarks/sparse_reasoning.py EVAL_DIR [...] [--pruned dual] [--unpruned reasoning] [--time CHECKPOINT]

Reads evaluation folders (`dualvla eval`, suite blocks): the same held-out episodes by a policy that was trained on
pruned reasoning and by the one before it. Keyframes are the simulator's: the first step, and every step at which the
scripted expert, asked about the recorded privileged state, would start another subtask. A policy's onsets are the calls
at which it writes a text and did not at the call before; they match keyframes one to one within a step. The rival
places as many onsets in each episode on its calls at random.

The speed-up is that of a mean call: processor time of a call with a text and of one without, measured turn by turn in
this process on one thread (--time), weighed by how often each policy wrote one. The evaluations' own wall times depend
on what else the machine did.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from dualvla.errors import UsageError
from dualvla.pruning.boundaries import Counts, bootstrap_f1_difference, count_matches
from dualvla_eval import results, statistics
from dualvla_eval.judges.oracle import read_state, truths
from dualvla_eval.results import Trajectory

WITHIN_STEPS = 1  # a policy is asked at every second step
_DRAWS = 200  # of random timing, an episode
_RESAMPLES = 2000


@dataclass(frozen=True)
class Thinking:
    """When a policy wrote text in one episode, and when there was reason to. Steps, int, sorted.

    calls: it was asked. onsets: of the calls, where a run of texts begins. keyframes: 0 and every change of subtask.
    """

    row: dict[str, Any]
    calls: np.ndarray
    onsets: np.ndarray
    keyframes: np.ndarray

    @property
    def scene(self) -> tuple[Any, ...]:
        return tuple(self.row[name] for name in ("suite", "task", "variant", "episode_id"))

    def after_start(self) -> Thinking:
        """Without the first call, which says nothing about timing."""
        return Thinking(self.row, self.calls[1:], self.onsets[self.onsets > 0], self.keyframes[self.keyframes > 0])


def thinking(folder: str, row: dict[str, Any]) -> Thinking:
    recorded = results.read_trajectory(folder, {**row, "video": None})
    asked = np.array([s["infer_ms"] is not None for s in _steps(folder, row)[: recorded.num_steps]])
    wrote = np.array(recorded.keyframe)
    calls = np.flatnonzero(asked)
    before = np.concatenate([[False], wrote[calls][:-1]])
    return Thinking(row, calls, calls[wrote[calls] & ~before], keyframes(recorded))


def keyframes(recorded: Trajectory) -> np.ndarray:
    subtasks = [truth.stated.subtask for truth in truths(recorded, [read_state(s) for s in recorded.states])]
    return np.array([i for i, subtask in enumerate(subtasks) if i == 0 or subtask != subtasks[i - 1]])


def _steps(folder: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    from dualvla.io import dataset

    return dataset.read_table(results.trajectory_url(folder, row), ["infer_ms"]).to_pylist()


def read(folders: Sequence[str], policy: str) -> list[Thinking]:
    """Of the tasks that were trained on; sorted by scene. Raises: UsageError."""
    found = [
        thinking(folder, row)
        for folder in folders
        for row in results.read_episodes(folder)
        if row["policy"] == policy and row["stop_reason"] != "crashed"
    ]
    if not found:
        raise UsageError(f"No episodes of '{policy}' in {', '.join(folders)}.", "pass --pruned and --unpruned")
    return sorted(found, key=lambda t: t.scene)


def ratio(
    first: Sequence[Thinking], second: Sequence[Thinking], of: Callable[[Sequence[Thinking]], float]
) -> dict[str, float]:
    """of(first) / of(second) with its 95 % interval; episodes of equal scenes are drawn together."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(first), (_RESAMPLES, len(first)))
    drawn = [of([first[i] for i in p]) / of([second[i] for i in p]) for p in picks]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"value": of(first) / of(second), "low": float(low), "high": float(high)}


def tokens_per_call(episodes: Sequence[Thinking]) -> float:
    return sum(e.row["reasoning_tokens"] for e in episodes) / sum(e.row["replies"] for e in episodes)


def tokens_per_episode(episodes: Sequence[Thinking]) -> float:
    return sum(e.row["reasoning_tokens"] for e in episodes) / len(episodes)


def writing_share(episodes: Sequence[Thinking]) -> float:
    """Of the calls, those that wrote a text."""
    return sum(e.row["reasoning_steps"] for e in episodes) / sum(e.row["replies"] for e in episodes)


def call_ms(checkpoint: str, calls: int = 60) -> dict[str, float]:
    """Processor time of one observation's call with a text and without, medians of calls made in turns."""
    from dualvla.schema import Observation
    from dualvla.vla_policy import PolicyOptions, VLAPolicy

    rng = np.random.default_rng(0)
    modes = {"with_text": "every:1", "without_text": "never"}
    policies = {
        name: VLAPolicy.from_pretrained(checkpoint, options=PolicyOptions(reasoning=mode))
        for name, mode in modes.items()
    }
    took: dict[str, list[float]] = {name: [] for name in modes}
    tokens = []
    for i in range(calls + 5):
        config = policies["with_text"].config
        size = config.image_size
        images = {camera: rng.integers(0, 256, (size, size, 3), np.uint8) for camera in config.cameras}
        proprio = np.zeros(config.proprio_dim, np.float32) if config.proprio_dim else None
        seen = Observation(images, "touch the red cube", proprio, step=i)
        for name, policy in policies.items():
            started = time.process_time()
            (reply,) = policy.infer([seen], ["s"])
            took[name].append(1e3 * (time.process_time() - started))
            if name == "with_text":
                tokens.append(reply.reasoning_tokens)
    return {**{n: float(np.median(t[5:])) for n, t in took.items()}, "tokens": float(np.mean(tokens[5:]))}


def onset_f1(episodes: Sequence[Thinking]) -> dict[str, Any]:
    """F1 of the onsets, that of random timing at the same rate, and their difference with its 95 % interval."""
    rng = np.random.default_rng(0)
    found, true = (np.array([len(getattr(e, name)) for e in episodes]) for name in ("onsets", "keyframes"))
    ours = Counts(np.array([[_matches(e.onsets, e)] for e in episodes], float), found, true)
    chance = [
        np.mean([_matches(np.sort(rng.choice(e.calls, len(e.onsets), replace=False)), e) for _ in range(_DRAWS)])
        if len(e.onsets)
        else 0.0
        for e in episodes
    ]
    random = Counts(np.array(chance)[:, None], found, true)
    difference, low, high = bootstrap_f1_difference(ours, random)
    precision, recall = ours.precision_recall()
    return {
        "f1": float(ours.f1()[0]),
        "random_f1": float(random.f1()[0]),
        "difference": {"value": difference, "low": low, "high": high},
        "precision": float(precision[0]),
        "recall": float(recall[0]),
        "onsets": int(found.sum()),
        "keyframes": int(true.sum()),
    }


def _matches(onsets: np.ndarray, episode: Thinking) -> int:
    return count_matches(onsets, episode.keyframes, 1, WITHIN_STEPS)


def timed(found: dict[str, Any], ms: dict[str, float]) -> dict[str, Any]:
    """Processor ms of a mean call of each policy, and how many times faster the pruned one is."""
    mean = {n: s * ms["with_text"] + (1 - s) * ms["without_text"] for n, s in found["calls_with_text"].items()}
    return {"call_ms": ms, "mean_call_ms": mean, "speed_up": mean["unpruned"] / mean["pruned"]}


def compare(pruned: Sequence[Thinking], unpruned: Sequence[Thinking]) -> dict[str, Any]:
    """Over the scenes that both were evaluated in."""
    scenes = {e.scene for e in pruned} & {e.scene for e in unpruned}
    pruned, unpruned = ([e for e in of if e.scene in scenes] for of in (pruned, unpruned))
    silent = sum(e.row["reasoning_tokens"] == 0 for e in pruned)
    return {
        "episodes": len(pruned),
        "success": {"pruned": _rate(pruned), "unpruned": _rate(unpruned)},
        "tokens_per_episode": {"pruned": tokens_per_episode(pruned), "unpruned": tokens_per_episode(unpruned)},
        "fewer_tokens": _fewer(ratio(pruned, unpruned, tokens_per_call)),
        "episodes_without_reasoning": silent,
        "episodes_with_reasoning": statistics.wilson(len(pruned) - silent, len(pruned)).to_dict(),
        "onsets": onset_f1(pruned),
        "onsets_after_the_first_call": onset_f1([e.after_start() for e in pruned]),
        "calls_with_text": {"pruned": writing_share(pruned), "unpruned": writing_share(unpruned)},
    }


def _fewer(tokens: dict[str, float]) -> dict[str, float]:
    return {"value": 1 - tokens["value"], "low": 1 - tokens["high"], "high": 1 - tokens["low"]}


def _rate(episodes: Sequence[Thinking]) -> dict[str, Any]:
    return statistics.wilson(sum(e.row["success"] for e in episodes), len(episodes)).to_dict()


def verdict(found: dict[str, Any]) -> dict[str, bool]:
    return {
        "60 to 95 % fewer tokens": 0.60 <= found["fewer_tokens"]["value"] <= 0.95,
        "some reasoning in every episode": found["episodes_without_reasoning"] == 0,
        "onsets better than random timing": found["onsets"]["difference"]["low"] > 0,
        "onsets after the first call better than random timing": (
            found["onsets_after_the_first_call"]["difference"]["low"] > 0
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="EVAL_DIR")
    parser.add_argument("--pruned", default="dual", help="the policy that was trained on pruned reasoning")
    parser.add_argument("--unpruned", default="reasoning", help="the policy before pruning")
    parser.add_argument("--tasks", default="touch,pick", help="those that were trained on")
    parser.add_argument("--time", metavar="CHECKPOINT", help="one of both policies, to measure what a text costs")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    arguments = parser.parse_args()
    tasks = arguments.tasks.split(",")
    pruned, unpruned = (
        [e for e in read(arguments.folders, name) if e.row["task"] in tasks]
        for name in (arguments.pruned, arguments.unpruned)
    )
    per_task = {
        task: compare(*([e for e in of if e.row["task"] == task] for of in (pruned, unpruned))) for task in tasks
    }
    every = compare(pruned, unpruned)
    result = {
        "machine": "2 x86-64 cores, no GPU, Debian 12; calls on one thread, processor time",
        "keyframes": "first step, and each change of the expert's subtask in the recorded state",
        "within_steps": WITHIN_STEPS,
        "met": verdict(every),
        "all": every,
        "tasks": per_task,
    }
    if arguments.time:
        result["speed"] = timed(every, call_ms(arguments.time))
    text = json.dumps(result, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
