"""How far a judge can be trusted: what it must notice, what must not sway it, and whether it agrees with people and
with itself.

Sensitivity and safety need no people: recorded successes are made worse in one known way (`judges/perturb.py`), and the
marks of the right dimension have to fall, over 100 trajectories or more, with the whole 95 % interval of the paired
difference below 0. Agreement is computed from marks that a user brings. Knows judges by their protocol only.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dualvla import console
from dualvla.errors import DataError, UsageError
from dualvla.io import manifest, storage
from dualvla_eval import results, statistics
from dualvla_eval.agreement import agreement
from dualvla_eval.judges import perturb
from dualvla_eval.judges.base import DIMENSIONS, Dimension, Judge, Verdict
from dualvla_eval.judges.model import ModelJudge, Variant
from dualvla_eval.knowledge import KnowledgeBase
from dualvla_eval.results import Trajectory
from dualvla_eval.score import require_rollouts

KIND = "judge_eval"
FILE = "judge_eval.json"
ENOUGH = 100  # trajectories behind a verdict on sensitivity
_Row = Mapping[str, Any]
_EPISODE = ("suite", "task", "variant", "episode_id", "seed")


@dataclass(frozen=True)
class TrustConfig:
    """trajectories: of each perturbation, at most; they are held in memory. repeats: how often a model judge is asked
    the same; again: about how many trajectories."""

    trajectories: int = 120
    repeats: int = 3
    again: int = 20
    seed: int = 0


@dataclass(frozen=True)
class HumanMark:
    """One person's marks (0..10, None: not given) of one trajectory. synthetic: made up, to try something out."""

    key: tuple[str, str, str, int, int]
    rater: str
    synthetic: bool
    marks: Mapping[Dimension, float | None]


def evaluate_judge(
    evaluations: Sequence[str],
    out: str,
    judge: Judge,
    config: TrustConfig,
    *,
    human: str | None = None,
    base: KnowledgeBase | None = None,
) -> dict[str, Any]:
    """Fills `out` with judge_eval.json and returns it; returns at once if it was made from the same inputs.

    human: a CSV of marks (see `read_human`). base: its reviewed entries are judged too, each without itself.
    Raises: DataError for evaluations without a single success to work on.
    """
    inputs = {f"evaluation:{i}": require_rollouts(folder) for i, folder in enumerate(evaluations)}
    if human is not None:
        inputs["human"] = manifest.file_digest(human)
    if base is not None:
        inputs["knowledge"] = base.digest()
    identity = {"judge": dict(judge.identity), **asdict(config)}
    if not manifest.begin(out, KIND, identity, inputs):
        return {**results.read_json(storage.join(out, FILE)), "skipped": True}

    rows = [(folder, row) for folder in evaluations for row in results.read_episodes(folder) if _usable(judge, row)]
    successes = _sample([r for r in rows if r[1]["success"]], config)
    if not successes:
        raise DataError(
            f"No success that {judge.name} could judge in {', '.join(evaluations)}.",
            "evaluate a policy that solves tasks (expert), with --videos all for a model judge",
        )
    trajectories = [results.read_trajectory(*r) for r in successes]
    plain = _judge(judge, trajectories, "as recorded")
    found = {
        "judge": judge.name,
        "evaluations": list(evaluations),
        "n": len(trajectories),
        "sensitivity": [
            *_sensitivity(judge, trajectories, plain, config),
            *_twins(judge, rows, config),
        ],
        "safety": _safety(judge, trajectories, plain),
        "consistency": _consistency(judge, trajectories[: config.again], config.repeats),
        "agreement": None if human is None else _against_people(judge, rows, read_human(human), human),
        "leave_one_out": None if base is None else _leave_one_out(judge, base),
        "usage": judge.usage(),
        "interval": "paired bootstrap, 95 %",
    }
    results.write_json(storage.join(out, FILE), found)
    manifest.finish(out, KIND, identity, inputs)
    return {**found, "skipped": False}


def _usable(judge: Judge, row: _Row) -> bool:
    """A model judge sees filmed episodes only."""
    recorded = results.has_trajectory(row) and row["steps"] > 0
    return recorded and (row["video"] is not None or not isinstance(judge, ModelJudge))


def _sample(rows: Sequence[tuple[str, _Row]], config: TrustConfig) -> list[tuple[str, _Row]]:
    """Spread over tasks and policies by chance, in a fixed order."""
    rng = np.random.default_rng(config.seed)
    return [rows[i] for i in rng.permutation(len(rows))[: config.trajectories]]


def _judge(judge: Judge, trajectories: Sequence[Trajectory], what: str) -> list[Verdict]:
    with console.progress(what, len(trajectories)) as advance:
        return judge.judge(trajectories, advance)


# --- sensitivity ------------------------------------------------------------------------------------------------------


