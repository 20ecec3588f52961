"""Reads any mix of folders (runs, evaluations, answers, checkpoints, data sets) into what a report shows.

Knows the files of contract.md; nothing of HTML.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dualvla.errors import DataError
from dualvla.io import dataset, manifest, storage
from dualvla_eval import results
from dualvla_eval.score import SCORE_SCHEMA, SCORES, VLA_SCORE

_DEPTH = 2  # levels below a given folder that are searched for manifests
_METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Rollout:
    """A filmed episode. video: URL of its mp4, `control_hz` steps a second.

    steps: one dict a step: step, reasoning, keyframe, events, gripper. scores: its row of scores.parquet with the
    explanation decoded, None if nobody has judged it.
    """

    row: Mapping[str, Any]
    video: str
    control_hz: float
    steps: tuple[Mapping[str, Any], ...]
    scores: Mapping[str, Any] | None


@dataclass(frozen=True)
class PolicyResult:
    """One policy on one suite of tasks. summary: its part of summary.json. score: its part of vla_score.json."""

    name: str
    suite: str
    summary: Mapping[str, Any]
    score: Mapping[str, Any] | None
    judge: str | None

    @property
    def control(self) -> bool:
        return bool(self.summary["control"])


@dataclass(frozen=True)
class Answers:
    """A policy's answers to questions. examples: rows of answers.parquet."""

    name: str
    tasks: Mapping[str, Any]
    examples: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Training:
    """A checkpoint's losses. lines: one dict a step."""

    name: str
    lines: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Pruned:
    """What pruning kept. tasks: task -> frames, kept_frames, words_before, words_after."""

    name: str
    mode: str
    tasks: Mapping[str, Mapping[str, int]]


@dataclass
class Gathered:
    """Everything a report shows. inputs: name -> digest of each folder it was made from."""

    policies: list[PolicyResult] = field(default_factory=list)
    answers: list[Answers] = field(default_factory=list)
    training: list[Training] = field(default_factory=list)
    pruned: list[Pruned] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    notes: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # suite -> termination rule, conventions
    inputs: dict[str, str] = field(default_factory=dict)


def gather(folders: Sequence[str]) -> Gathered:
    """Raises: DataError if a folder is missing or none holds anything to show."""
    found = Gathered()
    for folder in folders:
        if not storage.exists(folder):
            raise DataError(f"'{folder}' does not exist.", "pass evaluation, checkpoint, data set or run folders")
        for inner, about in _manifests(folder, _DEPTH):
            _add(found, inner, about)
    if not found.inputs:
        raise DataError(
            f"{', '.join(folders)}: no finished folder to report on.",
            "pass evaluation or run folders that are finished",
        )
    return found


def _manifests(folder: str, depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Finished folders at or below `folder`, sorted by name."""
    about = manifest.read(folder)
    if about is not None and about["kind"] != "run":
        yield folder, about
    elif depth > 0:
        for inner in storage.list_folders(folder):
            yield from _manifests(inner, depth - 1)


def _add(found: Gathered, folder: str, about: Mapping[str, Any]) -> None:
    name = folder.rstrip("/").rsplit("/", 1)[-1]
    kind = about["kind"]
    if kind == results.KIND and about["suite"] == "qa":
        _add_answers(found, folder)
    elif kind == results.KIND:
        _add_evaluation(found, folder)
    elif kind == "checkpoint" and storage.exists(storage.join(folder, _METRICS)):
        lines = storage.read_bytes(storage.join(folder, _METRICS)).decode().splitlines()
        found.training.append(Training(name, tuple(json.loads(line) for line in lines)))
    elif kind == dataset.KIND and "mode" in about:
        found.pruned.append(Pruned(name, about["mode"], about["tasks"]))
    else:
        return
    found.inputs[folder] = _digest(folder)


def _digest(folder: str) -> str:
    """Of the manifest, and of the scores, which come later."""
    files = [storage.join(folder, n) for n in (manifest.NAME, VLA_SCORE)]
    return manifest.digest([manifest.file_digest(f) for f in files if storage.exists(f)])


def _add_evaluation(found: Gathered, folder: str) -> None:
    summary = results.read_json(storage.join(folder, results.SUMMARY))
    score_url = storage.join(folder, VLA_SCORE)
    scored = results.read_json(score_url) if storage.exists(score_url) else None
    for name, policy in summary["policies"].items():
        score = scored["policies"].get(name) if scored else None
        found.policies.append(PolicyResult(name, summary["suite"], policy, score, scored["judge"] if scored else None))
    found.notes[summary["suite"]] = {name: summary[name] for name in ("termination_rule", "conventions")}
    scores = _scores(folder) if scored else {}
    for row in results.read_episodes(folder):
        if row["video"] is not None:
            video = storage.join(folder, row["video"])
            found.rollouts.append(
                Rollout(row, video, summary["control_hz"], _steps(folder, row), scores.get(_key(row)))
            )


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in results.EPISODE_KEY)


def _scores(folder: str) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    rows = dataset.read_table(storage.join(folder, SCORES), SCORE_SCHEMA.names).to_pylist()
    return {_key(row): {**row, "explanation": json.loads(row["explanation"])} for row in rows}


def _steps(folder: str, row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    recorded = results.read_trajectory(folder, row)
    return tuple(
        {
            "step": t,
            "reasoning": recorded.reasoning[t],
            "keyframe": recorded.keyframe[t],
            "events": recorded.events[t],
            "gripper": float(recorded.gripper[t][0]),
        }
        for t in range(recorded.num_steps)
    )


def _add_answers(found: Gathered, folder: str) -> None:
    summary = results.read_json(storage.join(folder, results.SUMMARY))
    rows = dataset.read_table(storage.join(folder, results.ANSWERS)).to_pylist()
    for name, policy in summary["policies"].items():
        own = tuple(r for r in rows if r["policy"] == name)
        found.answers.append(Answers(name, policy["tasks"], own))
