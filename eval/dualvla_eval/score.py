"""VLA Score: Eq. 8 of arXiv 2511.22134, and the table and means of a judged evaluation folder.

Knows verdicts, never how a judge works.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa

from dualvla import console
from dualvla.errors import UsageError
from dualvla.io import dataset, manifest, storage
from dualvla_eval import decomposition, results, statistics
from dualvla_eval.judges.base import SCALE, Judge, Verdict
from dualvla_eval.results import Trajectory

SCORES = "scores.parquet"
VLA_SCORE = "vla_score.json"

SCORE_SCHEMA = pa.schema(
    [
        ("policy", pa.string()),
        ("policy_kind", pa.string()),
        ("task", pa.string()),
        ("variant", pa.string()),
        ("episode_id", pa.int64()),
        ("seed", pa.int64()),
        ("success", pa.bool_()),
        ("A", pa.float64()),  # 0 to 10, as the judge gave them; null where it has nothing to say
        ("I", pa.float64()),
        ("R", pa.float64()),
        ("RA", pa.float64()),
        ("score", pa.float64()),  # Eq. 8, 0 to 1; null: unjudged
        ("unjudged", pa.string()),  # why there is no verdict
        ("without_reasoning", pa.bool_()),  # a reasoning policy that said nothing: R = RA = 0
        ("explanation", pa.string()),  # JSON: dimension -> [{name, points, detail}]
        ("judge", pa.string()),
        ("rationale", pa.string()),  # the judge's own words
        ("judge_success", pa.bool_()),  # what it thinks of success: recorded, never used
        ("examples", pa.string()),  # JSON: ids of the knowledge base's entries that it was shown
    ]
)


def vla_score(
    action: float, intention: float, success: float, reasoning: float | None = None, alignment: float | None = None
) -> float:
    """Eq. 8 for one trajectory: ((R + A I) / 2) RA B for a reasoning policy, A I B for another one.

    All inputs in [0, 1]; success (B) is 0 or 1; reasoning (R) and alignment (RA) both or neither. Returns [0, 1].
    Raises: ValueError for anything else.
    """
    if (reasoning is None) != (alignment is None):
        raise ValueError("reasoning and alignment: give both or neither")
    given = {"action": action, "intention": intention, "success": success}
    said = {} if reasoning is None else {"reasoning": reasoning, "alignment": alignment}
    for name, value in {**given, **said}.items():
        if value is None or not math.isfinite(value) or not 0 <= value <= 1:
            raise ValueError(f"{name} = {value!r} is not in [0, 1]")
    if success not in (0, 1):
        raise ValueError(f"success = {success!r} is neither 0 nor 1")
    if reasoning is None or alignment is None:
        return action * intention * success
    return (reasoning + action * intention) / 2 * alignment * success


class Recorded(Sequence[Trajectory]):
    """The trajectories of an evaluation folder, each read when it is asked for: thousands would not fit into memory."""

    def __init__(self, folder: str, rows: Sequence[Mapping[str, Any]]):
        self.folder, self.rows = folder, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...
    @overload
    def __getitem__(self, index: slice) -> Recorded: ...
    def __getitem__(self, index: int | slice) -> Trajectory | Recorded:
        """Raises: DataError if the file of a trajectory is missing or damaged."""
        if isinstance(index, slice):
            return Recorded(self.folder, self.rows[index])
        return results.read_trajectory(self.folder, self.rows[index])


def require_rollouts(folder: str) -> str:
    """The digest of a finished evaluation of a simulator.

    Raises: DataError if it is no finished evaluation; UsageError for a suite of questions.
    """
    if manifest.require(folder, results.KIND)["suite"] == "qa":
        raise UsageError(
            f"'{folder}' holds answers to questions, not trajectories.", "score an evaluation of a simulator"
        )
    return manifest.file_digest(storage.join(folder, manifest.NAME))


def score_folder(folder: str, judge: Judge) -> dict[str, Any]:
    """Judges every episode of a finished evaluation; writes scores.parquet and vla_score.json and returns the latter.

    Returns at once if the same judge has judged the same evaluation and nothing is left to try again.
    Raises: see `require_rollouts`, and what the judge raises.
    """
    inputs = {"judge": manifest.digest(judge.identity), "evaluation": require_rollouts(folder)}
    url = storage.join(folder, VLA_SCORE)
    if storage.exists(url):
        before = results.read_json(url)
        if before["inputs"] == inputs and not before["try_again"]:
            return {**before, "skipped": True}

    episodes = results.read_episodes(folder)
    recorded = Recorded(folder, [e for e in episodes if results.has_trajectory(e)])
    with console.progress(f"judge {judge.name}", len(recorded)) as advance:
        verdicts = dict(zip(map(_key, recorded.rows), judge.judge(recorded, advance), strict=True))
    nothing = Verdict(unjudged="the episode crashed: nothing was recorded")
    rows = [_row(e, verdicts.get(_key(e), nothing), judge.name) for e in episodes]
    dataset.write_table(storage.join(folder, SCORES), pa.Table.from_pylist(rows, schema=SCORE_SCHEMA))
    scored = {
        "judge": judge.name,
        "inputs": inputs,
        "policies": summarise(rows),
        "differences": decomposition.differences(rows),
        "interval": "bootstrap, 95 %",
        "try_again": sum(v.passing for v in verdicts.values()),  # no answer this time: not judged, not remembered
        "usage": judge.usage(),
    }
    results.write_json(url, scored)
    return {**scored, "skipped": False}


def _key(episode: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(episode[name] for name in results.EPISODE_KEY)


def _row(episode: Mapping[str, Any], verdict: Verdict, judge: str) -> dict[str, Any]:
    reasons = episode["policy_kind"] == "reasoning"
    silent = reasons and episode["reasoning_steps"] == 0
    reasoning, alignment = (0.0, 0.0) if silent else (verdict.reasoning, verdict.alignment)
    if not reasons:
        reasoning = alignment = None
    score = None
    if verdict.unjudged is None:
        score = vla_score(
            _scaled(verdict.action),
            _scaled(verdict.intention),
            float(episode["success"]),
            None if reasoning is None else _scaled(reasoning),
            None if alignment is None else _scaled(alignment),
        )
    explanation = {
        dimension: [{"name": c.name, "points": c.points, "detail": c.detail} for c in contributions]
        for dimension, contributions in verdict.explanation.items()
    }
    return {
        **{name: episode[name] for name in ("policy", "policy_kind", *results.EPISODE_KEY[1:], "success")},
        "A": verdict.action,
        "I": verdict.intention,
        "R": reasoning,
        "RA": alignment,
        "score": score,
        "unjudged": verdict.unjudged,
        "without_reasoning": silent,
        "explanation": json.dumps(explanation, sort_keys=True),
        "judge": judge,
        "rationale": verdict.rationale,
        "judge_success": verdict.success,
        "examples": json.dumps(verdict.examples),
    }


def _scaled(value: float | None) -> float:
    """The judge's 0..10 as [0, 1]. Raises: ValueError for None, through Eq. 8."""
    return math.nan if value is None else value / SCALE


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Policy -> score (mean over judged trajectories x 100, bootstrap interval), parts, counts; the same by task."""
    policies: dict[str, Any] = {}
    for name in dict.fromkeys(r["policy"] for r in rows):
        own = [r for r in rows if r["policy"] == name]
        tasks = {t: _summarise([r for r in own if r["task"] == t]) for t in dict.fromkeys(r["task"] for r in own)}
        kinds = {r["policy_kind"] for r in own} - {"unknown"}
        policies[name] = {**_summarise(own), "kind": kinds.pop() if kinds else "unknown", "tasks": tasks}
    return policies


def _summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    judged = [r for r in rows if r["unjudged"] is None]
    scores = [100 * r["score"] for r in judged]
    mean, low, high = statistics.bootstrap_mean(scores) if scores else (None, None, None)
    # Eq. 8 is at most B: a failure is 0 however it would have been judged.
    best = sum(scores) + 100 * sum(r["success"] for r in rows if r["unjudged"] is not None)
    return {
        "n": len(rows),
        "score": mean,
        "low": low,
        "high": high,
        "worst": sum(scores) / len(rows),  # if every unjudged trajectory were worth nothing
        "best": best / len(rows),  # ... or, where it was a success, everything
        **{part: _mean_percent([r[part] for r in judged]) for part in ("A", "I", "R", "RA")},
        "success": 100 * float(np.mean([r["success"] for r in rows])),
        "unjudged": len(rows) - len(judged),
        "without_reasoning": sum(r["without_reasoning"] for r in judged),
    }


def _mean_percent(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return 100 / SCALE * float(np.mean(known)) if known else None
