"""The tables of our own results: leaderboard, tasks, dimensions, paired differences, controls, questions, costs.

Knows what was gathered; nothing of HTML. Every interval is at 95 %: Wilson's for rates, percentile bootstrap over
trajectories for means.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np

from dualvla_eval import statistics
from dualvla_eval.qa_metrics import METRICS, MM
from dualvla_eval.report.gather import Answers, Episode, Gathered, PolicyResult
from dualvla_eval.report.tables import Cell, Column, Number, Row, Table, interval, number

PARTS = ("R", "A", "I", "RA")
PART_NAMES = {"R": "reasoning", "A": "action", "I": "intention", "RA": "alignment"}
PART_HELP = {
    "R": "Reasoning: is what it says true?",
    "A": "Action: how well does it move?",
    "I": "Intention: does it move for the task?",
    "RA": "Reason-act alignment: does it do what it says?",
}
SCORE_HELP = "Eq. 8: ((R + A I) / 2) RA B, without reasoning A I B; the mean over trajectories, times 100"
_POLICY = Column("policy", "policy", "text")


def part_columns() -> tuple[Column, ...]:
    return tuple(Column(part, part, help=PART_HELP[part]) for part in PARTS)


def slug(*words: str) -> str:
    """Of a file or an anchor: [a-z0-9-]."""
    return "-".join("".join(c if c.isalnum() else "-" for c in word.lower()) for word in words)


def task_page(suite: str, task: str) -> str:
    return f"task-{slug(suite, task)}.html"


def rollouts_link(**filters: str) -> str:
    """The rollout browser with these filters set."""
    return f"rollouts.html#{urlencode(filters, quote_via=quote)}"


class Palette:
    """The colour of a policy, the same on every page: the order in which they were evaluated, controls last."""

    def __init__(self, found: Gathered):
        ordered = [p.label for s in found.suites for kind in (False, True) for p in found.on(s, controls=kind)]
        names = [*ordered, *(a.name for a in found.answers)]
        self._index = {name: i for i, name in enumerate(dict.fromkeys(names))}

    def __getitem__(self, label: str) -> int:
        return self._index[label]

    def to_dict(self) -> dict[str, int]:
        return dict(self._index)


# --- one policy -------------------------------------------------------------------------------------------------------


def part_mean(scores: Iterable[Mapping[str, Any]], part: str) -> Number | None:
    """A dimension (0 to 10) in percent over the trajectories that have it, with its interval."""
    values = [10 * s[part] for s in scores if s[part] is not None]
    return Number(*statistics.bootstrap_mean(values), n=len(values)) if values else None


def score_mean(scores: Sequence[Mapping[str, Any]], unjudged: int = 0) -> Number | None:
    """VLA Score x 100 with its interval."""
    if not scores:
        return None
    note = f"{unjudged} unjudged" if unjudged else ""
    return Number(*statistics.bootstrap_mean([100 * s["score"] for s in scores]), n=len(scores), note=note)


def success_mean(policy: PolicyResult) -> Number:
    """The unweighted mean of the tasks, as summary.json names it."""
    mean = policy.summary["means"]["mean of tasks"]
    return Number(100 * mean["value"], 100 * mean["low"], 100 * mean["high"], mean["trials"])


def success_rate(episodes: Sequence[Episode]) -> Number | None:
    if not episodes:
        return None
    return interval(statistics.wilson(sum(e.row["success"] for e in episodes), len(episodes)).to_dict())


def tasks_of(policies: Sequence[PolicyResult]) -> list[str]:
    return list(dict.fromkeys(task for p in policies for task in p.summary["tasks"]))


def score_cells(episodes: Sequence[Episode]) -> dict[str, Cell]:
    """VLA Score and its parts over some episodes; empty if nobody judged them."""
    judged = [e.judged for e in episodes if e.judged is not None]
    unjudged = sum(e.score is not None for e in episodes) - len(judged)
    return {"score": score_mean(judged, unjudged), **{part: part_mean(judged, part) for part in PARTS}}


# --- tables of a suite ------------------------------------------------------------------------------------------------


def leaderboard(found: Gathered, suite: str, palette: Palette, published: Sequence[Mapping[str, Any]]) -> Table:
    """Our policies on `suite`, and `published` (rows of the paper's Tables 4 and 5) beside them."""
    policies = found.on(suite)
    answers = {a.name: a for a in found.answers}
    columns = (
        _POLICY,
        Column("kind", "kind", "text", help="whether the policy reasons in words"),
        Column("judge", "judged by", "text"),
        Column("n", "episodes", digits=0),
        Column("success", "success (mean of tasks)", help="percent; each task counts the same, however many episodes"),
        Column("score", "VLA Score", help=SCORE_HELP),
        *part_columns(),
        *([Column("questions", "questions", help="questions about pictures, percent")] if answers else []),
        Column("tokens", "tokens / step", digits=2, help="reasoning tokens generated per control step"),
        Column("infer_ms", "inference ms", help="wall time of a call, shared by the observations in its batch"),
    )
    rows = [
        Row(
            {
                "policy": p.label,
                "kind": p.summary["kind"],
                "judge": p.evaluation.judge,
                "n": number(len(p.episodes)),
                "success": success_mean(p),
                **score_cells(p.episodes),
                "questions": interval(answers[p.label].overall) if p.label in answers else None,
                "tokens": number(p.summary["reasoning_tokens_per_step"]),
                "infer_ms": number(p.summary["infer_ms"]),
            },
            link=rollouts_link(suite=suite, policy=p.label),
            mark=palette[p.label],
        )
        for p in policies
    ]
    rows += [
        Row(
            {
                "policy": r["model"],
                "kind": "specialist" if r["R"] is None else "reasoning",
                "judge": "GPT-4o",
                "success": number(r["sim"]),
                "score": number(r["score"]),
                **{part: number(r[part]) for part in PARTS},
            },
            origin="published",
        )
        for r in published
    ]
    return Table(
        f"leaderboard-{slug(suite)}",
        f"Leaderboard: {suite}",
        f"Ours on suite {suite}. Published rows: SimplerEnv, another judge, no interval given by the paper; to be read "
        "beside ours, not ranked against them.",
        columns,
        tuple(rows),
    )


def success_by_task(found: Gathered, suite: str, palette: Palette, *, controls: bool = False) -> Table:
    policies = found.on(suite, controls=controls)
    tasks = tasks_of(policies)
    rows = [
        Row(
            {"policy": p.label, **{t: interval(p.summary["tasks"].get(t)) for t in tasks}, "mean": success_mean(p)},
            mark=palette[p.label],
        )
        for p in policies
    ]
    about = (
        "What a policy that sees and listens must beat: itself with grey images, itself with another object's "
        "instruction, an expert that goes for a random object."
        if controls
        else "Percent of the episodes solved, with Wilson 95 % intervals."
    )
    return Table(
        f"{'controls' if controls else 'success'}-{slug(suite)}",
        f"{'Controls' if controls else 'Success by task'}: {suite}",
        about,
        (_POLICY, *(Column(t, t) for t in tasks), Column("mean", "mean of tasks")),
        tuple(rows),
        {t: task_page(suite, t) for t in tasks},
    )


def score_by_task(found: Gathered, suite: str, palette: Palette) -> Table:
    policies = [p for p in found.on(suite) if p.judged]
    tasks = tasks_of(policies)
    rows = [
        Row(
            {
                "policy": p.label,
                **{t: score_cells([e for e in p.episodes if e.row["task"] == t])["score"] for t in tasks},
            },
            mark=palette[p.label],
        )
        for p in policies
    ]
    columns = (_POLICY, *(Column(t, t) for t in tasks))
    caption = "VLA Score, mean over the trajectories of the task; bootstrap 95 % intervals."
    links = {t: task_page(suite, t) for t in tasks}
    return Table(f"score-{slug(suite)}", f"VLA Score by task: {suite}", caption, columns, tuple(rows), links)


def judged_counts(found: Gathered, suite: str, palette: Palette) -> Table:
    """What stands behind the scores: unjudged trajectories with their bounds, and episodes without a word."""
    columns = (
        _POLICY,
        Column("n", "trajectories", digits=0),
        Column("unjudged", "unjudged", digits=0, help="counted, left out of the mean, never 0"),
        Column("score", "VLA Score", help=SCORE_HELP),
        Column("worst", "at worst", help="if every unjudged trajectory had scored 0"),
        Column("best", "at best", help="if every unjudged success had scored 100"),
        Column("silent", "said nothing", digits=0, help="episodes of a reasoning policy without a text: R = RA = 0"),
        Column("success", "success", help="percent of the trajectories"),
    )
    rows = []
    for p in found.on(suite):
        if p.score is None:
            continue
        worst, best = _bounds(p)
        rows.append(
            Row(
                {
                    "policy": p.label,
                    "n": number(p.score["n"]),
                    "unjudged": number(p.score["unjudged"]),
                    "score": score_mean(p.judged),
                    "worst": number(worst),
                    "best": number(best),
                    "silent": number(p.score["without_reasoning"]),
                    "success": number(p.score["success"]),
                },
                mark=palette[p.label],
            )
        )
    caption = "A trajectory the judge could not score is unjudged, never 0; the bounds say what it could change."
    return Table(f"judged-{slug(suite)}", f"What was judged: {suite}", caption, columns, tuple(rows))


def _bounds(policy: PolicyResult) -> tuple[float, float]:
    """VLA Score x 100 if all unjudged trajectories were worst and best; a failure is 0 either way (B = 0)."""
    scored = [e for e in policy.episodes if e.score is not None]
    known = 100 * sum(s["score"] for s in policy.judged)
    open_ones = sum(bool(e.row["success"]) for e in scored if e.judged is None)
    n = max(1, len(scored))
    return known / n, (known + 100 * open_ones) / n


# --- pairs ------------------------------------------------------------------------------------------------------------


def differences(policies: Sequence[PolicyResult], name: str, title: str) -> Table:
    """Every pair of policies on the episodes both ran: success (exact McNemar) and VLA Score (paired bootstrap)."""
    pairs = [
        (a, b, found)
        for b, a in itertools.combinations(policies, 2)
        if (found := _pairs(a.episodes, b.episodes))
    ]  # fmt: skip
    discordant = [_discordant(found) for _, _, found in pairs]
    p_values = [statistics.mcnemar(*d) for d in discordant]
    rows = []
    for (a, b, found), (only_a, only_b), p, adjusted in zip(
        pairs, discordant, p_values, statistics.holm(p_values), strict=True
    ):
        solved_a, solved_b = ([100.0 * pair[side].row["success"] for pair in found] for side in (0, 1))
        success = statistics.paired_difference(solved_a, solved_b)
        rows.append(
            Row(
                {
                    "pair": f"{a.label} − {b.label}",
                    "n": number(len(found)),
                    "success": Number(*success),
                    "only_first": number(only_a),
                    "only_second": number(only_b),
                    "p": number(p),
                    "p_holm": number(adjusted),
                    "score": _score_difference(found),
                    "verdict": _verdict(adjusted, success[0], a.label, b.label),
                }
            )
        )
    columns = (
        Column("pair", "first − second", "text"),
        Column("n", "pairs", digits=0, help="episodes that both ran"),
        Column("success", "Δ success", help="percentage points over all pairs; paired bootstrap"),
        Column("only_first", "only first", digits=0, help="episodes that only the first policy solved"),
        Column("only_second", "only second", digits=0, help="episodes that only the second policy solved"),
        Column("p", "p", digits=3, help="exact two-sided McNemar test on success"),
        Column("p_holm", "p (Holm)", digits=3, help="adjusted for the number of pairs in this table"),
        Column("verdict", "solves more", "text", help="at 5 % after Holm's adjustment"),
        Column("score", "Δ VLA Score", help="points, over the pairs judged on both sides; paired bootstrap"),
    )
    caption = (
        "The same numbered episodes for both. McNemar's exact test counts the episodes that only one of the two solved."
    )
    return Table(name, title, caption, columns, tuple(rows))


def _pairs(first: Sequence[Episode], second: Sequence[Episode]) -> list[tuple[Episode, Episode]]:
    others = {e.scene: e for e in second}
    return [(e, others[e.scene]) for e in first if e.scene in others]


def _discordant(pairs: Sequence[tuple[Episode, Episode]]) -> tuple[int, int]:
    solved = [(bool(a.row["success"]), bool(b.row["success"])) for a, b in pairs]
    return solved.count((True, False)), solved.count((False, True))


def _verdict(p: float, difference: float, first: str, second: str) -> str:
    if p >= 0.05:
        return "undecided"
    return first if difference > 0 else second


def _score_difference(pairs: Sequence[tuple[Episode, Episode]]) -> Number | None:
    judged = [(a.judged["score"], b.judged["score"]) for a, b in pairs if a.judged and b.judged]
    if not judged:
        return None
    first, second = 100 * np.array(judged).T
    mean, low, high = statistics.paired_difference(first, second)
    return Number(mean, low, high, len(judged))


def decomposition(found: Gathered, suite: str) -> Table:
    """Where a difference of scores comes from, as vla_score.json decomposes it (Shapley values of Eq. 8)."""
    columns = (
        Column("pair", "first − second", "text"),
        Column("n", "pairs", digits=0),
        Column("difference", "Δ VLA Score", help="points, with its paired bootstrap interval"),
        *(Column(part, f"from {part}", help=f"points that come from {PART_NAMES[part]}") for part in PARTS),
        Column("success_part", "from success", help="points that come from solving other episodes"),
    )
    rows = [
        Row(
            {
                "pair": f"{d['a']} − {d['b']}",
                "n": number(d["n"]),
                "difference": Number(d["difference"], d["low"], d["high"], d["n"]),
                **{part: number(d["parts"].get(part)) for part in PARTS},
                "success_part": number(d["parts"].get("success")),
            }
        )
        for e in found.evaluations
        if e.suite == suite and e.scored
        for d in e.scored.get("differences", ())
        if not any(e.summary["policies"][d[side]]["control"] for side in ("a", "b"))
    ]
    caption = "The contributions of a row add up to its difference (Shapley values of the factors of Eq. 8)."
    return Table(f"decomposition-{slug(suite)}", f"Where differences come from: {suite}", caption, columns, tuple(rows))


# --- questions --------------------------------------------------------------------------------------------------------


def questions(answers: Sequence[Answers], palette: Palette) -> Table:
    kinds = list(dict.fromkeys(k for a in answers for k in a.tasks))
    rows = tuple(
        Row({"policy": a.name, **{k: interval(a.tasks.get(k)) for k in kinds}}, mark=palette[a.name]) for a in answers
    )
    names = {name for a in answers for name in a.benchmarks}
    labels = {k: k if k in names else k.replace("/qa_", "/").removeprefix("qa_").replace("_", " ") for k in kinds}
    helps = {name: METRICS[b["metric"]] for a in answers for name, b in a.benchmarks.items()}
    helps[MM] = "unweighted mean of the benchmarks"
    columns = (_POLICY, *(Column(k, labels[k], help=helps.get(k, "")) for k in kinds))
    caption = (
        "Percent, one column a benchmark or kind of question, with 95 % intervals: Wilson where an answer is right or "
        "wrong, bootstrap for graded marks and for MM, the unweighted mean of the benchmarks."
    )
    return Table("questions", "Questions about pictures", caption, columns, rows)
