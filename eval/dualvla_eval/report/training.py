"""What the report says of data and training: what pruning kept, and the curves of every stage.

Knows what was gathered; nothing of HTML.
"""

from __future__ import annotations

from typing import Any

import markupsafe

from dualvla_eval.report import plots
from dualvla_eval.report.gather import Checkpoint, Gathered, Pruned
from dualvla_eval.report.leaderboard import slug
from dualvla_eval.report.tables import Column, Number, Row, Table, number

_SPEEDS = ("lr", "grad_norm", "samples_per_s")  # of metrics.jsonl, not losses
_STEP = "step"


def context(found: Gathered) -> dict[str, Any]:
    """The page's tables and plots. A term that is 0 throughout does not exist in its stage and is left out."""
    return {
        "pruned": [{"name": p.name, "mode": p.mode, "table": _kept(p)} for p in found.pruned],
        "pruning_plot": markupsafe.Markup(_kept_plot(found)) if found.pruned else None,
        "stages": [{"name": c.name, "steps": len(c.lines), "curves": _curves(c)} for c in found.checkpoints if c.lines],
        "losses": _last_losses(found),
    }


def _kept(data: Pruned) -> Table:
    rows = [
        Row(
            {
                "task": task,
                "frames": number(of["frames"]),
                "kept_frames": number(of["kept_frames"]),
                "kept": _percent(of["kept_frames"], of["frames"]),
                "words_before": number(of["words_before"]),
                "words_after": number(of["words_after"]),
                "words": _percent(of["words_after"], of["words_before"]),
            }
        )
        for task, of in data.tasks.items()
    ]
    columns = (
        Column("task", "task", "text"),
        Column("frames", "frames", digits=0),
        Column("kept_frames", "frames that keep their reasoning", digits=0),
        Column("kept", "kept, percent"),
        Column("words_before", "words before", digits=0),
        Column("words_after", "words after", digits=0),
        Column("words", "words kept, percent"),
    )
    caption = f"Pruning mode “{data.mode}”: at how many frames the reasoning was kept. Frames and actions all stay."
    return Table(f"pruning-{slug(data.name)}", f"Pruning: {data.name}", caption, columns, tuple(rows))


def _percent(part: float, whole: float) -> Number | None:
    return Number(100 * part / whole) if whole else None


def _kept_plot(found: Gathered) -> str:
    groups = {
        data.name: [
            plots.Bar(task, 100 * of["kept_frames"] / of["frames"], color=i)
            for task, of in data.tasks.items()
            if of["frames"]
        ]
        for i, data in enumerate(found.pruned)
    }
    return plots.bars("Frames that keep their reasoning, percent", groups, unit="%")


def _terms(checkpoint: Checkpoint) -> list[str]:
    """The quantities that were recorded and are not 0 throughout; the total first, speeds last."""
    names = dict.fromkeys(name for line in checkpoint.lines for name in line if name != _STEP)
    used = [n for n in names if any(line.get(n) for line in checkpoint.lines)]
    return sorted(used, key=lambda n: (n != "loss", n in _SPEEDS, n))


def _curves(checkpoint: Checkpoint) -> list[tuple[str, markupsafe.Markup]]:
    drawn = []
    for name in _terms(checkpoint):
        points = [(float(line[_STEP]), float(line[name])) for line in checkpoint.lines if line.get(name) is not None]
        drawn.append((name, markupsafe.Markup(plots.curve(f"{checkpoint.name}, {name}", points))))
    return drawn


def _last_losses(found: Gathered) -> Table:
    """Means over the last tenth of each stage."""
    terms = list(dict.fromkeys(n for c in found.checkpoints for n in _terms(c) if n not in _SPEEDS))
    rows = []
    for checkpoint in found.checkpoints:
        tail = checkpoint.lines[-max(1, len(checkpoint.lines) // 10) :]
        means: dict[str, Number | None] = {}
        for name in set(terms) & set(_terms(checkpoint)):
            values = [line[name] for line in tail if line.get(name) is not None]
            means[name] = Number(sum(values) / len(values)) if values else None
        rows.append(Row({"stage": checkpoint.name, "steps": number(len(checkpoint.lines)), **means}))
    columns = (
        Column("stage", "checkpoint", "text"),
        Column("steps", "steps", digits=0),
        *(Column(term, term, digits=4) for term in terms),
    )
    caption = "Mean of each term over the last tenth of the steps; an absent term does not exist in that stage."
    return Table("training-losses", "Losses at the end of training", caption, columns, tuple(rows))
