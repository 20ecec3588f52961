"""Reads any mix of folders (runs, evaluations, answers, checkpoints, data sets, judge checks) into what a report shows.

Knows the files of contract.md; nothing of HTML. Trajectories stay on disk: the rollout browser reads them one by one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from dualvla.errors import DataError
from dualvla.io import dataset, manifest, storage
from dualvla_eval import results
from dualvla_eval.qa_metrics import ALL, MM, mean_of_benchmarks
from dualvla_eval.score import SCORES, VLA_SCORE

JUDGE_EVAL = "judge_eval"
PRUNING_REPORT = "report"  # folder of a pruned data set that shows what was kept

_DEPTH = 2  # levels below a given folder that are searched for manifests
_METRICS = "metrics.jsonl"
_JUDGE_CHECK = "judge-eval"  # folder in an evaluation where a check of its judge is put by default
_PRUNING_REPORT = (PRUNING_REPORT, "report.json")
_FIRST = {"random": 0, "expert": 1}  # the yardsticks stand before the policies
_STAGES = {"specialist": 0, "reasoning": 1, "dual": 2}  # as they follow each other
# What scores.parquet holds in every version; later versions add `_SCORE_EXTRAS`.
_SCORE_COLUMNS = ("A", "I", "R", "RA", "score", "unjudged", "without_reasoning", "explanation")
_SCORE_EXTRAS = ("judge", "rationale", "examples", "judge_success")


@dataclass(frozen=True)
class Evaluation:
    """A folder of rollouts. summary, scored: its summary.json and vla_score.json (None: not judged)."""

    folder: str
    suite: str
    summary: Mapping[str, Any]
    scored: Mapping[str, Any] | None

    @property
    def control_hz(self) -> float:
        return float(self.summary["control_hz"])

    @property
    def judge(self) -> str | None:
        return self.scored["judge"] if self.scored else None


@dataclass(frozen=True)
class Episode:
    """One rollout. id: unique in the report, and fit for a file name. policy: the label of its PolicyResult.

    row: its row of episodes.parquet. score: its row of scores.parquet with the JSON columns decoded, None: not judged.
    """

    id: str
    policy: str
    evaluation: Evaluation
    row: Mapping[str, Any]
    score: Mapping[str, Any] | None

    @property
    def scene(self) -> tuple[Any, ...]:
        """Equal for episodes of different policies that can be compared."""
        return (self.evaluation.suite, *(self.row[name] for name in ("task", "variant", "episode_id", "seed")))

    @property
    def judged(self) -> Mapping[str, Any] | None:
        """The scores, unless the judge could not give any."""
        return self.score if self.score is not None and self.score["unjudged"] is None else None


@dataclass(frozen=True)
class PolicyResult:
    """One policy on one suite. label: its name, with its folder where two evaluations use the same name.

    summary: its part of summary.json. score: its part of vla_score.json. source_digest: what identifies its weights.
    """

    label: str
    evaluation: Evaluation
    summary: Mapping[str, Any]
    score: Mapping[str, Any] | None
    source_digest: str | None
    episodes: tuple[Episode, ...]

    @property
    def suite(self) -> str:
        return self.evaluation.suite

    @property
    def control(self) -> bool:
        return bool(self.summary["control"])

    @cached_property
    def judged(self) -> tuple[Mapping[str, Any], ...]:
        """The scores of the episodes that could be judged."""
        return tuple(e.judged for e in self.episodes if e.judged is not None)


@dataclass(frozen=True)
class Answers:
    """A policy's answers to questions. benchmarks, tasks: name -> interval; tasks has the columns of a report.

    overall: of all questions of one benchmark, of several their mean. examples: the rows of answers.parquet that were
    asked.
    """

    name: str
    benchmarks: Mapping[str, Any]
    tasks: Mapping[str, Any]
    overall: Mapping[str, Any]
    examples: tuple[Mapping[str, Any], ...]

    def joined(self, other: Answers) -> Answers:
        """With the same policy's answers to other benchmarks."""
        benchmarks = {**self.benchmarks, **other.benchmarks}
        examples = self.examples + other.examples
        marks = {name: [r["score"] for r in examples if r["benchmark"] == name] for name in benchmarks}
        overall = mean_of_benchmarks(marks)
        return Answers(self.name, benchmarks, {**benchmarks, MM: overall}, overall, examples)


