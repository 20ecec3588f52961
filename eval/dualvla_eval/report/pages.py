"""The pages: what stands on each, rendered by Jinja with everything escaped but our own SVG. Knows no result file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import markupsafe

import dualvla
from dualvla_eval.report import judge_checks, leaderboard, plots, published, training
from dualvla_eval.report.gather import Answers, Episode, Gathered, PolicyResult
from dualvla_eval.report.leaderboard import PART_NAMES, PARTS, Palette
from dualvla_eval.report.tables import Column, Number, Row, Table, number, span, text
from dualvla_eval.rollout import STOP_REASONS
from dualvla_eval.videos import FRAME_PX

_EXAMPLES = 12  # answers shown per policy
_GOOD = "success"


@dataclass(frozen=True)
class Page:
    """file: its name. nav: how the menu calls it, None for a page that others lead to."""

    file: str
    nav: str | None
    template: str
    title: str
    context: Mapping[str, Any]

    @property
    def tables(self) -> list[Table]:
        """Every table of the page, however deep it stands in its context."""
        return list(_tables(self.context))


def _tables(value: Any) -> Any:
    if isinstance(value, Table):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tables(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tables(inner)


def pages(found: Gathered) -> list[Page]:
    """The pages that these results give rise to, in the order of the menu."""
    palette = Palette(found)
    made = [_overview(found, palette)]
    if found.policies:
        made += [_tasks(found, palette), *_task_pages(found, palette)]
        made.append(Page("rollouts.html", "Rollouts", "rollouts", "Rollouts", {"frame_px": FRAME_PX}))
    made.append(_published(found, palette))
    if found.checkpoints or found.pruned:
        made.append(Page("training.html", "Training", "training", "Data and training", training.context(found)))
    if found.judge_checks:
        checks = [{"judge": c["judge"], "n": c["n"], "tables": judge_checks.tables(c)} for c in found.judge_checks]
        made.append(Page("judge.html", "Judge", "judge", "The judge", {"checks": checks}))
    made.append(_about(found, made))
    return made


def render(made: Sequence[Page]) -> dict[str, str]:
    """File -> HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(resource_loader),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"cell": text, "span": span}
    environment.tests |= {"number": lambda cell: isinstance(cell, Number)}
    menu = [p for p in made if p.nav]
    return {
        page.file: environment.get_template(f"{page.template}.html.j2").render(
            page=page, menu=menu, version=dualvla.__version__, **page.context
        )
        for page in made
    }


def resource_loader(name: str) -> str:
    return resources.files("dualvla_eval.report").joinpath("templates", name).read_text(encoding="utf-8")


def _markup(svg: str) -> markupsafe.Markup:
    return markupsafe.Markup(svg)  # our own plots, whose texts are escaped where they are drawn


# --- overview ---------------------------------------------------------------------------------------------------------


def _overview(found: Gathered, palette: Palette) -> Page:
    suites = [_suite(found, suite, palette) for suite in found.suites]
    filmed = sum(e.row["video"] is not None for e in found.episodes)
    context = {
        "suites": suites,
        "questions": leaderboard.questions(found.answers, palette) if found.answers else None,
        "examples": {a.name: _examples(a) for a in found.answers},
        "counts": {
            "policies": sum(not p.control for p in found.policies),
            "rollouts": len(found.episodes),
            "filmed": filmed,
            "judges": sorted({e.judge for e in found.evaluations if e.judge}),
        },
    }
    return Page("index.html", "Leaderboard", "index", "DualVLA report", context)


def _suite(found: Gathered, suite: str, palette: Palette) -> dict[str, Any]:
    policies = found.on(suite)
    scored = [p for p in policies if p.judged]
    return {
        "name": suite,
        "slug": leaderboard.slug(suite),
        "leaderboard": leaderboard.leaderboard(found, suite, palette, published.published()["vla_score"]),
        "radars": [(p.label, _markup(_radar(p, palette[p.label]))) for p in scored],
        "dimensions": _markup(_dimensions(scored, palette)) if scored else None,
        "differences": leaderboard.differences(
            policies, f"paired-{leaderboard.slug(suite)}", f"Paired differences: {suite}"
        ),
        "decomposition": leaderboard.decomposition(found, suite),
        "judged": leaderboard.judged_counts(found, suite, palette),
        "controls": leaderboard.success_by_task(found, suite, palette, controls=True),
    }


