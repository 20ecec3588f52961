"""Writes the report: one HTML page, a style sheet, a script and the videos, all relative, so that it opens from disk.

Everything that a policy, a judge or a file said is escaped by the template; only our own SVG is inserted as it is.
Knows what was gathered; reads no result file itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import markupsafe

import dualvla
from dualvla.io import manifest, storage
from dualvla_eval import results
from dualvla_eval.report import plots
from dualvla_eval.report.gather import Gathered, PolicyResult, Rollout, Training, gather

KIND = "report"
INDEX = "index.html"

_PACKAGE = "dualvla_eval.report"
_STATIC = ("style.css", "page.js")
_PARTS = ("R", "A", "I", "RA")
_NOT_LOSSES = ("step", "lr", "grad_norm", "samples_per_s")
_CURVE_POINTS = 150
_EXAMPLES = 12  # answers shown per policy


def write_report(folders: Sequence[str], out: str) -> dict[str, Any]:
    """Returns {"out", "index", "skipped"}; skips a report that was made from the same inputs.

    Raises: DataError if there is nothing to report on; OutputError if `out` belongs to another report.
    """
    gathered = gather([f for f in folders if f.rstrip("/") != out.rstrip("/")])
    config = {"version": dualvla.__version__}
    index = storage.join(out, INDEX)
    if not manifest.begin(out, KIND, config, gathered.inputs):
        return {"out": out, "index": index, "skipped": True}
    videos = {r.video: f"videos/{i:03d}-{_file_name(r)}.mp4" for i, r in enumerate(gathered.rollouts)}
    for source, name in videos.items():
        storage.write_bytes(storage.join(out, name), storage.read_bytes(source))
    for name in _STATIC:
        storage.write_bytes(storage.join(out, name), _resource(f"static/{name}").encode())
    storage.write_bytes(index, render(gathered, videos).encode())
    manifest.finish(out, KIND, config, gathered.inputs, rollouts=len(gathered.rollouts))
    return {"out": out, "index": index, "skipped": False}


def _resource(name: str) -> str:
    return resources.files(_PACKAGE).joinpath(name).read_text(encoding="utf-8")


def _file_name(rollout: Rollout) -> str:
    row = rollout.row
    return results.stem(row["policy"], row["task"], row["variant"], row["episode_id"])


def render(gathered: Gathered, videos: Mapping[str, str]) -> str:
    """The page. videos: URL of a rollout's video -> its path relative to the page."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: _resource(f"static/{name}")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"figure": figure, "percent": percent}
    policies = sorted((p for p in gathered.policies if not p.control), key=_place)
    controls = [p for p in gathered.policies if p.control]
    return environment.get_template("index.html.j2").render(
        version=dualvla.__version__,
        policies=policies,
        controls=controls,
        parts=_PARTS,
        tasks=_tasks(policies),
        control_tasks=_tasks(controls),
        answers=gathered.answers,
        accuracy={a.name: a.tasks["all"] for a in gathered.answers},
        kinds=list(dict.fromkeys(k for a in gathered.answers for k in a.tasks)),
        examples={a.name: _examples(a.examples) for a in gathered.answers},
        judges=sorted({p.judge for p in policies if p.judge}),
        success_plot=_markup(_success_plot(policies + controls)),
        score_plot=_markup(_score_plot(policies)),
        training=[(t.name, len(t.lines), *_losses(t)) for t in gathered.training if t.lines],
        pruned=gathered.pruned,
        rollouts=sorted(gathered.rollouts, key=lambda r: (r.row["task"], r.row["episode_id"], r.row["policy"])),
        videos=videos,
        notes=gathered.notes,
        published=json.loads(_resource("published_results.json")),
    )


def _markup(svg: str) -> markupsafe.Markup:
    return markupsafe.Markup(svg)  # our own plots, whose texts are escaped where they are drawn


def _place(policy: PolicyResult) -> int:
    """The yardsticks first, then the policies in the order they were evaluated in."""
    return {"random": 0, "expert": 1}.get(policy.name, 2)


def _tasks(policies: Sequence[PolicyResult]) -> list[str]:
    return list(dict.fromkeys(task for p in policies for task in p.summary["tasks"]))


def figure(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float) -> str:
    return f"{100 * value:.0f}"


def _success_plot(policies: Sequence[PolicyResult]) -> str:
    names = list(dict.fromkeys(p.name for p in policies))
    groups = {
        task: [
            plots.Bar(p.name, 100 * found["rate"], 100 * found["low"], 100 * found["high"], names.index(p.name))
            for p in policies
            if (found := p.summary["tasks"].get(task))
        ]
        for task in _tasks(policies)
    }
    return plots.bars("Success per task, percent, with Wilson 95 % intervals", groups) if groups else ""


def _score_plot(policies: Sequence[PolicyResult]) -> str:
    scored = [
        plots.Bar(p.name, p.score["score"], p.score["low"], p.score["high"], i)
        for i, p in enumerate(policies)
        if p.score and p.score["score"] is not None
    ]
    return plots.bars("VLA Score with bootstrap 95 % intervals", {"": scored}, unit="") if scored else ""


def _losses(training: Training) -> tuple[list[str], markupsafe.Markup]:
    """Names of the loss terms that this stage has, and their curves."""
    terms = [name for name in training.lines[0] if name not in _NOT_LOSSES]
    series = {name: _smoothed([(t["step"], t[name]) for t in training.lines if name in t]) for name in terms}
    used = {name: points for name, points in series.items() if any(y for _, y in points)}
    return list(used), _markup(plots.curves(f"Training losses of {training.name}", used))


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of consecutive points, so that no more than `_CURVE_POINTS` are drawn."""
    size = -(-len(points) // _CURVE_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]


def _examples(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """As many wrong as right answers, as far as there are."""
    wrong = [r for r in rows if not r["correct"]][: _EXAMPLES // 2]
    return [*wrong, *[r for r in rows if r["correct"]][: _EXAMPLES - len(wrong)]]
