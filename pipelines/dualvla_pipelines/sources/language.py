"""LeRobot's language columns and our text and label columns, both ways.

`language_events`: rows that hold at one frame. `language_persistent`: rows that hold from their timestamp on, repeated
on every frame of the episode; here only for what changes rarely. LeRobot's own styles are used where they fit
(`motion`); the others are project styles, which its registry (`EXTENDED_STYLES`) allows. Knows no files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dualvla.errors import DataError

PERSISTENT, EVENTS = "language_persistent", "language_events"
COLUMNS = (PERSISTENT, EVENTS)
FEATURES = {name: {"dtype": "language", "shape": [1], "names": None} for name in COLUMNS}
_MOTION, _REASONING, _EVENT = "motion", "reasoning", "event"
_LABELS = ("scene_label", "action_label", "keep_reasoning")
_AS_JSON = (*_LABELS, "target_pixel", "target_position")
# Whose text becomes the reasoning where there is none of style `reasoning`, in the order they are joined.
_THOUGHTS = ("plan", "subtask")
_SAME_TIME_S = 1e-4

_EVENT_ROW = [
    pa.field("role", pa.string(), nullable=False),
    pa.field("content", pa.string()),
    pa.field("style", pa.string()),
    pa.field("camera", pa.string()),
    pa.field("tool_calls", pa.list_(pa.string())),
]
PERSISTENT_TYPE = pa.list_(
    pa.struct([*_EVENT_ROW[:3], pa.field("timestamp", pa.float32(), nullable=False), *_EVENT_ROW[3:]])
)
EVENTS_TYPE = pa.list_(pa.struct(_EVENT_ROW))


def write(rows: Sequence[Mapping[str, Any]], timestamps_s: Sequence[float]) -> dict[str, pa.Array]:
    """The two columns of one episode, from its step rows (labels, where there are any, too) and frame times."""
    motions: list[dict[str, Any]] = []
    current: str | None = None
    events: list[list[dict[str, Any]]] = []
    for row, time_s in zip(rows, timestamps_s, strict=True):
        if row["motion_primitive"] != current:
            current = row["motion_primitive"]
            motions.append({**_row(_MOTION, current), "timestamp": np.float32(time_s)})
        here = [] if row["reasoning"] is None else [_row(_REASONING, row["reasoning"])]
        here += [_row(_EVENT, text) for text in row["events"] or ()]
        here += [_row(name, json.dumps(row[name])) for name in _AS_JSON if row.get(name) is not None]
        events.append(here)
    return {
        PERSISTENT: pa.array([motions] * len(events), type=PERSISTENT_TYPE),
        EVENTS: pa.array(events, type=EVENTS_TYPE),
    }


def _row(style: str, content: str | None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "style": style, "camera": None, "tool_calls": None}


def read(table: pa.Table, timestamps_s: np.ndarray, labelled: bool) -> dict[str, list[Any]]:
    """Step columns of one episode: reasoning, motion_primitive, events, targets, and labels if it is `labelled`.

    Reasoning is style `reasoning`, else the plan and subtask that hold at the frame.
    Raises: DataError if what should be JSON is not.
    """
    if not set(COLUMNS) & set(table.column_names):
        return {}
    length = len(table)
    persistent = table[PERSISTENT].to_pylist() if PERSISTENT in table.column_names else [None] * length
    events = table[EVENTS].to_pylist() if EVENTS in table.column_names else [None] * length
    found: dict[str, list[Any]] = {"motion_primitive": [], "reasoning": [], "events": []}
    styles = _AS_JSON if labelled else _AS_JSON[len(_LABELS) :]
    extra: dict[str, list[Any]] = {name: [None] * length for name in styles}
    for step in range(length):
        held = _active(persistent[step] or (), float(timestamps_s[step]))
        here = events[step] or ()
        thoughts = [row["content"] for row in here if row["style"] == _REASONING and row["content"] is not None]
        thoughts = thoughts or [held[style] for style in _THOUGHTS if held.get(style)]
        found["reasoning"].append("\n".join(thoughts) if thoughts else None)
        found["motion_primitive"].append(held.get(_MOTION))
        found["events"].append([row["content"] for row in here if row["style"] == _EVENT])
        for row in here:
            if row["style"] in extra:
                extra[row["style"]][step] = _from_json(row["style"], row["content"])
    return found | extra


def _from_json(style: str, content: str | None) -> Any:
    try:
        return json.loads(content or "null")
    except json.JSONDecodeError as error:
        raise DataError(f"A language row of style '{style}' is not JSON: {error}.", "repair the source") from error


def _active(rows: Sequence[Mapping[str, Any]], time_s: float) -> dict[str, str | None]:
    """Style -> content of its latest row at that time."""
    latest: dict[str, tuple[float, str | None]] = {}
    for row in rows:
        at_s = float(row["timestamp"])
        if at_s <= time_s + _SAME_TIME_S and at_s >= latest.get(row["style"], (-np.inf, None))[0]:
            latest[row["style"]] = (at_s, row["content"])
    return {style: content for style, (_, content) in latest.items()}
