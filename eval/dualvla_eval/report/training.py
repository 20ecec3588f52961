"""What the report says of data and training: what pruning kept, and the curves of every stage.

Knows what was gathered; nothing of HTML.
"""

from __future__ import annotations

from typing import Any

import markupsafe

from dualvla.io import storage
from dualvla_eval.report import plots
from dualvla_eval.report.gather import PRUNING_REPORT, Checkpoint, Gathered, Pruned
from dualvla_eval.report.leaderboard import slug
from dualvla_eval.report.tables import Column, Number, Row, Table, number

# Beginnings of names in metrics.jsonl.
_NO_LOSSES = (
    "lr", "grad_", "samples_per_s", "tokens_per_s", "memory_gb", "mfu", "padding", "kept_reasoning", "skipped",
)  # fmt: skip
_STEP = "step"


def context(found: Gathered) -> dict[str, Any]:
    """The page's tables and plots. A term that is 0 throughout does not exist in its stage and is left out."""
    return {
        "pruned": [{"table": _kept(p), "texts": _texts(p), "timelines": timelines(p)} for p in found.pruned],
        "pruning_plot": markupsafe.Markup(_kept_plot(found)) if found.pruned else None,
        "stages": [{"name": c.name, "steps": len(c.lines), "curves": _curves(c)} for c in found.checkpoints if c.lines],
        "losses": _last_losses(found),
    }


# --- pruning ----------------------------------------------------------------------------------------------------------

# Counts of a pruned data set's tasks -> how they are called. "_share": as percent of another count.
_COUNTS = {
    "episodes": "episodes",
    "episodes_without_reasoning": "without any reasoning",
    "frames": "frames",
    "kept_frames": "frames that keep theirs",
    "words_before": "words before",
    "words_after": "words after",
    "tokens_before": "tokens before",
    "tokens_after": "tokens after",
}
_SHARES = {
    "scene_frames": ("scene label, percent", "frames"),
    "action_frames": ("action label, percent", "frames"),
    "kept_frames": ("kept, percent", "frames"),
    "words_after": ("words kept, percent", "words_before"),
}
_TEXT_SETS = {"all": "all frames", "kept": "kept frames", "random": "as many random frames"}
_TEXT_STATISTICS = {
    "texts": "texts",
    "tokens": "tokens",
    "distinct_texts": "different texts",
    "repeats_previous": "share that repeats the text before",
    "repeats_in_episode": "share that repeats any text of the episode",
}


def _kept(data: Pruned) -> Table:
    present = {name for of in data.tasks.values() for name in of}
    counts = {name: label for name, label in _COUNTS.items() if name in present}
    shares = {name: of for name, of in _SHARES.items() if name in present}
    rows = [
        Row(
            {
                "task": task,
                **{name: number(of[name]) for name in counts},
                **{f"{name}_share": _percent(of[name], of[whole]) for name, (_, whole) in shares.items()},
            }
        )
        for task, of in data.tasks.items()
    ]
    columns = (
        Column("task", "task", "text"),
        *(Column(f"{name}_share", label) for name, (label, _) in shares.items()),
        *(Column(name, label, digits=0) for name, label in counts.items()),
    )
    caption = f"Pruning mode “{data.mode}”: at how many frames the reasoning was kept. Frames and actions all stay."
    return Table(f"pruning-{slug(data.name)}", f"Pruning: {data.name}", caption, columns, tuple(rows))


def _texts(data: Pruned) -> Table | None:
    """The reasoning before and after, as the data set's own report measured it; None without one."""
    if data.report is None:
        return None
    found = data.report["text"]
    rows = [
        Row({"what": label, **{s: _count_or_share(found[s][name]) for s in _TEXT_SETS}})
        for name, label in _TEXT_STATISTICS.items()
    ]
    for order in found["all"]["entropy_bits"]:
        bits = {s: number(found[s]["entropy_bits"][order]) for s in _TEXT_SETS}
        rows.append(Row({"what": f"entropy of {order}-grams, bits", **bits}))
    if events := data.report["events"]:
        near = {s: number(events[f"{s}_share"]) for s in ("kept", "random")}
        rows.append(Row({"what": f"share of {events['count']} events with such a frame near", **near}))
    columns = (Column("what", "of a sample", "text"), *(Column(s, label, digits=2) for s, label in _TEXT_SETS.items()))
    caption = (
        f"From {found['episodes']} episodes drawn by hash. Kept and random frames are equally many in every episode: "
        "what differs between them is the choice."
    )
    title = f"Reasoning before and after: {data.name}"
    return Table(f"pruning-texts-{slug(data.name)}", title, caption, columns, tuple(rows))


def _count_or_share(value: float) -> Number:
    return Number(value, digits=0 if isinstance(value, int) else None)


def timelines(data: Pruned) -> list[dict[str, str]]:
    """Pictures of example episodes: {source (a file of the data set), file (in the report), what, alt}."""
    shown = data.report["timelines"] if data.report else []
    return [
        {
            "source": storage.join(data.folder, PRUNING_REPORT, t["file"]),
            "file": f"pruning/{slug(data.name)}-{i:02d}.png",
            "what": f"{t['task'] or ''}: {t['instruction'] or ''}",
            "alt": f"Timeline of episode {t['episode_id']}: {t['kept_frames']} of {t['frames']} frames kept",
        }
        for i, t in enumerate(shown)
    ]


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


# --- training ---------------------------------------------------------------------------------------------------------


def _terms(checkpoint: Checkpoint) -> list[str]:
    """The quantities that were recorded and are not 0 throughout; the total first, speeds last."""
    names = dict.fromkeys(name for line in checkpoint.lines for name in line if name != _STEP)
    used = [n for n in names if any(line.get(n) for line in checkpoint.lines)]
    return sorted(used, key=lambda n: (n != "loss", n.startswith(_NO_LOSSES), n))


def _curves(checkpoint: Checkpoint) -> list[tuple[str, markupsafe.Markup]]:
    drawn = []
    for name in _terms(checkpoint):
        points = [(float(line[_STEP]), float(line[name])) for line in checkpoint.lines if line.get(name) is not None]
        drawn.append((name, markupsafe.Markup(plots.curve(f"{checkpoint.name}, {name}", points))))
    return drawn


def _last_losses(found: Gathered) -> Table:
    """Means over the last tenth of each stage."""
    terms = list(dict.fromkeys(n for c in found.checkpoints for n in _terms(c) if not n.startswith(_NO_LOSSES)))
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
