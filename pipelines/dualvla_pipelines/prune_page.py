"""The page of a pruning report: `report.json` as one static HTML file beside its pictures. Knows nothing else.

Every text of the data set is escaped; the page loads nothing but its pictures and runs no script.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from dualvla.pruning.statistics import ORDERS

_MOST_TASKS = 50  # rows of the table, by frames; `report.json` has all
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p, li { max-width: 48rem; } .muted { color: #595959; } .warning { color: #9c2b00; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid #e3e3e3; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; }
tr.total td { font-weight: 600; } td.text { text-align: left; }
figure { margin: 1.2rem 0 2rem; border: 1px solid #d9d9d9; border-radius: 6px; overflow: hidden; }
figure img { display: block; width: 100%; height: auto; } figcaption { padding: .5rem 1rem; background: #f6f6f6; }
summary { cursor: pointer; } td.kept { color: #007a58; font-weight: 600; }
"""


def render(report: Mapping[str, Any]) -> str:
    """report: as `prune_report.build` returns it."""
    body = [
        f"<h1>Pruning of {escape(report['name'])}</h1>",
        f"<p class='muted'>mode <b>{escape(report['mode'])}</b>: {_MODES[report['mode']]}</p>",
        _summary(report),
        "<h2>Kept, per task</h2>",
        _tasks(report),
        "<h2>What the reasoning says, before and after</h2>",
        _texts(report["text"]),
        _events(report["events"]),
        "<h2>Example episodes</h2>",
        _examples(report["timelines"]),
    ]
    title = escape(f"Pruning of {report['name']}")
    policy = "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body>\n{chr(10).join(body)}\n</body></html>\n"
    )


_MODES = {
    "both": "reasoning stays where the scene label and the action label both fire",
    "scene": "reasoning stays where the scene label fires",
    "action": "reasoning stays where the action label fires",
    "random": "reasoning stays at as many random frames of each episode as both labels would keep",
    "none": "all reasoning stays",
}


def _summary(report: Mapping[str, Any]) -> str:
    total = report["total"]
    lines = [
        f"Reasoning stays at <b>{_percent(total['keep_ratio'])}</b> of {total['frames']:,} frames in "
        f"{total['episodes']:,} episodes; {total['episodes_without_reasoning']:,} episodes keep none.",
        f"Reasoning tokens (words and punctuation marks): {total['tokens_before']:,} before, "
        f"{total['tokens_after']:,} after.",
    ]
    if report["policy_tokens"]:
        found = report["policy_tokens"]
        lines.append(
            f"In the policy's own tokens, estimated from the sample ({found['per_token']:.2f} for each of ours): "
            f"{found['before']:,} before, {found['after']:,} after."
        )
    lines.append(f"{report['rows_in']:,} rows in = {report['rows_out']:,} out + {report['rows_quarantined']:,} unfit.")
    html = "".join(f"<li>{line}</li>" for line in lines)
    unfit = [f"{count:,} rows: {escape(why)}" for why, count in report["quarantine_reasons"].items()]
    unfit += [f"{escape(name)} is left out: {escape(why)}" for name, why in report["files_lost"].items()]
    return f"<ul>{html}{''.join(f'<li class=warning>{line}</li>' for line in unfit)}</ul>"


def _tasks(report: Mapping[str, Any]) -> str:
    header = (
        "task", "episodes", "without reasoning", "frames", "scene label", "action label", "kept", "tokens before",
        "tokens after",
    )  # fmt: skip
    scenes = any(step["scene"] is not None for shown in report["timelines"] for step in shown["steps"])
    scenes = scenes or report["total"]["scene_frames"] > 0

    def row(name: str, counts: Mapping[str, Any]) -> list[str]:
        frames = max(counts["frames"], 1)
        return [
            escape(name), f"{counts['episodes']:,}", f"{counts['episodes_without_reasoning']:,}",
            f"{counts['frames']:,}", _percent(counts["scene_frames"] / frames) if scenes else "–",
            _percent(counts["action_frames"] / frames), _percent(counts["keep_ratio"]),
            f"{counts['tokens_before']:,}", f"{counts['tokens_after']:,}",
        ]  # fmt: skip

    largest = sorted(report["tasks"].items(), key=lambda item: -item[1]["frames"])
    rows = [row(name, counts) for name, counts in largest[:_MOST_TASKS]]
    more = len(largest) - len(rows)
    note = f"<p class='muted'>and {more:,} smaller tasks, in report.json</p>" if more > 0 else ""
    return _table(header, rows, total=row("all", report["total"])) + note