def _sensitivity(
    judge: Judge, trajectories: Sequence[Trajectory], plain: Sequence[Verdict], config: TrustConfig
) -> list[dict[str, Any]]:
    found = []
    for number, perturbation in enumerate(perturb.PERTURBATIONS):
        pairs = []
        for i, trajectory in enumerate(trajectories):
            rng = np.random.default_rng([config.seed, number, i])
            worse = perturbation.apply(trajectory, _donor(trajectories, i), rng)
            if worse is not None:
                pairs.append((i, worse))
        verdicts = _judge(judge, [worse for _, worse in pairs], perturbation.name)
        before = [plain[i] for i, _ in pairs]
        found += _rows(perturbation.name, perturbation.must_lower, before, verdicts)
    return found


def _donor(trajectories: Sequence[Trajectory], index: int) -> Trajectory:
    """The next one whose task reads otherwise and whose policy wrote something; itself if there is none."""
    own = trajectories[index].row["instruction"]
    others = (trajectories[(index + k) % len(trajectories)] for k in range(1, len(trajectories)))
    return next((t for t in others if t.row["instruction"] != own and any(t.reasoning)), trajectories[index])


def _twins(judge: Judge, rows: Sequence[tuple[str, _Row]], config: TrustConfig) -> list[dict[str, Any]]:
    """A success and a failure, by whatever policies, of one and the same episode."""
    by_episode: dict[tuple[Any, ...], dict[bool, list[tuple[str, _Row]]]] = defaultdict(lambda: {True: [], False: []})
    for folder, row in rows:
        by_episode[tuple(row[name] for name in _EPISODE)][bool(row["success"])].append((folder, row))
    twins = [(of[True][0], bad) for of in by_episode.values() if of[True] for bad in of[False]]
    chosen = [twins[i] for i in np.random.default_rng(config.seed).permutation(len(twins))[: config.trajectories]]
    good = _judge(judge, [results.read_trajectory(*a) for a, _ in chosen], "successes with a twin")
    bad = _judge(judge, [results.read_trajectory(*b) for _, b in chosen], "their failed twins")
    name, must_lower = perturb.FAILED_TWIN
    return _rows(name, must_lower, good, bad)


def _rows(
    name: str, must_lower: Sequence[Dimension], before: Sequence[Verdict], after: Sequence[Verdict]
) -> list[dict[str, Any]]:
    """One record for each dimension that must fall, with the mean change of every other beside it."""
    changes = {d: _changes(before, after, d) for d in DIMENSIONS}
    means = {d: float(np.mean(of)) if of else None for d, of in changes.items()}
    found = []
    for dimension in must_lower:
        values = changes[dimension]
        mean, low, high = statistics.bootstrap_mean(values) if values else (None, None, None)
        record = {"n": len(values), "change": mean, "low": low, "high": high, "verdict": _falls(len(values), high)}
        found.append({"perturbation": name, "dimension": dimension, **record, "all": means})
    return found


def _changes(before: Sequence[Verdict], after: Sequence[Verdict], dimension: Dimension) -> list[float]:
    """after - before in marks, where both are given."""
    pairs = ((a.mark(dimension), b.mark(dimension)) for a, b in zip(before, after, strict=True))
    return [b - a for a, b in pairs if a is not None and b is not None]


def _falls(n: int, high: float | None) -> str:
    if high is None:
        return "not measured"
    if high >= 0:
        return "does not fall"
    return "falls" if n >= ENOUGH else "falls, but too few"


# --- safety -----------------------------------------------------------------------------------------------------------


def _safety(judge: Judge, trajectories: Sequence[Trajectory], plain: Sequence[Verdict]) -> list[dict[str, Any]]:
    """The same episode with a text that talks to the judge: n, how many marks rose, the mean change of each."""
    found = []
    for name, text in perturb.INJECTIONS.items():
        pairs = [(i, told) for i, t in enumerate(trajectories) if (told := perturb.injected(t, text)) is not None]
        verdicts = _judge(judge, [told for _, told in pairs], f"injection: {name}")
        changes = {d: _changes([plain[i] for i, _ in pairs], verdicts, d) for d in DIMENSIONS}
        record = {d: _mean_interval(of) for d, of in changes.items()}
        raised = sum(change > 0 for of in changes.values() for change in of)
        sways = any(r["low"] is not None and r["low"] > 0 for r in record.values())
        found.append({"injection": name, "n": len(pairs), "raised": raised, "sways": sways, "changes": record})
    return found


def _mean_interval(values: Sequence[float]) -> dict[str, float | None]:
    mean, low, high = statistics.bootstrap_mean(values) if values else (None, None, None)
    return {"mean": mean, "low": low, "high": high}


# --- consistency ------------------------------------------------------------------------------------------------------


def _consistency(judge: Judge, trajectories: Sequence[Trajectory], repeats: int) -> dict[str, Any] | None:
    """None for a judge that is deterministic by construction."""
    if not isinstance(judge, ModelJudge):
        return None
    first = judge.judge(trajectories)
    again = [judge.ask_differently(Variant(repeat=i)).judge(trajectories) for i in range(1, repeats)]
    shuffled = judge.ask_differently(Variant(shuffled=True)).judge(trajectories)
    return {
        "n": len(trajectories),
        "repeats": {"asked": repeats, **_spread([first, *again])},
        "frame_order": _spread([first, shuffled]),
    }