@dataclass(frozen=True)
class Checkpoint:
    """A training stage. digest: of its manifest. lines: one dict a step, of metrics.jsonl."""

    name: str
    about: Mapping[str, Any]
    digest: str
    lines: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Pruned:
    """What pruning kept. tasks: task -> counts of frames, words and tokens. digest: of its manifest.

    report: report.json of its own report in `folder`/report, None if it has none.
    """

    name: str
    folder: str
    mode: str
    tasks: Mapping[str, Mapping[str, Any]]
    digest: str
    report: Mapping[str, Any] | None


@dataclass
class Gathered:
    """Everything a report shows. inputs: folder -> digest of what it was made from."""

    policies: list[PolicyResult] = field(default_factory=list)
    answers: list[Answers] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    pruned: list[Pruned] = field(default_factory=list)
    judge_checks: list[Mapping[str, Any]] = field(default_factory=list)  # judge_eval.json of each such folder
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def evaluations(self) -> list[Evaluation]:
        return list({id(p.evaluation): p.evaluation for p in self.policies}.values())

    @property
    def episodes(self) -> list[Episode]:
        """Those of one task beside each other, and of one scene next to each other."""
        found = [e for p in self.policies for e in p.episodes]
        return sorted(found, key=lambda e: e.scene[:4])

    @property
    def suites(self) -> list[str]:
        return list(dict.fromkeys(p.suite for p in self.policies))

    def on(self, suite: str, *, controls: bool = False) -> list[PolicyResult]:
        """The policies of a suite, or its control experiments; random and expert first."""
        found = [p for p in self.policies if p.suite == suite and p.control == controls]
        return sorted(found, key=lambda p: _FIRST.get(p.label, len(_FIRST)))


def gather(folders: Sequence[str]) -> Gathered:
    """Raises: DataError if a folder is missing or none holds anything to show."""
    found = Gathered()
    evaluations: list[tuple[str, Mapping[str, Any]]] = []
    for folder in folders:
        if not storage.exists(folder):
            raise DataError(f"'{folder}' does not exist.", "pass evaluation, checkpoint, data set or run folders")
        for inner, about in _manifests(folder, _DEPTH):
            if inner in found.inputs:
                continue
            if about["kind"] == results.KIND and about["suite"] != "qa":
                evaluations.append((inner, about))
            elif not _add(found, inner, about):
                continue
            found.inputs[inner] = _digest(inner)
    _add_evaluations(found, evaluations)
    found.checkpoints.sort(key=lambda c: _STAGES.get(c.about["config"].get("stage"), len(_STAGES)))
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
        yield folder.rstrip("/"), about
        checked = storage.join(folder, _JUDGE_CHECK)
        if about["kind"] == results.KIND and storage.exists(checked):
            yield from _manifests(checked, 0)
    elif depth > 0:
        for inner in storage.list_folders(folder):
            yield from _manifests(inner, depth - 1)


def _name(folder: str) -> str:
    return folder.rstrip("/").rsplit("/", 1)[-1]


def _add(found: Gathered, folder: str, about: Mapping[str, Any]) -> bool:
    """Whether the folder holds something to show."""
    kind = about["kind"]
    if kind == results.KIND:
        _add_answers(found, folder)
    elif kind == "checkpoint" and storage.exists(storage.join(folder, _METRICS)):
        lines = storage.read_bytes(storage.join(folder, _METRICS)).decode().splitlines()
        digest = manifest.file_digest(storage.join(folder, manifest.NAME))
        found.checkpoints.append(Checkpoint(_name(folder), about, digest, tuple(json.loads(line) for line in lines)))
    elif kind == dataset.KIND and "mode" in about:
        digest = manifest.file_digest(storage.join(folder, manifest.NAME))
        report = storage.join(folder, *_PRUNING_REPORT)
        read = results.read_json(report) if storage.exists(report) else None
        found.pruned.append(Pruned(_name(folder), folder, about["mode"], about["tasks"], digest, read))
    elif kind == JUDGE_EVAL:
        found.judge_checks.append(results.read_json(storage.join(folder, f"{JUDGE_EVAL}.json")))
    else:
        return False
    return True


