"""summary.json of rollouts: rates with intervals, named means, seeds, pairs of policies, what rules the numbers follow.

Knows the rows of episodes.parquet; nothing of how they came to be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from dualvla_eval import reference, statistics
from dualvla_eval.conventions import TERMINATION, Conventions
from dualvla_eval.policies import PolicyRef
from dualvla_eval.suites import Suite

Row = Mapping[str, Any]
_SAME_EPISODE = ("task", "variant", "episode_id", "seed")


def summarise(suite: Suite, refs: Sequence[PolicyRef], rows: Sequence[Row], conventions: Conventions) -> dict[str, Any]:
    """For each policy its tasks with Wilson intervals, named means, seeds, costs and stop reasons; policies in pairs.

    tasks, means and pairs leave the suite's robustness variants out.
    """
    counted = [r for r in rows if r["variant"] not in suite.robustness_variants]
    per_policy = {
        ref.name: _policy(ref, suite, _of(rows, "policy", ref.name), _of(counted, "policy", ref.name)) for ref in refs
    }
    return {
        "suite": suite.name,
        "control_hz": suite.control_hz,
        "tasks": flat_tasks({name: p["tasks"] for name, p in per_policy.items()}),
        "policies": per_policy,
        "paired": paired(counted),
        "reference": reference.beside(suite.name, counted),
        "robustness_variants": list(suite.robustness_variants),
        "termination_rule": TERMINATION[conventions.termination],
        "conventions": {**suite.conventions, **{name: str(value) for name, value in asdict(conventions).items()}},
        "options": asdict(conventions),
        "assets": {name: list(files) for name, files in suite.assets().items()},
        "interval": "Wilson, 95 %",
    }


def flat_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """contract.md's `tasks`: by task for one policy, by policy/task for several."""
    if len(tasks) == 1:
        return dict(next(iter(tasks.values())))
    return {f"{policy}/{task}": value for policy, of_policy in tasks.items() for task, value in of_policy.items()}


def _policy(ref: PolicyRef, suite: Suite, rows: Sequence[Row], counted: Sequence[Row]) -> dict[str, Any]:
    steps = sum(r["steps"] for r in rows)
    replies = sum(r["replies"] for r in rows)
    waited = sum(r["infer_ms"] * r["replies"] for r in rows if r["replies"])
    kinds = {r["policy_kind"] for r in rows} - {"unknown"}
    found = {
        "source": "built-in" if ref.built_in else "endpoint" if ref.remote else "checkpoint",
        "ablation": ref.ablation,
        "options": list(ref.options),
        "control": ref.control,
        "kind": kinds.pop() if kinds else "unknown",
        "tasks": _rates(counted, "task", _solved),
        "tasks_first_success": _rates(counted, "task", _ever_solved),
        "means": _means(suite, counted),
        "seeds": _seeds(counted),
        "steps": steps,
        "mean_steps": steps / len(rows),
        "infer_ms": waited / replies if replies else None,
        "reasoning_tokens_per_step": sum(r["reasoning_tokens"] for r in rows) / max(1, steps),
        "reasoning_steps_share": sum(r["reasoning_steps"] for r in rows) / max(1, steps),
        "stop_reasons": dict(sorted(Counter(r["stop_reason"] for r in rows).items())),
        "mean_wall_s": float(np.mean([r["wall_s"] for r in rows])),
    }
    if len({r["variant"] for r in rows}) > 1:
        tasks = _groups(rows, "task")
        found["variants"] = {task: _rates(of, "variant", _solved) for task, of in tasks.items()}
    return found


def _means(suite: Suite, rows: Sequence[Row]) -> dict[str, Any]:
    """The unweighted mean of all tasks that were run, and the suite's own means where all of their tasks were."""
    by_task = {task: [float(r["success"]) for r in of] for task, of in _groups(rows, "task").items()}
    named = {"mean of tasks": tuple(by_task), **suite.means}
    means = {}
    for name, tasks in named.items():
        if tasks and by_task.keys() >= set(tasks):
            groups = [by_task[task] for task in tasks]
            value, low, high = statistics.bootstrap_mean_of_means(groups)
            trials = sum(map(len, groups))
            means[name] = {"value": value, "low": low, "high": high, "tasks": list(tasks), "trials": trials}
    return means


def _seeds(rows: Sequence[Row]) -> dict[str, Any]:
    """By task: the rate with each seed, their mean, and their standard deviation (n - 1; None for a single seed)."""
    found = {}
    for task, of in _groups(rows, "task").items():
        rates = {str(seed): float(np.mean([r["success"] for r in o])) for seed, o in _groups(of, "seed").items()}
        values = list(rates.values())
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        found[task] = {"rates": rates, "mean": float(np.mean(values)), "standard_deviation": deviation}
    return found


def paired(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every two policies on the episodes that both have run: exact McNemar test, and the difference of their rates.

    p_holm: adjusted for the number of pairs.
    """
    by_policy = {
        policy: {tuple(r[name] for name in _SAME_EPISODE): bool(r["success"]) for r in of}
        for policy, of in _groups(rows, "policy").items()
    }
    pairs = []
    for a, b in combinations(by_policy, 2):
        common = sorted(by_policy[a].keys() & by_policy[b].keys())
        if not common:
            continue
        of_a, of_b = ([by_policy[name][key] for key in common] for name in (a, b))
        only_a = sum(x and not y for x, y in zip(of_a, of_b, strict=True))
        only_b = sum(y and not x for x, y in zip(of_a, of_b, strict=True))
        mean, low, high = statistics.paired_difference(np.array(of_a, float), np.array(of_b, float))
        pairs.append(
            {
                "a": a,
                "b": b,
                "episodes": len(common),
                "both": sum(x and y for x, y in zip(of_a, of_b, strict=True)),
                "only_a": only_a,
                "only_b": only_b,
                "difference": mean,
                "low": low,
                "high": high,
                "p": statistics.mcnemar(only_a, only_b),
            }
        )
    for pair, adjusted in zip(pairs, statistics.holm([pair["p"] for pair in pairs]), strict=True):
        pair["p_holm"] = adjusted
    return pairs


def _solved(row: Row) -> bool:
    return bool(row["success"])


def _ever_solved(row: Row) -> bool:
    return row["first_success"] is not None


def _rates(rows: Sequence[Row], by: str, solved: Callable[[Row], bool]) -> dict[str, Any]:
    return {name: statistics.wilson(sum(map(solved, of)), len(of)).to_dict() for name, of in _groups(rows, by).items()}


def _groups(rows: Iterable[Row], by: str) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[by], []).append(row)
    return groups


def _of(rows: Sequence[Row], name: str, value: Any) -> list[Row]:
    return [r for r in rows if r[name] == value]