def _texts(text: Mapping[str, Any]) -> str:
    """The sets side by side; random frames are the yardstick, because entropy grows with the size of a sample."""
    names = ("all", "kept", "random")
    header = ("", "all frames", "kept frames", "as many random frames")
    rows = [[label, *(show(text[name]) for name in names)] for label, show in _TEXT_ROWS.items()]
    rows += [
        [f"entropy of {_GRAMS[n]}, bits", *(f"{text[name]['entropy_bits'][str(n)]:.2f}" for name in names)]
        for n in ORDERS
    ]
    note = (
        f"<p class='muted'>From {text['episodes']:,} episodes drawn by hash. Compare the kept frames with the random "
        "ones: both have the same number in every episode, so what differs is the choice.</p>"
    )
    return _table(header, rows) + note


_GRAMS = {1: "tokens", 2: "pairs of tokens", 3: "triples of tokens"}
_TEXT_ROWS = {
    "texts": lambda s: f"{s['texts']:,}",
    "tokens": lambda s: f"{s['tokens']:,}",
    "different texts": lambda s: f"{s['distinct_texts']:,}",
    "repeat the text before": lambda s: _percent(s["repeats_previous"]),
    "repeat any text of the episode": lambda s: _percent(s["repeats_in_episode"]),
}


def _events(events: Mapping[str, Any] | None) -> str:
    if events is None:
        return ""
    return (
        f"<p>Of {events['count']:,} recorded events (contact, grasp, ...), <b>{_percent(events['kept_share'])}</b> "
        f"have a kept frame within {_percent(events['tolerance'], 0)} of the episode's length; as many random frames "
        f"would catch {_percent(events['random_share'])}.</p>"
    )


def _examples(timelines: Sequence[Mapping[str, Any]]) -> str:
    if not timelines:
        return "<p class='muted'>None were drawn.</p>"
    intro = (
        "<p class='muted'>Drawn by hash from each task in turn, not picked. “Change of motion” is what Eq. 4 compares "
        "with its mean.</p>"
    )
    return intro + "".join(_example(shown) for shown in timelines)


def _example(shown: Mapping[str, Any]) -> str:
    what = f"{shown['task'] or ''}: {shown['instruction'] or ''}"
    alt = f"Timeline of episode {shown['episode_id']}: {shown['kept_frames']} of {shown['frames']} frames kept"
    rows = []
    for (text, kept), steps in groupby(shown["steps"], key=lambda s: (s["reasoning"] or "", s["kept"])):
        run = list(steps)
        first, last = run[0]["step"], run[-1]["step"]
        mark = "<td class='text kept'>kept</td>" if kept else "<td class='text muted'>pruned</td>"
        where = f"{first}" if first == last else f"{first}–{last}"
        rows.append(f"<tr><td>{where}</td>{mark}<td class='text'>{escape(text)}</td></tr>")
    return (
        f"<figure><img src='{escape(shown['file'])}' alt='{escape(alt)}' loading='lazy'>"
        f"<figcaption><b>{escape(what)}</b> <span class='muted'>{escape(shown['episode_id'])}, "
        f"{shown['kept_frames']} of {shown['frames']} frames kept</span>"
        f"<details><summary>all of its reasoning</summary><div class='scroll'><table><tr><th>steps</th>"
        f"<th style='text-align:left'>reasoning</th><th></th></tr>{''.join(rows)}</table></div></details>"
        f"</figcaption></figure>"
    )


def _table(header: Iterable[str], rows: Iterable[Sequence[str]], total: Sequence[str] | None = None) -> str:
    def line(cells: Iterable[str], tag: str, mark: str = "") -> str:
        return f"<tr{mark}>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"

    lines = [line(header, "th"), *(line(row, "td") for row in rows)]
    if total is not None:
        lines.append(line(total, "td", " class='total'"))
    return f"<div class='scroll'><table>{''.join(lines)}</table></div>"


def _percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f} %"