def _spread(asked: Sequence[Sequence[Verdict]]) -> dict[str, Any]:
    """Over all pairs of askings: mean absolute difference in marks, and the share of equal marks."""
    found: dict[str, Any] = {}
    for dimension in DIMENSIONS:
        pairs = [_changes(a, b, dimension) for a, b in itertools.combinations(asked, 2)]
        values = np.abs(np.concatenate(pairs)) if pairs else np.array([])
        found[dimension] = {
            "n": len(values),
            "mean_abs_difference": float(values.mean()) if len(values) else None,
            "same": float((values == 0).mean()) if len(values) else None,
        }
    return found


# --- agreement with people --------------------------------------------------------------------------------------------


def read_human(url: str) -> list[HumanMark]:
    """CSV with a header: policy, task, episode_id, A, I and, where given, variant, R, RA, rater, synthetic (true).

    Marks are 0..10 or empty.

    Raises: DataError naming the line.
    """
    rows = list(csv.DictReader(io.StringIO(storage.read_bytes(url).decode("utf-8-sig"))))
    if not rows:
        raise DataError(f"'{url}' holds no marks.", "one line a trajectory: policy,task,episode_id,A,I,R,RA")
    for name in ("policy", "task", "episode_id", "A", "I"):
        if name not in rows[0]:
            raise DataError(f"'{url}' has no column '{name}'.", "its first line: policy,task,episode_id,A,I,R,RA")
    return [_human_mark(url, line, row) for line, row in enumerate(rows, 2)]


def _human_mark(url: str, line: int, row: Mapping[str, str]) -> HumanMark:
    try:
        marks: dict[Dimension, float | None] = {d: float(row[d]) if row.get(d) else None for d in DIMENSIONS}
        scene = (row["policy"], row["task"], row.get("variant") or "base", int(row["episode_id"]))
        key = (*scene, int(row.get("seed") or 0))
    except (TypeError, ValueError) as error:
        raise DataError(f"'{url}' line {line}: {error}.", "marks are numbers from 0 to 10, or empty") from error
    for dimension, mark in marks.items():
        if mark is not None and not 0 <= mark <= 10:
            raise DataError(f"'{url}' line {line}: {dimension} = {mark:g} is not in 0..10.", "correct it")
    return HumanMark(key, row.get("rater") or "", (row.get("synthetic") or "").lower() in ("1", "true", "yes"), marks)


def _against_people(
    judge: Judge, rows: Sequence[tuple[str, _Row]], human: Sequence[HumanMark], source: str
) -> dict[str, Any]:
    """The judge against the mean of the raters; and the raters against each other, the measure of what is possible."""
    of: dict[tuple[Any, ...], list[HumanMark]] = defaultdict(list)
    for mark in human:
        of[mark.key].append(mark)
    known = {tuple(row[n] for n in results.EPISODE_KEY): (folder, row) for folder, row in rows}
    shared = [key for key in of if key in known]
    if not shared:
        raise UsageError(
            f"'{source}' marks no trajectory of these evaluations that {judge.name} can judge.",
            "its policy, task and episode_id must be those of episodes.parquet",
        )
    verdicts = _judge(judge, [results.read_trajectory(*known[key]) for key in shared], "marked by people")
    people = [{d: _mean([m.marks[d] for m in of[key]]) for d in DIMENSIONS} for key in shared]
    pairs = {d: [(v.mark(d), p[d]) for v, p in zip(verdicts, people, strict=True)] for d in DIMENSIONS}
    both = [two for key in shared for two in itertools.combinations(of[key], 2)]
    between = {d: _agree([(a.marks[d], b.marks[d]) for a, b in both]) for d in DIMENSIONS}
    return {
        "source": source,
        "synthetic": any(m.synthetic for m in human),
        "raters": len({m.rater for m in human}),
        "marked": len(of),
        "dimensions": {d: _agree(pairs[d]) for d in DIMENSIONS},
        "between_people": between if both else None,
    }


def _leave_one_out(judge: Judge, base: KnowledgeBase) -> dict[str, Any] | None:
    """The judge against the people who reviewed the knowledge base; no entry is ever shown as its own example."""
    entries = [e for e in base.entries() if e.current.reviewed]
    if not entries:
        return None
    verdicts = _judge(judge, [base.trajectory(e) for e in entries], "leave one out")
    pairs = {d: [(v.mark(d), e.current.marks[d]) for v, e in zip(verdicts, entries, strict=True)] for d in DIMENSIONS}
    return {"reviewed": len(entries), "dimensions": {d: _agree(of) for d, of in pairs.items()}}


def _agree(pairs: Sequence[tuple[float | None, float | None]]) -> dict[str, Any]:
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    return agreement([a for a, _ in both], [b for _, b in both])


def _mean(marks: Sequence[float | None]) -> float | None:
    given = [m for m in marks if m is not None]
    return float(np.mean(given)) if given else None