def _digest(folder: str) -> str:
    """Of the manifest, and of what comes later: the scores, the report of a pruning."""
    later = [(VLA_SCORE,), _PRUNING_REPORT]
    files = [storage.join(folder, manifest.NAME), *(storage.join(folder, *parts) for parts in later)]
    return manifest.digest([manifest.file_digest(f) for f in files if storage.exists(f)])


def _add_answers(found: Gathered, folder: str) -> None:
    summary = results.read_json(storage.join(folder, results.SUMMARY))
    rows = dataset.read_table(storage.join(folder, results.ANSWERS)).to_pylist()
    if "benchmarks" not in summary:  # written when a folder held one data set's questions
        rows = [{**r, "benchmark": _name(folder), "score": float(r["correct"])} for r in rows]
        for policy in summary["policies"].values():
            policy["benchmarks"] = {_name(folder): {"metric": "exact", **policy["tasks"][ALL]}}
    for name, policy in summary["policies"].items():
        own = tuple(r for r in rows if r["policy"] == name and r["score"] is not None)
        overall = policy["tasks"][MM if len(policy["benchmarks"]) > 1 else ALL]
        new = Answers(name, policy["benchmarks"], policy["tasks"], overall, own)
        known = next((a for a in found.answers if a.name == name and not a.benchmarks.keys() & new.benchmarks), None)
        if known is not None:
            found.answers[found.answers.index(known)] = known.joined(new)
        else:
            found.answers.append(new)


def _add_evaluations(found: Gathered, folders: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    read = []
    for folder, about in folders:
        summary = results.read_json(storage.join(folder, results.SUMMARY))
        url = storage.join(folder, VLA_SCORE)
        scored = results.read_json(url) if storage.exists(url) else None
        read.append((Evaluation(folder, summary["suite"], summary, scored), about))
    uses = Counter((e.suite, name) for e, _ in read for name in e.summary["policies"])
    taken: Counter[str] = Counter()
    for evaluation, about in read:
        scores = _scores(evaluation.folder) if evaluation.scored else {}
        rows = results.read_episodes(evaluation.folder)
        for name, summary in evaluation.summary["policies"].items():
            label = name if uses[evaluation.suite, name] == 1 else f"{name} ({_name(evaluation.folder)})"
            episodes = tuple(
                Episode(_unique(row, taken), label, evaluation, row, scores.get(_key(row)))
                for row in rows
                if row["policy"] == name
            )
            score = evaluation.scored["policies"].get(name) if evaluation.scored else None
            digest = about["inputs"].get(f"policy:{name}")
            found.policies.append(PolicyResult(label, evaluation, summary, score, digest, episodes))


def _unique(row: Mapping[str, Any], taken: Counter[str]) -> str:
    """A readable id that names no other folder and no other episode of the report."""
    name = results.row_stem(row)
    name = re.sub(r"[^A-Za-z0-9_+-]+", "-", name)
    taken[name] += 1
    return name if taken[name] == 1 else _unique({**row, "policy": f"{row['policy']}~{taken[name]}"}, taken)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in results.EPISODE_KEY)


def _scores(folder: str) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    url = storage.join(folder, SCORES)
    table = dataset.read_table(url, [*results.EPISODE_KEY, *_SCORE_COLUMNS], _SCORE_EXTRAS)
    for name in set(_SCORE_EXTRAS) - set(table.column_names):
        table = table.append_column(name, pa.nulls(len(table)))
    rows = table.to_pylist()
    for row in rows:
        row["explanation"] = json.loads(row["explanation"] or "{}")
        row["examples"] = json.loads(row["examples"] or "[]")
    return {_key(row): row for row in rows}