def _radar(policy: PolicyResult, color: int) -> str:
    parts = {part: leaderboard.part_mean(policy.judged, part) for part in PARTS}
    success = leaderboard.success_rate(policy.episodes)
    values = {**parts, "Sim": success}
    return plots.radar(policy.label, {name: None if v is None else v.value for name, v in values.items()}, color)


def _dimensions(policies: Sequence[PolicyResult], palette: Palette) -> str:
    groups = {}
    for part in (*PARTS, "score"):
        found = []
        for p in policies:
            mean = leaderboard.score_mean(p.judged) if part == "score" else leaderboard.part_mean(p.judged, part)
            if mean is not None:
                found.append(plots.Bar(p.label, mean.value, mean.low, mean.high, palette[p.label]))
        groups["VLA Score" if part == "score" else f"{part}  {PART_NAMES[part]}"] = found
    return plots.bars("VLA Score and its dimensions with bootstrap 95 % intervals", groups)


def _examples(answers: Answers) -> list[Mapping[str, Any]]:
    """As many wrong as right answers, as far as there are."""
    wrong = [r for r in answers.examples if not r["correct"]][: _EXAMPLES // 2]
    return [*wrong, *[r for r in answers.examples if r["correct"]][: _EXAMPLES - len(wrong)]]


# --- tasks ------------------------------------------------------------------------------------------------------------


def _tasks(found: Gathered, palette: Palette) -> Page:
    suites = []
    for suite in found.suites:
        policies = [*found.on(suite), *found.on(suite, controls=True)]
        groups = {
            task: [
                plots.Bar(p.label, 100 * of["rate"], 100 * of["low"], 100 * of["high"], palette[p.label])
                for p in policies
                if (of := p.summary["tasks"].get(task))
            ]
            for task in leaderboard.tasks_of(policies)
        }
        suites.append(
            {
                "name": suite,
                "tasks": [(task, leaderboard.task_page(suite, task)) for task in groups],
                "success": leaderboard.success_by_task(found, suite, palette),
                "score": leaderboard.score_by_task(found, suite, palette),
                "plot": _markup(plots.bars("Success per task, percent, with Wilson 95 % intervals", groups)),
            }
        )
    return Page("tasks.html", "Tasks", "tasks", "Tasks", {"suites": suites})


def _task_pages(found: Gathered, palette: Palette) -> list[Page]:
    return [
        _task_page(found, suite, task, palette)
        for suite in found.suites
        for task in leaderboard.tasks_of([*found.on(suite), *found.on(suite, controls=True)])
    ]


def _task_page(found: Gathered, suite: str, task: str, palette: Palette) -> Page:
    policies = [p for c in (False, True) for p in found.on(suite, controls=c) if task in p.summary["tasks"]]
    own = {p.label: [e for e in p.episodes if e.row["task"] == task] for p in policies}
    slug = leaderboard.slug(suite, task)
    narrowed = [_only(p, own[p.label]) for p in policies if not p.control]
    conventions = policies[0].evaluation.summary["conventions"]
    context = {
        "suite": suite,
        "task": task,
        "rule": conventions.get(f"success of {task}"),
        "results": _task_table(policies, own, slug, palette),
        "outcomes": _outcomes(policies, own, slug, palette),
        "bars": [
            (p.label, _markup(plots.shares(f"How {p.label} ended", _counted(own[p.label]), _KINDS))) for p in policies
        ],
        "kinds": {r: kind for r, kind in _KINDS.items() if any(r in _counted(of) for of in own.values())},
        "differences": leaderboard.differences(narrowed, f"paired-{slug}", f"Paired differences: {task}"),
        "matrix": _matrix(policies, own),
    }
    return Page(leaderboard.task_page(suite, task), None, "task", f"{task}", context)


def _only(policy: PolicyResult, episodes: Sequence[Episode]) -> PolicyResult:
    return PolicyResult(
        policy.label, policy.evaluation, policy.summary, policy.score, policy.source_digest, tuple(episodes)
    )


def _task_table(
    policies: Sequence[PolicyResult], own: Mapping[str, Sequence[Episode]], slug: str, palette: Palette
) -> Table:
    columns = (
        Column("policy", "policy", "text"),
        Column("success", "success", help="percent, Wilson 95 %"),
        Column("score", "VLA Score", help=leaderboard.SCORE_HELP),
        *leaderboard.part_columns(),
        Column("steps", "steps", help="mean control steps of an episode"),
        Column("texts", "texts", help="mean number of texts newly written in an episode"),
    )
    rows = []
    for p in policies:
        episodes = own[p.label]
        rows.append(
            Row(
                {
                    "policy": p.label,
                    "success": leaderboard.success_rate(episodes),
                    **leaderboard.score_cells(episodes),
                    "steps": number(sum(e.row["steps"] for e in episodes) / len(episodes)),
                    "texts": number(sum(e.row["reasoning_steps"] for e in episodes) / len(episodes)),
                },
                link=leaderboard.rollouts_link(suite=p.suite, task=episodes[0].row["task"], policy=p.label),
                mark=palette[p.label],
            )
        )
    caption = "Success: Wilson 95 %; score and its parts: bootstrap 95 % over trajectories."
    return Table(f"task-{slug}", "Results", caption, columns, tuple(rows))


# How an episode ended -> the class that colours it. Every fault of a policy is one kind.
_KINDS = {
    "success": "good", "failure": "bad", "step_limit": "late",
    **dict.fromkeys(STOP_REASONS[3:], "fault"),
}  # fmt: skip


def _counted(episodes: Sequence[Episode]) -> dict[str, int]:
    counts = Counter(e.row["stop_reason"] for e in episodes)
    return {reason: counts[reason] for reason in _KINDS if counts[reason]}


def _outcomes(
    policies: Sequence[PolicyResult], own: Mapping[str, Sequence[Episode]], slug: str, palette: Palette
) -> Table:
    counted = {p.label: _counted(own[p.label]) for p in policies}
    reasons = [r for r in _KINDS if any(r in of for of in counted.values())]
    rows = tuple(
        Row({"policy": label, **{r: number(of.get(r, 0)) for r in reasons}}, mark=palette[label])
        for label, of in counted.items()
    )
    columns = (
        Column("policy", "policy", "text"),
        *(Column(r, r.replace("_", " "), digits=0) for r in reasons),
    )
    return Table(f"outcomes-{slug}", "How the episodes ended", "Episodes by stop reason.", columns, rows)


def _matrix(policies: Sequence[PolicyResult], own: Mapping[str, Sequence[Episode]]) -> dict[str, Any]:
    """Policies x scenes, each cell a rollout."""
    scenes = sorted({(e.row["variant"], e.row["episode_id"]) for episodes in own.values() for e in episodes})
    several = len({variant for variant, _ in scenes}) > 1
    rows = []
    for p in policies:
        at = {(e.row["variant"], e.row["episode_id"]): e for e in own[p.label]}
        rows.append((p.label, [at.get(scene) for scene in scenes]))
    return {"scenes": [f"{v} {i}" if several else f"{i}" for v, i in scenes], "rows": rows, "kinds": _KINDS}


# --- published, about -------------------------------------------------------------------------------------------------


def _published(found: Gathered, palette: Palette) -> Page:
    suite = found.suites[0] if found.suites else "none"
    context = {
        "scores": [
            published.vla_score(found, s, palette, kind)
            for s in (found.suites or [suite])
            for kind in ("specialist", "reasoning")
        ],
        "simplerenv": published.simplerenv(found, palette),
        "ablations": published.ablations(found, palette),
        "notes": [published.published()["source_note"], *published.published()["notes"]],
    }
    return Page("published.html", "Published", "published", "Beside the published results", context)


def _about(found: Gathered, made: Sequence[Page]) -> Page:
    summaries = {e.suite: e.summary for e in found.evaluations}
    context = {
        "notes": {s: {k: of[k] for k in ("termination_rule", "conventions")} for s, of in summaries.items()},
        "assets": {s: of["assets"] for s, of in summaries.items()},
        "inputs": found.inputs,
        "downloads": [(page.title, page.file, [(t.name, t.title) for t in page.tables]) for page in made],
    }
    return Page("about.html", "About the numbers", "about", "About the numbers", context)
